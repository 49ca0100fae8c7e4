"""Linear layers whose weights may be split over a tensor-parallel group; a group of one is a plain linear.

`weights` is a tinychat.checkpoint.Weights or None: with it a layer takes its part of the named tensors at once,
without it the parameters stay empty for a loader to fill.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class WeightSource(Protocol):
    """What the layers ask of tinychat.checkpoint.Weights."""

    def get(self, name: str) -> Tensor: ...
    def get_sharded(self, name: str, dim: int) -> Tensor: ...


def column_linear(prefix: str, inputs: int, outputs: int, weights: WeightSource | None, bias: bool = True) -> nn.Linear:
    """A linear split by output rows (dimension 0 of weight and bias)."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    if weights is not None:
        fill(linear.weight, weights.get_sharded(f"{prefix}.weight", 0))
        if bias:
            fill(linear.bias, weights.get_sharded(f"{prefix}.bias", 0))
    return linear


def row_linear(prefix: str, inputs: int, outputs: int, weights: WeightSource | None, bias: bool = True) -> nn.Linear:
    """A linear split by input columns (dimension 1 of the weight); the bias belongs to the whole sum."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    if weights is not None:
        fill(linear.weight, weights.get_sharded(f"{prefix}.weight", 1))
        if bias:
            fill(linear.bias, weights.get(f"{prefix}.bias"))
    return linear


def replicated(module: nn.Module, prefix: str, weights: WeightSource | None) -> nn.Module:
    """A module whose own parameters every rank holds whole."""
    if weights is not None:
        for name, parameter in module.named_parameters(recurse=False):
            fill(parameter, weights.get(f"{prefix}.{name}"))
    return module


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a tensor of the same shape into a parameter, in the parameter's dtype."""
    parameter.copy_(value)
