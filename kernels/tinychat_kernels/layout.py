"""4-bit group-wise weights: the spec, the logical form (q, scale, zero), and the layouts on disk.

The logical form of a linear with K inputs and N outputs: `q` uint8 `[K, N]` in 0..2^bits-1, `scale` `[K/G, N]`,
`zero` uint8 `[K/G, N]`; the weight is `(q - zero) * scale`. `to_logical` and `from_logical` are the only converters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tinychat_kernels.errors import LayoutError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column AWQ_ORDER[i] of its eight
_PER_WORD = 8


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a linear is quantized: bits a weight, inputs a group, and whether groups have their own zero point."""

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (3, 4):
            raise LayoutError(f"bits is {self.bits}; weights of 3 and 4 bits are supported")
        if self.group_size not in (32, 64, 128):
            raise LayoutError(f"group_size is {self.group_size}; groups of 32, 64 and 128 are supported")

    @property
    def max_q(self) -> int:
        return 2**self.bits - 1

    def check(self, in_features: int, out_features: int) -> None:
        """Raise LayoutError where a linear of this size cannot be held."""
        if in_features % self.group_size:
            raise LayoutError(f"in_features={in_features} is not a multiple of group_size={self.group_size}")
        if out_features % _PER_WORD:
            raise LayoutError(f"out_features={out_features} is not a multiple of {_PER_WORD}")


class Logical(NamedTuple):
    """(q, scale, zero) of a quantized linear: uint8 `[K, N]`, float `[K/G, N]`, uint8 `[K/G, N]`."""

    q: Tensor
    scale: Tensor
    zero: Tensor


class AwqGemm(NamedTuple):
    """AutoAWQ's GEMM layout: qweight int32 `[K, N/8]`, qzeros int32 `[K/G, N/8]`, scales `[K/G, N]`."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def pack_awq(q: Tensor) -> Tensor:
    """uint8 `[R, N]` in 0..15 -> int32 `[R, N/8]`, columns of a word in AWQ_ORDER."""
    words = q.reshape(q.shape[0], -1, _PER_WORD)[..., list(AWQ_ORDER)].to(torch.int32)
    packed = torch.zeros(words.shape[:2], dtype=torch.int32, device=q.device)
    for i in range(_PER_WORD):
        packed |= words[..., i] << (4 * i)
    return packed


def unpack_awq(packed: Tensor) -> Tensor:
    """int32 `[R, N/8]` -> uint8 `[R, N]`, the inverse of pack_awq."""
    q = torch.empty((*packed.shape, _PER_WORD), dtype=torch.uint8, device=packed.device)
    for i, column in enumerate(AWQ_ORDER):
        q[..., column] = (packed >> (4 * i)) & 0xF
    return q.reshape(packed.shape[0], -1)


def to_logical(packed: AwqGemm, spec: QuantSpec) -> Logical:
    """Disk form -> logical form. Raises LayoutError where the shapes contradict the spec."""
    rows, columns = packed.qweight.shape[0], packed.qweight.shape[1] * _PER_WORD
    spec.check(rows, columns)
    groups = rows // spec.group_size
    wanted = {"qzeros": (groups, columns // _PER_WORD), "scales": (groups, columns)}
    for name, shape in wanted.items():
        if tuple(found := getattr(packed, name).shape) != shape:
            raise LayoutError(f"{name} has shape {list(found)}, {list(shape)} is needed for {rows}x{columns} weights")
    return Logical(unpack_awq(packed.qweight), packed.scales, unpack_awq(packed.qzeros))


def from_logical(logical: Logical, spec: QuantSpec) -> AwqGemm:
    """Logical form -> disk form. Raises LayoutError for shapes or values that four bits cannot hold."""
    spec.check(*logical.q.shape)
    for name in ("q", "zero"):
        top = int(getattr(logical, name).max())
        if top > spec.max_q:
            raise LayoutError(f"{name} holds {top}, at most {spec.max_q} fits in {spec.bits} bits")
    return AwqGemm(pack_awq(logical.q), pack_awq(logical.zero), logical.scale)


def quantize(weight: Tensor, spec: QuantSpec) -> Logical:
    """Round a weight `[N, K]` (torch.nn.Linear's) to the nearest of each group; ranges are widened to hold zero.

    Asymmetric min-max as in AWQ (arXiv 2306.00978), with the group's range extended to 0: else a group whose values
    are all of one sign would be destroyed, since the zero point is clamped to 0..2^bits-1. Scales keep weight's dtype.
    """
    rows, columns = weight.shape[1], weight.shape[0]
    spec.check(rows, columns)
    if not torch.isfinite(weight).all():
        raise LayoutError("the weight holds NaN or Inf values and cannot be quantized")
    groups = weight.float().T.reshape(-1, spec.group_size, columns)
    low, high = _range(groups, spec)
    scale = ((high - low) / spec.max_q).to(weight.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # an all-zero group
    zero = (-low / scale.float()).round().clamp(0, spec.max_q)
    q = (groups / scale.float()[:, None] + zero[:, None]).round().clamp(0, spec.max_q)
    return Logical(q.to(torch.uint8).reshape(rows, columns), scale, zero.to(torch.uint8))


def _range(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    if spec.zero_point:
        return groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    top = groups.abs().amax(1)
    return -top * ((spec.max_q + 1) / (spec.max_q - 1)), top  # zero lands on 2^(bits-1)


def dequantize(logical: Logical, dtype: torch.dtype | None = None) -> Tensor:
    """The weight `[N, K]` that a quantized linear stands for, in scale's dtype or the one asked for."""
    dtype = dtype or logical.scale.dtype
    group = logical.q.shape[0] // logical.scale.shape[0]
    zero = logical.zero.repeat_interleave(group, 0).to(dtype)
    return ((logical.q.to(dtype) - zero) * logical.scale.to(dtype).repeat_interleave(group, 0)).T
