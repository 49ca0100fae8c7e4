"""config.json of any supported layout -> typed dataclasses. The only place that knows the foreign key names.

Layouts: `vila` (VILA-1.5 and NVILA folders, and ours), `llava` (the original LLaVA single folder), `llava_hf`
(transformers' LLaVA-1.5 and LLaVA-NeXT), `text` (a Llama, Mistral or Qwen2 folder without pictures).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.activations import ACT2FN

from tinychat.errors import FormatError, ModelError
from tinychat.tiling import Tiling

Json = dict[str, Any]
Layout = Literal["vila", "llava", "llava_hf", "text"]
TokenOrder = Literal["row", "column"]

FLOAT_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TEXT_FAMILIES = ("llama", "mistral", "qwen2")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
ASPECT_RATIOS = (None, "pad", "resize", "square")  # how a picture becomes the tower's square; None and square: plain
ANYRES = "anyres"  # a picture becomes several squares: LLaVA-NeXT
GRID_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # where config.json has none
DOWNSAMPLE = {  # projector type -> side of the block of patches that becomes one token
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "mlp_downsample_3x3_s2": 3,
    "mlp_downsample_3x3_s2_new": 3,
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864) and their scaling, in the words of transformers' `rope_parameters`."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ModelError(f"RoPE type {self.type!r} is not supported", f"supported are {', '.join(ROPE_TYPES)}")


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A Llama-shaped decoder: sizes, biases and positions. `windows[i]` is layer i's sliding window, None = full."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig
    max_position_embeddings: int
    rms_norm_eps: float
    windows: tuple[int | None, ...]
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        _check_act("hidden_act", self.hidden_act)

    @classmethod
    def of(cls, config: TextConfig | PretrainedConfig) -> TextConfig:
        """Ours as it is, or from a transformers LlamaConfig, MistralConfig or Qwen2Config."""
        return config if isinstance(config, TextConfig) else _text_config(config)


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A CLIP or SigLIP tower, and which of its features go on: hidden_states[select_layer], with or without CLS.

    Several layers' features are joined, channel by channel.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    hidden_act: str
    layer_norm_eps: float
    select_layer: int | tuple[int, ...] = -2
    select_feature: str = "patch"

    def __post_init__(self) -> None:
        _check_act("the vision tower's hidden_act", self.hidden_act)

    @classmethod
    def of(cls, config: VisionConfig | PretrainedConfig) -> VisionConfig:
        """Ours as it is, or from a transformers CLIPVisionConfig or SiglipVisionConfig."""
        return config if isinstance(config, VisionConfig) else _vision_config(config, -2, "patch")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def select_layers(self) -> tuple[int, ...]:
        return (self.select_layer,) if isinstance(self.select_layer, int) else self.select_layer

    @property
    def has_class_token(self) -> bool:
        return self.family == "clip"

    @property
    def num_features(self) -> int:
        """Features a picture that leave the tower."""
        return self.grid**2 + (self.has_class_token and self.select_feature != "patch")


@dataclass(frozen=True, slots=True)
class ProjectorConfig:
    """From vision features to the decoder's width. `token_order` matters for `mlp_downsample*` alone:

    VILA-1.5 was trained with the blocks read column by column, NVILA and later row by row, under the same type name.
    """

    type: str
    mm_hidden_size: int
    hidden_size: int
    act: str = "gelu"
    bias: bool = True
    token_order: TokenOrder = "row"

    def __post_init__(self) -> None:
        _check_act("the projector's hidden_act", self.act)

    @property
    def block(self) -> int:
        """Side of the square of patches that becomes one token."""
        return DOWNSAMPLE.get(self.type, 1)


class VilaConfig(PretrainedConfig):
    """The config of `VilaLlamaForCausalLM`: three sub-configs as plain dicts, parsed on demand into dataclasses.

    Takes the keys of any supported layout; what it does not know stays in it untouched, as transformers does.
    """

    model_type = "vila_llama"

    def __init__(
        self,
        llm_cfg: Json | None = None,
        vision_tower_cfg: Json | None = None,
        mm_projector_cfg: Json | None = None,
        **raw: Any,
    ) -> None:
        given = {"llm_cfg": llm_cfg, "vision_tower_cfg": vision_tower_cfg, "mm_projector_cfg": mm_projector_cfg}
        raw.update({key: value for key, value in given.items() if value is not None})
        fields = _FROM_LAYOUT[layout_of(raw)](raw) if _is_model(raw) else dict(raw)
        self.llm_cfg: Json | None = fields.pop("llm_cfg", None)
        self.vision_tower_cfg: Json | None = fields.pop("vision_tower_cfg", None)
        self.mm_projector_cfg: Json | None = fields.pop("mm_projector_cfg", None)
        self.layout: Layout = fields.pop("layout", "vila")
        self.image_token: str = fields.pop("image_token", "<image>")
        self.image_token_id: int | None = fields.pop("image_token_id", None)
        self.image_aspect_ratio: str | None = fields.pop("image_aspect_ratio", None)
        self.image_grid_pinpoints: list[list[int]] | None = fields.pop("image_grid_pinpoints", None)
        self.image_suffix: str = fields.pop("image_suffix", "")
        self.mm_vision_tower: str | None = fields.pop("mm_vision_tower", None)
        self.mm_vision_select_layer: int | list[int] = fields.pop("mm_vision_select_layer", -2)
        self.mm_vision_select_feature: str = fields.pop("mm_vision_select_feature", "patch")
        self.mm_use_im_start_end: bool = fields.pop("mm_use_im_start_end", False)
        self.mm_use_im_patch_token: bool = fields.pop("mm_use_im_patch_token", False)
        self.tune_vision_tower: bool = fields.pop("tune_vision_tower", False)
        self.tune_mm_projector: bool = fields.pop("tune_mm_projector", False)
        self.tokenizer_padding_side: str = fields.pop("tokenizer_padding_side", "right")
        self.tokenizer_model_max_length: int | None = fields.pop("tokenizer_model_max_length", None)
        fields.pop("model_type", None)
        super().__init__(**fields)

    @property
    def text(self) -> TextConfig:
        if self.llm_cfg is None:
            raise ModelError("the config has no llm_cfg", "give the config.json of a whole model")
        return _text_config(_foreign("text", self.llm_cfg))

    @property
    def vision(self) -> VisionConfig | None:
        if self.vision_tower_cfg is None:
            return None
        foreign = _foreign("vision", _vision_part(self.vision_tower_cfg))
        return _vision_config(foreign, self.mm_vision_select_layer, self.mm_vision_select_feature)

    @property
    def projector(self) -> ProjectorConfig | None:
        if self.mm_projector_cfg is None or (vision := self.vision) is None:
            return None
        cfg = self.mm_projector_cfg
        return ProjectorConfig(
            type=cfg.get("mm_projector_type", "linear"),
            mm_hidden_size=vision.hidden_size * len(vision.select_layers),
            hidden_size=self.text.hidden_size,
            act=cfg.get("hidden_act", "gelu"),
            bias=cfg.get("bias", True),
            token_order=cfg.get("token_order", "row"),
        )

    @property
    def tiling(self) -> Tiling | None:
        """How pictures are cut into tiles (LLaVA-NeXT); None where each is shown whole."""
        cut = self.image_aspect_ratio == ANYRES and self.layout != "llava"
        if not cut or self.image_grid_pinpoints is None or (vision := self.vision) is None:
            return None
        resolutions = tuple((int(height), int(width)) for height, width in self.image_grid_pinpoints)
        return Tiling(resolutions, vision.image_size, vision.grid)

    @property
    def tiles_per_image(self) -> int:
        """Squares of the tower's size that one picture becomes at most."""
        return 1 if (tiling := self.tiling) is None else tiling.most_tiles

    @property
    def tokens_per_image(self) -> int:
        """Rows that one picture takes in the decoder at most, without `image_suffix`; 0 for a text-only model."""
        vision, projector = self.vision, self.projector
        if vision is None or projector is None:
            return 0
        if (tiling := self.tiling) is not None:
            return tiling.most_tokens
        if projector.block == 1:
            return vision.num_features
        return (-(-vision.grid // projector.block)) ** 2


def read_config(folder: Path) -> VilaConfig:
    """The config of a model folder of any layout. Raises ModelError (not a model) or FormatError (damaged JSON)."""
    raw = read_json(folder / "config.json")
    for key in ("llm_cfg", "vision_tower_cfg", "mm_projector_cfg"):
        part = folder / key.removesuffix("_cfg") / "config.json"
        listed = raw.get(key) is not None or "llm_cfg" not in raw  # a root that lists parts has no others
        if layout_of(raw) == "vila" and listed and part.is_file():
            raw[key] = {**(raw[key] if isinstance(raw.get(key), dict) else {}), **read_json(part)}
        elif isinstance(raw.get(key), str):
            raw[key] = read_json(folder / raw[key] / "config.json")
    _check_parts(raw)
    config = VilaConfig(**raw)
    _check_pictures(config)
    _check_marks(config)
    return config


def _check_parts(raw: Json) -> None:
    """Raises FormatError where a part of the config is no object."""
    for key in ("llm_cfg", "vision_tower_cfg", "mm_projector_cfg", "text_config", "vision_config"):
        if not isinstance(part := raw.get(key), dict | None):
            raise FormatError(f"config.json has a {type(part).__name__} as {key}, not an object", "check config.json")


def _check_pictures(config: VilaConfig) -> None:
    """Raises ModelError where the model was trained on pictures that are prepared in a way that is not ours."""
    if (mode := config.image_aspect_ratio) not in ASPECT_RATIOS and config.tiling is None:
        works = ", ".join(name for name in ASPECT_RATIOS if name)
        remedy = f"works: {works}, or none" + ("; LLaVA-NeXT as transformers writes it works" if mode == ANYRES else "")
        raise ModelError(f"image_aspect_ratio is {mode!r}, which is not supported", remedy)
    if (merge := getattr(config, "mm_patch_merge_type", None)) not in (None, "flat"):
        raise ModelError(f"mm_patch_merge_type is {merge!r}, which is not supported", "works: flat, or none")


def _check_marks(config: VilaConfig) -> None:
    """Raises ModelError where the model was trained with tokens around its pictures that the prompt does not have."""
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if getattr(config, key):
            raise ModelError(f"{key} is set: the model expects marks around its pictures", "this is not supported yet")


def read_json(path: Path) -> Json:
    """A JSON object from a file. Raises ModelError where there is no file, FormatError where it is not an object."""
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        found = f"found {', '.join(there)}" if there else "the folder is empty or missing"
        raise ModelError(f"{path} was looked for, {found}", "give the folder that holds config.json") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is not valid JSON ({error})", "download or copy the file again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, not an object", "download or copy the file again")
    return cast("Json", value)


def layout_of(raw: Mapping[str, Any]) -> Layout:
    """Which layout's keys these are. Raises ModelError for an architecture that is not supported."""
    model_type = raw.get("model_type", "")
    if "llm_cfg" in raw or model_type == "vila_llama":
        return "vila"
    if "text_config" in raw and model_type in ("llava", "llava_next"):
        return "llava_hf"
    if "mm_vision_tower" in raw:
        return "llava"
    if model_type in TEXT_FAMILIES:
        return "text"
    supported = (
        f"VILA and NVILA folders, LLaVA-1.5 (both layouts), LLaVA-NeXT, text models ({', '.join(TEXT_FAMILIES)})"
    )
    name = raw.get("architectures") or [model_type or "unknown"]
    raise ModelError(f"the architecture {name[0]} (model_type {model_type!r}) is not supported", f"works: {supported}")


def _is_model(raw: Mapping[str, Any]) -> bool:
    return any(key in raw for key in ("llm_cfg", "text_config", "mm_vision_tower", "hidden_size"))


def _from_vila(raw: Json) -> Json:
    fields = dict(raw)
    projector = raw.get("mm_projector_cfg")
    if raw.get("s2") or raw.get("dynamic_s2"):
        raise ModelError("the model uses S2 multi-scale vision features", "this is not supported yet")
    newer = "image_encoder" in raw  # NVILA and later name their encoders
    if newer:
        fields.setdefault("image_suffix", _image_encoder(raw["image_encoder"]).get("end_tokens", "\n") or "")
    if projector is not None:
        old = projector.get("mm_projector_type") == "mlp_downsample" and not newer
        fields["mm_projector_cfg"] = {"token_order": "column" if old else "row", **projector}
    if raw.get("image_aspect_ratio") in ("dynamic", "dynamic_s2"):
        fields["image_aspect_ratio"] = "resize"  # what VILA itself does where several pictures are in the prompt
    return fields


def _image_encoder(value: object) -> Json:
    """NVILA's encoder: an object, or one written as a string."""
    try:
        encoder: object = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise FormatError(f"image_encoder is not valid JSON ({error})", "check config.json") from error
    if not isinstance(encoder, dict):
        raise FormatError(f"image_encoder is a {type(encoder).__name__}, not an object", "check config.json")
    return cast("Json", encoder)


def _from_llava(raw: Json) -> Json:
    own = {key: value for key, value in raw.items() if not key.startswith(("mm_", "image_", "tune_", "tokenizer_"))}
    fields = {key: raw[key] for key in raw.keys() - own.keys() - {"mm_projector_type", "mm_hidden_size"}}
    fields["llm_cfg"] = {**own, "model_type": _family_of_llava(raw)}
    fields["mm_projector_cfg"] = {"mm_projector_type": raw.get("mm_projector_type", "linear")}
    fields.update(
        {key: raw[key] for key in ("vision_tower_cfg", "quantization_config", "dtype", "torch_dtype") if key in raw}
    )
    return {**fields, "layout": "llava"}


def _family_of_llava(raw: Json) -> str:
    names = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
    family = names.get(raw.get("model_type", ""))
    if family is None:
        raise ModelError(f"the LLaVA decoder {raw.get('model_type')!r} is not supported", f"works: {', '.join(names)}")
    return family


def _from_llava_hf(raw: Json) -> Json:
    moved = ("text_config", "vision_config", "image_token_index", "vision_feature_layer", "image_seq_length")
    fields = {key: value for key, value in raw.items() if key not in moved}
    strategy = raw.get("vision_feature_select_strategy", "default")
    fields["llm_cfg"] = {"model_type": "llama", **raw["text_config"]}
    if raw.get("tie_word_embeddings") is not None:
        fields["llm_cfg"].setdefault("tie_word_embeddings", raw["tie_word_embeddings"])
    fields["vision_tower_cfg"] = {"model_type": "clip_vision_model", **(raw.get("vision_config") or {})}
    fields["mm_projector_cfg"] = {
        "mm_projector_type": "mlp2x_gelu",
        "hidden_act": raw.get("projector_hidden_act", "gelu"),
        "bias": raw.get("multimodal_projector_bias", True),
    }
    fields["image_token_id"] = raw.get("image_token_index", raw.get("image_token_id", 32000))
    fields["mm_vision_select_feature"] = "patch" if strategy == "default" else "cls_patch"
    if raw["model_type"] == "llava_next":
        fields |= _tiles(raw, fields)
    else:
        fields["mm_vision_select_layer"] = _single_layer(raw.get("vision_feature_layer", -2))
    return {**fields, "layout": "llava_hf"}


def _tiles(raw: Json, fields: Json) -> Json:
    """What LLaVA-NeXT has beyond LLaVA-1.5. Raises ModelError where a tile's features would be no square."""
    tower: str = fields["vision_tower_cfg"]["model_type"]
    strategy, fitting = raw.get("vision_feature_select_strategy", "default"), "full" if "siglip" in tower else "default"
    if strategy != fitting:
        message = f"vision_feature_select_strategy is {strategy!r}: the features of a tile are then not a square"
        raise ModelError(message, f"it is {fitting!r} with a tower of type {tower!r}")
    return {
        "image_aspect_ratio": ANYRES,
        "image_grid_pinpoints": raw.get("image_grid_pinpoints") or GRID_PINPOINTS,
        "mm_vision_select_layer": raw.get("vision_feature_layer", -2),
    }


def _single_layer(layer: object) -> int:
    if not isinstance(layer, int):
        raise ModelError(f"vision_feature_layer is {layer}", "models that take one layer's features are supported")
    return layer


def _from_text(raw: Json) -> Json:
    root = ("quantization_config", "architectures", "transformers_version", "dtype", "torch_dtype")
    return {**{key: raw[key] for key in root if key in raw}, "llm_cfg": dict(raw), "layout": "text"}


_FROM_LAYOUT = {"vila": _from_vila, "llava": _from_llava, "llava_hf": _from_llava_hf, "text": _from_text}


def _check_act(key: str, name: object) -> None:
    if not isinstance(name, str) or name not in ACT2FN:
        raise ModelError(f"{key} is {name!r}, which is not an activation that transformers knows", "check config.json")


def _foreign(part: str, cfg: Json) -> PretrainedConfig:
    model_type = cfg.get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(f"the {part} config has the unknown model_type {model_type!r}", "check its config.json")
    fields = {key: value for key, value in cfg.items() if key not in ("model_type", "quantization_config")}
    fields = copy.deepcopy(fields)  # transformers writes into the dicts that it is given
    try:
        return CONFIG_MAPPING[model_type](**fields)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ModelError(f"the {part} config of type {model_type!r} is wrong: {reason}", "check config.json") from error


def _vision_part(cfg: Json) -> Json:
    """A full CLIP or SigLIP checkpoint nests its vision config; a tower's own config.json does not."""
    if "vision_config" not in cfg:
        return cfg
    inner = cfg["vision_config"]
    return {"model_type": f"{cfg['model_type']}_vision_model", **inner}


def _text_config(config: PretrainedConfig) -> TextConfig:
    family = config.model_type
    if family not in TEXT_FAMILIES:
        raise ModelError(f"the decoder {family!r} is not supported", f"works: {', '.join(TEXT_FAMILIES)}")
    raw: Any = config
    return TextConfig(
        family=family,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_hidden_layers=raw.num_hidden_layers,
        num_attention_heads=raw.num_attention_heads,
        num_key_value_heads=raw.num_key_value_heads or raw.num_attention_heads,
        head_dim=getattr(raw, "head_dim", None) or raw.hidden_size // raw.num_attention_heads,
        rope=_rope_config(raw),
        max_position_embeddings=raw.max_position_embeddings,
        rms_norm_eps=raw.rms_norm_eps,
        windows=_windows(raw),
        hidden_act=raw.hidden_act,
        tie_word_embeddings=bool(raw.tie_word_embeddings),
        qkv_bias=family == "qwen2" or bool(getattr(raw, "attention_bias", False)),
        out_bias=family == "llama" and bool(raw.attention_bias),
        mlp_bias=family == "llama" and bool(raw.mlp_bias),
    )


def _rope_config(config: Any) -> RopeConfig:
    """From transformers 5's `rope_parameters`. A missing theta is an error: guessing it gives fluent nonsense."""
    rope: Json = config.rope_parameters or {}
    if rope.get("rope_theta") is None:
        raise ModelError("the decoder's config has no rope_theta", "add rope_theta to config.json")
    optional = ("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale")
    names = (*optional, "mscale_all_dim", "truncate")
    length = config.max_position_embeddings
    kind: str = rope.get("rope_type", "default")
    original: int = length if kind == "dynamic" else rope.get("original_max_position_embeddings") or length
    return RopeConfig(
        theta=float(rope["rope_theta"]),
        type=kind,
        factor=float(rope.get("factor") or length / original),
        original_max_position=original,
        **{name: rope[name] for name in names if rope.get(name) is not None},
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None) if config.model_type != "llama" else None
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _vision_config(config: PretrainedConfig, select_layer: int | list[int], select_feature: str) -> VisionConfig:
    family = config.model_type.removesuffix("_vision_model")
    if family not in ("clip", "siglip"):
        raise ModelError(f"the vision tower {config.model_type!r} is not supported", "works: clip, siglip")
    raw: Any = config
    return VisionConfig(
        family=family,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_hidden_layers=raw.num_hidden_layers,
        num_attention_heads=raw.num_attention_heads,
        image_size=raw.image_size,
        patch_size=raw.patch_size,
        num_channels=raw.num_channels,
        hidden_act=raw.hidden_act,
        layer_norm_eps=raw.layer_norm_eps,
        select_layer=select_layer if isinstance(select_layer, int) else tuple(select_layer),
        select_feature=select_feature,
    )
