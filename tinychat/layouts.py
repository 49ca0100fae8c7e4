"""Writing a model in a layout: names on the way out, the config of a transformers LLaVA, files and where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinychat.config import VilaConfig
from tinychat.errors import ModelError
from tinychat_kernels.formats import COMPRESSED_TENSORS, GEMM, Format
from tinychat_kernels.layout import PER_ROW, QuantSpec

Json = dict[str, Any]

OUT_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {  # layout -> a name's beginning in memory, and on disk
    "vila": (("image_newline", "mm_projector.image_newline"),),
    "text": (("llm.", ""),),
    "llava_hf": (
        ("llm.", "language_model."),
        ("mm_projector.layers.0.", "multi_modal_projector.linear_1."),
        ("mm_projector.layers.2.", "multi_modal_projector.linear_2."),
    ),
}
VILA_PARTS = {"llm": "llm_cfg", "vision_tower": "vision_tower_cfg", "mm_projector": "mm_projector_cfg"}
CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")
LEFT = ("config.json", "*.index.json", "trainer_state.json", "training_args*", "optimizer*", "scheduler*")
OF_PICTURES = ("preprocessor_config.json",)
OF_THE_ROOT = ("README*", "*.md", "LICENSE*", "NOTICE*", "quality.json", "quantize.json", "processor_config.json")
# vLLM and SGLang look for a part of a module's name, transformers for its beginning or its end.
FOUND_BY_BEGINNING = ("vision_tower", "multi_modal_projector")
VILA = "give --to vila, which tinychat serves, or --to llm-awq-v2, which llm-awq does"


def name_on_disk(name: str, layout: str) -> str:
    """A tensor's name in a checkpoint, from its name in memory."""
    for ours, theirs in OUT_NAMES[layout]:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def check_llava(config: VilaConfig) -> None:
    """Raise ModelError where transformers' LLaVA cannot hold the model."""
    projector = config.projector
    assert projector is not None
    faults = {
        f"a projector of type {projector.type}, and transformers' LLaVA is two linears": projector.type != "mlp2x_gelu",
        f"{config.image_suffix!r} after every picture, which transformers' LLaVA has not": bool(config.image_suffix),
        "pictures in tiles, which LLaVA has not (LLaVA-NeXT has)": config.tiling is not None,
    }
    for fault, found in faults.items():
        if found:
            raise ModelError(f"the model has {fault}: vLLM and SGLang would take it for another model", VILA)


def llava_config(config: VilaConfig, image_token_id: int, vocab_size: int, head: bool, dtype: str) -> Json:
    """config.json of LlavaForConditionalGeneration for a model of another layout. `head`: SigLIP's head is there."""
    vision, projector, tower = config.vision, config.projector, dict(config.vision_tower_cfg or {})
    assert vision is not None and projector is not None
    if "vision_config" in tower:
        tower = {"model_type": f"{vision.family}_vision_model", **tower["vision_config"]}
    if vision.family == "siglip":
        tower["vision_use_head"] = head
    text = {key: value for key, value in (config.llm_cfg or {}).items() if key != "quantization_config"}
    shape = {"image_aspect_ratio": config.image_aspect_ratio} if config.image_aspect_ratio else {}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "text_config": {**text, "vocab_size": vocab_size},
        "vision_config": tower,
        "image_token_index": image_token_id,
        "image_seq_length": config.tokens_per_image,
        "projector_hidden_act": projector.act,
        "multimodal_projector_bias": projector.bias,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": _strategy(config),
        "tie_word_embeddings": config.text.tie_word_embeddings,
        **shape,
    }


def _strategy(config: VilaConfig) -> str:
    """transformers' `default` drops the first feature, whatever it is: right for a class token alone."""
    vision = config.vision
    assert vision is not None
    return "default" if vision.has_class_token and vision.select_feature == "patch" else "full"


def processor_config(config: VilaConfig) -> Json:
    """processor_config.json of transformers' LlavaProcessor."""
    vision = config.vision
    assert vision is not None
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": _strategy(config),
        "image_token": config.image_token,
        "num_additional_image_tokens": int(vision.has_class_token),
    }


