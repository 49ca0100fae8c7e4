"""config.json of every layout: the keys that published models carry, and the sentence for what is not supported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

from tinychat.config import ProjectorConfig, RopeConfig, TextConfig, VilaConfig, VisionConfig, layout_of, read_config
from tinychat.errors import FormatError, ModelError
from tinychat.tiling import Tiling

Json = dict[str, Any]

LLAMA: Json = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}
SIGLIP: Json = {
    "model_type": "siglip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 384,
    "patch_size": 14,
}
CLIP: Json = {**SIGLIP, "model_type": "clip_vision_model", "image_size": 336}
VILA: Json = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaModel"],
    "llm_cfg": LLAMA,
    "vision_tower_cfg": SIGLIP,
    "mm_projector_cfg": {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample"},
    "image_aspect_ratio": "resize",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "cls_patch",
    "model_dtype": "torch.bfloat16",
}
LLAVA: Json = {
    **LLAMA,
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 48,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
    "tune_mm_mlp_adapter": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "torch_dtype": "float16",
}
LLAVA_HF: Json = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "image_seq_length": 576,
    "projector_hidden_act": "gelu",
    "text_config": LLAMA,
    "vision_config": CLIP,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "torch_dtype": "float16",
}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# Layouts


@pytest.mark.parametrize(
    ("raw", "layout", "tokens"),
    [(VILA, "vila", 196), (LLAVA, "llava", 576), (LLAVA_HF, "llava_hf", 576), (LLAMA, "text", 0)],
)
def test_every_layout(raw: Json, layout: str, tokens: int) -> None:
    before = copy.deepcopy(raw)
    if layout == "llava":
        raw = {**raw, "vision_tower_cfg": CLIP}  # read from the tower's own folder
    config = VilaConfig(**raw)
    assert config.layout == layout
    assert config.tokens_per_image == tokens
    assert (config.vision is None) == (config.projector is None) == (layout == "text")
    text = config.text
    assert (text.family, text.vocab_size, text.hidden_size, text.num_key_value_heads) == ("llama", 320, 64, 2)
    assert (text.head_dim, text.rope.theta, text.rms_norm_eps) == (16, 500000.0, 1e-5)
    assert before.items() <= raw.items(), "the caller's dict was written to"


def test_a_vila_folder_fully_read() -> None:
    config = VilaConfig(**VILA)
    assert config.vision == VisionConfig(
        family="siglip",
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=384,
        patch_size=14,
        num_channels=3,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        select_layer=-2,
        select_feature="cls_patch",
    )
    assert config.projector == ProjectorConfig("mlp_downsample", 48, 64, token_order="column")
    assert (config.image_suffix, config.image_aspect_ratio, config.image_token_id) == ("", "resize", None)


def test_original_llava_keys_go_to_their_parts() -> None:
    config = VilaConfig(**LLAVA, vision_tower_cfg=CLIP)
    assert config.mm_vision_tower == "openai/clip-vit-large-patch14-336"
    assert config.projector == ProjectorConfig("mlp2x_gelu", 48, 64)
    assert (config.image_aspect_ratio, config.tokenizer_model_max_length) == ("pad", 2048)
    assert str(config.dtype) == "torch.float16"
    assert config.llm_cfg is not None and not [key for key in config.llm_cfg if key.startswith(("mm_", "image_"))]


@pytest.mark.parametrize(
    ("name", "family"), [("llava_llama", "llama"), ("llava", "llama"), ("llava_mistral", "mistral")]
)
def test_original_llava_decoders(name: str, family: str) -> None:
    assert VilaConfig(**{**LLAVA, "model_type": name}).text.family == family


def test_llava_next_keys() -> None:
    """Those of llava-v1.6-mistral-7b-hf, where LLaVA-1.5 would have one square of 576 tokens."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    more = {"use_image_newline_parameter": True, "ignore_index": -100, "image_token_index": 32000}
    raw = {**LLAVA_HF, **more, "model_type": "llava_next", "image_grid_pinpoints": pinpoints}
    config = VilaConfig(**raw)
    assert (config.layout, config.image_aspect_ratio, config.image_token_id) == ("llava_hf", "anyres", 32000)
    assert config.tiling == Tiling(tuple((h, w) for h, w in pinpoints), 336, 24)
    assert (config.tokens_per_image, config.tiles_per_image) == (2928, 5)
    assert VilaConfig(**{**raw, "image_grid_pinpoints": None}).tiling == config.tiling
    joined = VilaConfig(**{**raw, "vision_feature_layer": [-2, 1]})
    assert joined.vision is not None and joined.vision.select_layers == (-2, 1)
    assert joined.projector is not None and joined.projector.mm_hidden_size == 2 * 48
    again = VilaConfig(**config.to_dict())
    assert (again.tiling, again.vision, again.projector) == (config.tiling, config.vision, config.projector)


