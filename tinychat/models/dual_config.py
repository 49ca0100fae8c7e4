"""Sizes of the encoders that put pictures and texts into one space (CLIP, SigLIP), from transformers' configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from transformers.configuration_utils import PretrainedConfig

from tinychat.config import VisionConfig
from tinychat.errors import ModelError

LEGACY_EOS = 2  # in configs of before the end-of-text id was right: the end of a text is its highest id


class EncoderConfig(Protocol):
    """The sizes of an encoder's layers, for pictures or texts."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


@dataclass(frozen=True, slots=True)
class TextEncoderConfig:
    """A CLIP or SigLIP text encoder. SigLIP's last linear goes to `projection_size`."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int
    projection_size: int

    @classmethod
    def of(cls, config: TextEncoderConfig | PretrainedConfig) -> TextEncoderConfig:
        """Ours as it is, or from a transformers CLIPTextConfig or SiglipTextConfig."""
        return config if isinstance(config, TextEncoderConfig) else _text_encoder(config)


@dataclass(frozen=True, slots=True)
class DualConfig:
    """Both encoders. `projection_dim` is the width of CLIP's common space; SigLIP's encoders end in it."""

    text: TextEncoderConfig
    vision: VisionConfig
    projection_dim: int
    logit_scale_init_value: float = 2.6592  # log(1 / 0.07)

    @classmethod
    def of(cls, config: DualConfig | PretrainedConfig) -> DualConfig:
        """Ours as it is, or from a transformers CLIPConfig or SiglipConfig."""
        return config if isinstance(config, DualConfig) else _dual(config)


def _text_encoder(config: PretrainedConfig) -> TextEncoderConfig:
    family = config.model_type.removesuffix("_text_model")
    if family not in ("clip", "siglip"):
        raise ModelError(f"the text encoder {config.model_type!r} is not supported", "works: clip, siglip")
    raw: Any = config
    ends = raw.eos_token_id if isinstance(raw.eos_token_id, list) else [raw.eos_token_id]
    if len(ends) != 1 or ends[0] is None:
        message = f"the text config's eos_token_id is {raw.eos_token_id}, one id is needed"
        raise ModelError(message, "write the id that ends a text into config.json")
    return TextEncoderConfig(
        family=family,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_hidden_layers=raw.num_hidden_layers,
        num_attention_heads=raw.num_attention_heads,
        max_position_embeddings=raw.max_position_embeddings,
        hidden_act=raw.hidden_act,
        layer_norm_eps=raw.layer_norm_eps,
        eos_token_id=ends[0],
        projection_size=raw.projection_size if family == "siglip" else raw.hidden_size,
    )


def _dual(config: PretrainedConfig) -> DualConfig:
    if config.model_type not in ("clip", "siglip"):
        raise ModelError(f"{config.model_type!r} does not embed pictures and texts", "works: clip, siglip")
    raw: Any = config
    text, vision = TextEncoderConfig.of(raw.text_config), VisionConfig.of(raw.vision_config)
    if config.model_type == "siglip":
        return DualConfig(text, vision, vision.hidden_size, 0.0)
    return DualConfig(text, vision, raw.projection_dim, raw.logit_scale_init_value)
