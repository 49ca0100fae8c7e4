"""Decoder layers of transformers with random weights, to quantize: nobody here wrote them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from models.tiny import FAMILIES
from torch import Tensor, nn
from transformers import AutoModel

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
OUTLIERS = (3, 40)  # channels that are far louder than the others, as in trained models


class Block(NamedTuple):
    module: nn.Module
    run: Callable[[nn.Module, Tensor], Tensor]


def decoder_block(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, loud: float = 1.0, seed: int = 0, **changes: Any
) -> Block:
    """A layer and how to run it; `loud` multiplies the norms' outlier channels. Biases and norms are random too."""
    model = AutoModel.from_config(FAMILIES[family](**{**SIZES, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    block, rotary = model.layers[0], model.rotary_emb
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.ndim == 2 else noise * 0.1 + ("norm" in name))
            if "norm" in name:
                parameter[list(OUTLIERS)] *= loud
    block.to(dtype)

    def run(module: nn.Module, hidden: Tensor) -> Tensor:
        x, positions = hidden[None], torch.arange(len(hidden))[None]
        tables = tuple(table.to(hidden.dtype) for table in rotary(x, positions))
        return module(x, attention_mask=None, position_ids=positions, position_embeddings=tables)[0]

    return Block(block, run)


def sequences(*lengths: int, width: int = 64, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    """Hidden states `[T, D]`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator).to(dtype) for length in lengths]


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