def test_whole_pictures_have_one_tile_whatever_else_is_said() -> None:
    for raw in (LLAVA, VILA, LLAVA_HF):
        config = VilaConfig(**{**raw, "image_grid_pinpoints": [[336, 672]]})
        assert (config.tiling, config.tiles_per_image) == (None, 1)


def test_llava_hf_keys() -> None:
    raw = {**LLAVA_HF, "vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    config = VilaConfig(**{**raw, "projector_hidden_act": "relu", "multimodal_projector_bias": False})
    assert config.image_token_id == 32000 and config.tokens_per_image == 577
    assert config.vision is not None
    assert (config.vision.select_layer, config.vision.select_feature) == (-1, "cls_patch")
    assert config.projector == ProjectorConfig("mlp2x_gelu", 48, 64, act="relu", bias=False)


def test_a_partial_text_config_has_the_classes_defaults() -> None:
    """The hub's llava-1.5-7b-hf leaves out whatever equals LlamaConfig's defaults: here everything but three."""
    partial = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    raw = {**LLAVA_HF, "text_config": partial, "vision_config": {"image_size": 336, "patch_size": 14}}
    text = VilaConfig(**raw).text
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.vocab_size) == (
        4096,
        32,
        11008,
        32064,
    )
    assert (text.max_position_embeddings, text.rope.theta, text.num_key_value_heads) == (4096, 10000.0, 32)
    assert TextConfig.of(LlamaConfig(**{**partial, "pad_token_id": None})) == text
    vision = VilaConfig(**raw).vision
    assert vision is not None and vision.family == "clip"


def test_tied_embeddings_of_the_root_reach_the_decoder() -> None:
    assert VilaConfig(**LLAVA_HF, tie_word_embeddings=True).text.tie_word_embeddings
    inner = {**LLAMA, "tie_word_embeddings": False}
    assert not VilaConfig(**{**LLAVA_HF, "text_config": inner}, tie_word_embeddings=True).text.tie_word_embeddings


# Pictures


@pytest.mark.parametrize(
    ("encoder", "suffix", "order"),
    [
        (None, "", "column"),
        ('{"_target_": "llava.model.encoders.BasicImageEncoder"}', "\n", "row"),
        ({"_target_": "llava.model.encoders.BasicImageEncoder", "end_tokens": None}, "", "row"),
        ({"end_tokens": "<end>"}, "<end>", "row"),
    ],
)
def test_the_encoder_tells_vila_from_nvila(encoder: object, suffix: str, order: str) -> None:
    config = VilaConfig(**VILA, **({} if encoder is None else {"image_encoder": encoder}))
    assert config.image_suffix == suffix
    assert config.projector is not None and config.projector.token_order == order


def test_a_stated_token_order_comes_first() -> None:
    raw = {**VILA, "mm_projector_cfg": {"mm_projector_type": "mlp_downsample", "token_order": "row"}}
    projector = VilaConfig(**raw).projector
    assert projector is not None and projector.token_order == "row"


