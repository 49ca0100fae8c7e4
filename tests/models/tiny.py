"""Random tiny models of transformers, and ours with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tinychat.checkpoint import rename
from tinychat.config import VilaConfig
from tinychat.models.vila_llama import VilaLlamaForCausalLM

VOCABULARY = 99
IMAGE_ID = 98
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
VISION: dict[str, Any] = {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
PATCHES = 16


def shake(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values in every parameter, biases and norms too: what a zero or a one would hide shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def ours_of(theirs: PreTrainedModel) -> VilaLlamaForCausalLM:
    """Our class with the weights of a transformers model."""
    config = VilaConfig(**theirs.config.to_dict())
    model = VilaLlamaForCausalLM(config).eval()
    model.load_state_dict({rename(name, config.layout): t for name, t in theirs.state_dict().items()})
    return model


def text_pair(family: str, **changes: Any) -> tuple[PreTrainedModel, VilaLlamaForCausalLM]:
    """A decoder of transformers and ours."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[family](**{**TEXT, **changes})).eval()
    shake(theirs)
    return theirs, ours_of(theirs)


def llava_pair(vision: dict[str, Any] | None = None, **changes: Any) -> tuple[PreTrainedModel, VilaLlamaForCausalLM]:
    """A LLaVA-1.5 of transformers and ours."""
    tower = CLIPVisionConfig(**{**VISION, **(vision or {})})
    config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE_ID, **changes)
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(config).eval()
    shake(theirs)
    return theirs, ours_of(theirs)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without the image token."""
    return torch.randint(1, IMAGE_ID - 1, shape, generator=torch.Generator().manual_seed(seed))


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    """Random pictures `[count, 3, 28, 28]`."""
    return torch.randn((count, 3, 28, 28), generator=torch.Generator().manual_seed(seed))
