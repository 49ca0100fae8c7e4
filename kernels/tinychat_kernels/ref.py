"""The definition of every op, in plain torch. Runs on any device; every other backend is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from tinychat_kernels.layout import AwqGemm, Logical, QuantSpec, dequantize, to_logical

SLICE = 1024  # output columns dequantized at a time: the float copy stays a few MB for any layer


def w4_linear(x: Tensor, packed: AwqGemm, spec: QuantSpec, bias: Tensor | None = None) -> Tensor:
    """x `[M, K]` times 4-bit weights -> `[M, N]` in x's dtype; the weight is dequantized in slices of columns."""
    columns = packed.scales.shape[1]
    out = [_slice(x, packed, spec, start) for start in range(0, columns, SLICE)]
    result = torch.cat(out, dim=1) if len(out) > 1 else out[0]
    return result if bias is None else result + bias.to(result.dtype)


def _slice(x: Tensor, packed: AwqGemm, spec: QuantSpec, start: int) -> Tensor:
    words = slice(start // 8, (start + SLICE) // 8)
    part = AwqGemm(packed.qweight[:, words], packed.qzeros[:, words], packed.scales[:, start : start + SLICE])
    logical: Logical = to_logical(part, spec)
    return torch.nn.functional.linear(x, dequantize(logical, x.dtype))