@pytest.mark.parametrize(
    ("kind", "side", "tokens"),
    [
        ("mlp_downsample", 384, 196),
        ("mlp_downsample_2x2_fix", 448, 256),
        ("mlp_downsample_3x3_fix", 384, 81),
        ("mlp_downsample_3x3_s2", 448, 121),
        ("mlp2x_gelu", 384, 729),
        ("linear", 448, 1024),
    ],
)
def test_tokens_a_picture(kind: str, side: int, tokens: int) -> None:
    raw = {**VILA, "vision_tower_cfg": {**SIGLIP, "image_size": side}, "mm_projector_cfg": {"mm_projector_type": kind}}
    assert VilaConfig(**raw).tokens_per_image == tokens


def test_dynamic_tiles_fall_back_to_one_resized_picture() -> None:
    assert VilaConfig(**{**VILA, "image_aspect_ratio": "dynamic"}).image_aspect_ratio == "resize"


def test_a_whole_clip_checkpoint_nests_its_tower() -> None:
    nested = {"model_type": "clip", "vision_config": {k: v for k, v in CLIP.items() if k != "model_type"}}
    whole = VilaConfig(**{**VILA, "vision_tower_cfg": nested}).vision
    assert whole == VilaConfig(**{**VILA, "vision_tower_cfg": CLIP}).vision


# Rotary positions


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, RopeConfig(500000.0, original_max_position=2048)),
        ({"rope_scaling": None}, RopeConfig(500000.0, original_max_position=2048)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeConfig(500000.0, "linear", 2.0, original_max_position=2048),
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            RopeConfig(500000.0, "dynamic", 4.0, original_max_position=2048),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.5,
                    "high_freq_factor": 3.0,
                    "original_max_position_embeddings": 256,
                }
            },
            RopeConfig(500000.0, "llama3", 8.0, 256, 1.5, 3.0),
        ),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
            RopeConfig(77.0, original_max_position=2048),
        ),
        (
            {
                "rope_theta": None,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 77.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 512,
                    "beta_fast": 16.0,
                    "mscale": 0.7,
                    "truncate": False,
                },
            },
            RopeConfig(77.0, "yarn", 4.0, 512, beta_fast=16.0, mscale=0.7, truncate=False),
        ),
    ],
)
def test_old_and_new_forms_of_rope(keys: Json, rope: RopeConfig) -> None:
    raw = {key: value for key, value in {**LLAMA, **keys}.items() if key != "rope_theta" or value is not None}
    before = copy.deepcopy(raw)
    config = VilaConfig(**raw)
    assert config.text.rope == rope
    assert raw == before
    assert VilaConfig(**config.to_dict()).text.rope == rope


# Families


