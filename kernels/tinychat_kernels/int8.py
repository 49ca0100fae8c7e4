"""8-bit linears: a scale for each output of the weights, and one for each token of the activations.

Symmetric, in -127..127. On disk as compressed-tensors' int-quantized: weight int8 `[N, K]`, row-major, and its scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tinychat_kernels.errors import LayoutError

TOP = 127


class Int8(NamedTuple):
    """The weights of a linear: int8 `[N, K]`, and what one step of each row is worth, float `[N]`."""

    weight: Tensor
    scale: Tensor


def quantize_rows(weight: Tensor) -> Int8:
    """A weight `[N, K]` (torch.nn.Linear's), rounded to the nearest; scales are fp32. Raises LayoutError: NaN, Inf."""
    if not torch.isfinite(weight).all():
        raise LayoutError("the weight holds NaN or Inf values and cannot be quantized")
    return Int8(*_rounded(weight))


def quantize_tokens(x: Tensor) -> Int8:
    """[M, K] -> int8 `[M, K]` and fp32 `[M]`. A row that holds NaN or Inf has a scale that is none or infinite."""
    return Int8(*_rounded(x))


def dequantize_rows(packed: Int8, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` that the integers stand for."""
    return (packed.weight.float() * packed.scale.float()[:, None]).to(dtype)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = rows.float()
    scale = wide.abs().amax(1, keepdim=True) / TOP
    scale = torch.where(scale == 0, 1.0, scale)  # a row of zeros; NaN passes
    q = (wide / scale).round_().nan_to_num_(0).clamp_(-TOP, TOP)
    return q.to(torch.int8), scale[:, 0]
