"""The definition of every op, in plain torch. Runs on any device; every other backend is measured against it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tinychat_kernels.int8 import TOP, Int8, quantize_tokens
from tinychat_kernels.layout import AwqGemm, Logical, QuantSpec, dequantize, to_logical

SLICE = 1024  # output columns dequantized at a time: the float copy stays a few MB for any layer
FEWEST_ROWS = 32  # a GPU's product of integers takes no fewer than 17


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


def w8a8_linear(x: Tensor, packed: Int8, bias: Tensor | None = None) -> Tensor:
    """x `[M, K]` times 8-bit weights -> `[M, N]` in x's dtype: tokens become 8-bit ones, and their sums are exact.

    The sums are scaled, and the bias added, in fp32. A token that holds NaN or Inf gives NaN or Inf.
    """
    tokens, step = quantize_tokens(x)
    out = _integer_sums(tokens, packed.weight).float().mul_(step[:, None]).mul_(packed.scale.float())
    return (out if bias is None else out.add_(bias.float())).to(x.dtype)


def _integer_sums(x: Tensor, weight: Tensor) -> Tensor:
    """int8 `[M, K]` times int8 `[N, K]` -> `[M, N]`, exactly: in integers where torch can, else in float64."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    on_gpu = x.device.type == "cuda"
    if not _multiplies_integers(x.device.type) or (on_gpu and (inputs % 8 or outputs % 8)):
        return x.double() @ weight.double().T
    if on_gpu and rows < FEWEST_ROWS:
        return _product(torch.nn.functional.pad(x, (0, 0, 0, FEWEST_ROWS - rows)), weight)[:rows]
    return _product(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(x, weight.T)  # type: ignore[attr-defined]  # torch's stubs do not list it


@functools.cache
def _multiplies_integers(device: str) -> bool:
    """Whether torch's product of integers is there and exact: some processors saturate sums of two products."""
    try:
        extremes = torch.tensor([TOP, -TOP, -TOP - 1], dtype=torch.int8, device=device).repeat_interleave(8)
        rows = extremes[:, None].expand(24, 64).contiguous()
        found = _product(rows, rows)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(found.double(), rows.double() @ rows.double().T)