def test_biases_and_windows_of_the_families() -> None:
    sizes = {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    llama = TextConfig.of(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True, sliding_window=4))
    assert (llama.qkv_bias, llama.out_bias, llama.mlp_bias, set(llama.windows)) == (True, True, True, {None})
    mistral = TextConfig.of(MistralConfig(**sizes, num_hidden_layers=3, sliding_window=7, head_dim=32))
    assert (mistral.qkv_bias, mistral.windows, mistral.head_dim) == (False, (7, 7, 7), 32)
    qwen = Qwen2Config(**sizes, num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    assert TextConfig.of(qwen).windows == (None, None, 5)
    assert TextConfig.of(Qwen2Config(**sizes, num_hidden_layers=2)).windows == (None, None)
    assert TextConfig.of(qwen).qkv_bias and not TextConfig.of(qwen).out_bias
    assert TextConfig.of(llama) is llama


def test_towers_from_transformers_configs() -> None:
    clip = VisionConfig.of(CLIPVisionConfig(image_size=56, patch_size=14, hidden_size=96))
    assert (clip.family, clip.grid, clip.has_class_token, clip.num_features) == ("clip", 4, True, 16)
    siglip = VisionConfig.of(SiglipVisionConfig(image_size=56, patch_size=14))
    assert (siglip.family, siglip.has_class_token, siglip.num_features) == ("siglip", False, 16)
    assert VisionConfig.of(clip) is clip


# What is not supported


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "hidden_size": 8},
            "the architecture Gemma3ForConditionalGeneration .model_type 'gemma3'. is not supported; works: VILA and",
        ),
        ({"hidden_size": 8}, "the architecture unknown .model_type ''. is not supported"),
        ({**LLAVA_HF, "model_type": "llava_onevision"}, "model_type 'llava_onevision'. is not supported"),
        ({**LLAVA, "model_type": "llava_mpt"}, "the LLaVA decoder 'llava_mpt' is not supported; works: llava_llama"),
        ({**VILA, "s2": True}, "the model uses S2 multi-scale vision features; this is not supported yet"),
        ({**VILA, "dynamic_s2": True}, "S2 multi-scale"),
        ({**LLAVA_HF, "vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
        ({**VILA, "llm_cfg": {**LLAMA, "model_type": "gemma"}}, "the decoder 'gemma' is not supported; works: llama"),
        ({**VILA, "llm_cfg": {**LLAMA, "model_type": "xyz"}}, "the text config has the unknown model_type 'xyz'"),
        (
            {**VILA, "vision_tower_cfg": {**SIGLIP, "model_type": "vit"}},
            "the vision tower 'vit' is not supported; works: clip, siglip",
        ),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
            "RoPE type 'longrope' is not supported; supported are default, linear, dynamic, llama3, yarn",
        ),
        ({**LLAMA, "hidden_size": "64"}, "the text config of type 'llama' is wrong: .*hidden_size"),
        (
            {**VILA, "vision_tower_cfg": {**CLIP, "num_attention_heads": 5}},
            "the vision config of type 'clip_vision_model' is wrong: .*48.* not a multiple of .*5",
        ),
        (
            {**LLAMA, "hidden_act": "zzz"},
            "hidden_act is 'zzz', which is not an activation that transformers knows; check",
        ),
        ({**VILA, "vision_tower_cfg": {**CLIP, "hidden_act": "zzz"}}, "the vision tower's hidden_act is 'zzz'"),
        (
            {**VILA, "mm_projector_cfg": {"mm_projector_type": "mlp2x_gelu", "hidden_act": ["gelu"]}},
            r"the projector's hidden_act is \['gelu'\]",
        ),
        ({**VILA, "image_encoder": "{"}, r"image_encoder is not valid JSON \(.*\); check config.json"),
        ({**VILA, "image_encoder": "3"}, "image_encoder is a int, not an object"),
        ({**LLAMA, "rope_theta": None}, "the decoder's config has no rope_theta; add rope_theta to config.json"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_supported_is_named(raw: Json, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        config = VilaConfig(**raw)
        assert (config.text, config.vision, config.projector) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
            "image_aspect_ratio is 'anyres', which is not supported; works: pad, resize, square, or none; LLaVA",
        ),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial', which is not supported; works: flat"),
    ],
)
@pytest.mark.parametrize("raw", [VILA, LLAVA])
def test_pictures_that_are_prepared_in_another_way_are_refused(tmp_path: Path, raw: Json, changes: Json, words: str):
    write(tmp_path / "config.json", {**raw, **changes})
    with pytest.raises(ModelError, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("raw", "key"),
    [(VILA, "llm_cfg"), (VILA, "mm_projector_cfg"), (LLAVA_HF, "text_config"), (LLAVA_HF, "vision_config")],
)
def test_parts_that_are_no_objects(tmp_path: Path, raw: Json, key: str):
    write(tmp_path / "config.json", {**raw, key: [3]})
    with pytest.raises(FormatError, match=f"config.json has a list as {key}, not an object"):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["mm_use_im_start_end", "mm_use_im_patch_token"])