def preprocessor_config(stored: Json, config: VilaConfig) -> Json:
    """preprocessor_config.json that stretches a picture to a square where the model was trained so.

    Padding is left to who asks: transformers' CLIP processor crops instead.
    """
    vision = config.vision
    assert vision is not None
    side = {"height": vision.image_size, "width": vision.image_size}
    if config.image_aspect_ratio == "resize" and vision.family == "clip":
        return {**stored, "size": side, "do_center_crop": False}
    return stored


def vila_config(config: VilaConfig, dtype: str) -> Json:
    """The root config.json of a VILA folder for a model of another layout."""
    kept = {name: value for name, value in config.to_diff_dict().items() if name not in VILA_PARTS.values()}
    for name in ("quantization_config", "compression_config"):
        kept.pop(name, None)
    parts = {key: name for name, key in VILA_PARTS.items()}
    named = {"layout": "vila", "architectures": ["VilaLlamaForCausalLM"], "model_type": "vila_llama"}
    return {**kept, **parts, **named, "model_dtype": f"torch.{dtype}"}


def part_config(config: VilaConfig, part: str) -> Json:
    """config.json of a part of a VILA folder, without the decoder's quantization; the tower's is its own."""
    fields = dict(getattr(config, VILA_PARTS[part]) or {})
    if part != "vision_tower":
        fields.pop("quantization_config", None)
    return {"model_type": "v2l_projector", **fields} if part == "mm_projector" else fields


def quantization_config(
    format: Format, spec: QuantSpec, spared: Sequence[str], layout: str, head: QuantSpec | None = None
) -> Json | None:
    """What config.json says of packed weights; None for llm-awq, whose files say it by their shapes.

    AWQ GEMM has zero points whether groups are symmetric or not, and says so. `head`: compressed-tensors' own, packed.
    """
    if format is GEMM:
        group = {"bits": 4, "group_size": spec.group_size, "zero_point": True}
        left = [*spared, *(f"model.{name}" for name in spared if layout == "llava_hf" and name in FOUND_BY_BEGINNING)]
        return {"quant_method": "awq", "version": "gemm", **group, "modules_to_not_convert": left}
    if format is not COMPRESSED_TENSORS:
        return None
    groups = {"group_0": _scheme("Linear", spec)}
    if head is not None:
        groups["group_1"] = _scheme("re:.*lm_head$", head)  # a name is found before a class
    left = [name for name in spared if name != "lm_head" or head is None]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [f"re:.*{name.replace('.', '[.]')}.*" for name in left],
        "kv_cache_scheme": None,
    }


def _scheme(target: str, spec: QuantSpec) -> Json:
    """A config group of compressed-tensors."""
    per_row = spec.group_size == PER_ROW
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": not spec.zero_point,
        "strategy": "channel" if per_row else "group",
        "group_size": None if per_row else spec.group_size,
        "dynamic": False,
    }
    scheme = {"targets": [target], "weights": weights, "input_activations": None, "output_activations": None}
    return {**scheme, "format": "pack-quantized"}


def files_to_carry(folder: Path, tower: Path | None, vila: bool) -> dict[Path, Path]:
    """Where each of a model's other files goes, relative to the new folder -> the file. A part's own come first."""
    places: dict[Path, Path] = {}
    for home in (folder / "llm", folder / "vision_tower", folder, tower):
        if home is None or not home.is_dir():
            continue
        for path in _carried(home):
            pictures = any(path.match(pattern) for pattern in OF_PICTURES)
            if pictures or home in (folder, folder / "llm"):
                places.setdefault(_place(path, vila, pictures), path)
    return places


def _carried(home: Path) -> list[Path]:
    found = {path for pattern in CARRIED for path in home.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not any(path.match(pattern) for pattern in LEFT))


def _place(path: Path, vila: bool, pictures: bool) -> Path:
    if not vila or any(path.match(pattern) for pattern in OF_THE_ROOT):
        return Path(path.name)
    return Path("vision_tower" if pictures else "llm") / path.name
