"""Group-wise quantized weights: the spec, the logical form (q, scale, zero), and AWQ's GEMM layout.

The logical form of a linear with K inputs and N outputs: `q` uint8 `[K, N]` in 0..2^bits-1, `scale` `[K/G, N]`,
`zero` uint8 `[K/G, N]`; the weight is `(q - zero) * scale`. In memory a model holds the AWQ GEMM layout, which
`to_logical` and `from_logical` convert; the layouts of other files are in `formats`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tinychat_kernels import words
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.words import AWQ_ORDER, PER_WORD

BITS = (3, 4, 8)
GROUP_SIZES = (32, 64, 128)
HALVES = (torch.float16, torch.bfloat16)
PER_ROW = -1  # as a group size: all inputs of an output are one group


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a linear is quantized: bits a weight, inputs a group (-1: all), and whether groups have a zero point."""

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise LayoutError(f"bits is {self.bits}; weights of 3, 4 and 8 bits are supported")
        if self.group_size not in (*GROUP_SIZES, PER_ROW):
            known = "groups of 32, 64 and 128, and -1 (a row is one group), are supported"
            raise LayoutError(f"group_size is {self.group_size}; {known}")

    @property
    def max_q(self) -> int:
        return 2**self.bits - 1

    def group(self, in_features: int) -> int:
        """Inputs a group. Raises LayoutError where groups do not divide the inputs."""
        size = in_features if self.group_size == PER_ROW else self.group_size
        if in_features % size:
            raise LayoutError(f"in_features={in_features} is not a multiple of group_size={size}")
        return size

    def groups(self, in_features: int) -> int:
        """Groups an output. Raises LayoutError where groups do not divide the inputs."""
        return in_features // self.group(in_features)

    def check(self, in_features: int, out_features: int) -> None:
        """Raise LayoutError where a linear of this size cannot be packed into 4-bit words."""
        self.group(in_features)
        if self.bits > 4:
            raise LayoutError(f"weights of {self.bits} bits do not fit into 4-bit words")
        if out_features % PER_WORD:
            raise LayoutError(f"out_features={out_features} is not a multiple of {PER_WORD}")


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
    return words.pack(q, AWQ_ORDER)


def unpack_awq(packed: Tensor) -> Tensor:
    """int32 `[R, N/8]` -> uint8 `[R, N]`, the inverse of pack_awq."""
    return words.unpack(packed, AWQ_ORDER)


def to_logical(packed: AwqGemm, spec: QuantSpec) -> Logical:
    """Disk form -> logical form. Raises LayoutError where the shapes contradict the spec."""
    rows, columns = packed.qweight.shape[0], packed.qweight.shape[1] * PER_WORD
    spec.check(rows, columns)
    groups = spec.groups(rows)
    wanted = {"qzeros": (groups, columns // PER_WORD), "scales": (groups, columns)}
    for name, shape in wanted.items():
        if tuple(found := getattr(packed, name).shape) != shape:
            raise LayoutError(f"{name} has shape {list(found)}, {list(shape)} is needed for {rows}x{columns} weights")
    return Logical(unpack_awq(packed.qweight), packed.scales, unpack_awq(packed.qzeros))


def from_logical(logical: Logical, spec: QuantSpec) -> AwqGemm:
    """Logical form -> disk form. Raises LayoutError for shapes or values that four bits cannot hold."""
    spec.check(*logical.q.shape)
    check_values(logical, spec)
    return AwqGemm(pack_awq(logical.q), pack_awq(logical.zero), logical.scale)


def check_values(logical: Logical, spec: QuantSpec) -> None:
    """Raise LayoutError where q or zero hold what the spec's bits do not."""
    for name in ("q", "zero"):
        top = int(getattr(logical, name).max())
        if top > spec.max_q:
            raise LayoutError(f"{name} holds {top}, at most {spec.max_q} fits in {spec.bits} bits")


def quantize(weight: Tensor, spec: QuantSpec) -> Logical:
    """Round a weight `[N, K]` (torch.nn.Linear's) to the nearest of each group; ranges are widened to hold zero.

    Asymmetric min-max as in AWQ (arXiv 2306.00978), with the group's range extended to 0: else a group whose values
    are all of one sign would be destroyed, since the zero point is clamped to 0..2^bits-1. Scales keep weight's dtype.
    """
    rows, columns = weight.shape[1], weight.shape[0]
    size = spec.group(rows)
    if not torch.isfinite(weight).all():
        raise LayoutError("the weight holds NaN or Inf values and cannot be quantized")
    groups = weight.float().T.reshape(-1, size, columns)
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