def test_marks_around_pictures_are_refused_in_a_folder_and_may_be_set_in_memory(tmp_path: Path, key: str):
    assert getattr(VilaConfig(**{**LLAVA, key: True}), key)
    write(tmp_path / "config.json", {**LLAVA, key: True})
    with pytest.raises(ModelError, match=f"{key} is set: .*; this is not supported yet"):
        read_config(tmp_path)


@pytest.mark.parametrize("mode", [None, "pad", "resize", "square"])
def test_ways_to_make_a_picture_square_are_read(tmp_path: Path, mode: str | None):
    write(tmp_path / "config.json", {**LLAVA, "image_aspect_ratio": mode, "mm_patch_merge_type": "flat"})
    assert read_config(tmp_path).image_aspect_ratio == mode


def test_a_config_without_a_model_is_empty() -> None:
    config = VilaConfig()
    assert config.tokens_per_image == 0 and config.projector is None
    with pytest.raises(ModelError, match="the config has no llm_cfg"):
        _ = config.text


def test_layouts_are_told_apart() -> None:
    assert [layout_of(raw) for raw in (VILA, LLAVA, LLAVA_HF, LLAMA)] == ["vila", "llava", "llava_hf", "text"]


# Round trips and folders


@pytest.mark.parametrize(
    "raw",
    [
        VILA,
        {**VILA, "image_encoder": '{"_target_": "x"}'},
        {**LLAVA, "vision_tower_cfg": CLIP},
        {**LLAVA_HF, "vision_feature_select_strategy": "full"},
        LLAMA,
        {**LLAMA, "model_type": "mistral", "sliding_window": 5, "tie_word_embeddings": True},
    ],
)
def test_a_config_survives_being_written(tmp_path: Path, raw: Json) -> None:
    config = VilaConfig(**raw)
    config.save_pretrained(tmp_path)
    wanted = config.text, config.vision, config.projector, config.layout, config.image_suffix, config.image_token_id
    for again in (VilaConfig(**config.to_dict()), VilaConfig.from_pretrained(tmp_path), read_config(tmp_path)):
        got = again.text, again.vision, again.projector, again.layout, again.image_suffix, again.image_token_id
        assert got == wanted
        assert again.tokens_per_image == config.tokens_per_image
        assert str(again.dtype) == str(config.dtype)


def test_a_folder_of_parts(tmp_path: Path) -> None:
    """VILA's root names its parts; each part's own config.json says more, and comes first."""
    root = {**VILA, "llm_cfg": {"vocab_size": 1, "_name_or_path": "x"}, "vision_tower_cfg": "vision_tower"}
    write(tmp_path / "config.json", root)
    write(tmp_path / "llm" / "config.json", LLAMA)
    write(tmp_path / "vision_tower" / "config.json", SIGLIP)
    config = read_config(tmp_path)
    assert config.text == VilaConfig(**VILA).text and config.vision == VilaConfig(**VILA).vision
    assert config.projector == VilaConfig(**VILA).projector  # stated in the root alone


def test_a_part_under_another_name(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {**VILA, "llm_cfg": "decoder"})
    write(tmp_path / "decoder" / "config.json", LLAMA)
    assert read_config(tmp_path).text.hidden_size == 64


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="was looked for, the folder is empty or missing; give the folder that holds"):
        read_config(tmp_path)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"config.json was looked for, found weights.bin"):
        read_config(tmp_path)
    for text, words in (("{", "is not valid JSON"), ("[1]", "holds a list, not an object"), ("\xff", "not valid JSON")):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(FormatError, match=words):
            read_config(tmp_path)
    write(tmp_path / "config.json", {**VILA, "llm_cfg": "llm"})
    with pytest.raises(ModelError, match=r"llm.config.json was looked for"):
        read_config(tmp_path)
