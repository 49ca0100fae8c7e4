"""The bytes of packed weights, read back: exactly what went in. csrc/cpu/blocks.h says how they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from tinychat_kernels.cpu import Packed
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import Logical, QuantSpec

LANES = 16  # outputs of a block
LINE = 64
MIDDLE = 128  # what 8-bit weights are stored with


def unpack(packed: Packed, spec: QuantSpec) -> Logical:
    """Blocks of 4 bits -> (q, scale, zero) of the spec's groups. Raises LayoutError for 8-bit blocks."""
    if packed.bits != 4:
        raise LayoutError(f"the blocks hold weights of {packed.bits} bits, not of 4")
    blocks = _blocks(packed)
    lines = blocks[..., _header(packed) :].unflatten(-1, (-1, LANES, 4))  # 8 inputs, the fifth above the first
    halves = torch.stack([lines & 15, lines >> 4], -2)  # [outputs/16, groups, lines, 16, 2, 4]
    q = halves.permute(1, 2, 4, 5, 0, 3).reshape(packed.in_features, -1)[:, : packed.out_features]
    step = spec.group(packed.in_features) // packed.group  # blocks that repeat one group's scale and zero point
    zero = _rows(blocks[..., :LANES], packed)[::step]
    return Logical(q.contiguous(), _scales(blocks, packed)[::step].contiguous(), zero.contiguous())


def unpack_int8(packed: Packed) -> tuple[Tensor, Tensor]:
    """Blocks of 8 bits -> int8 `[N, K]` and scales `[N, groups]`. Raises LayoutError for 4-bit blocks."""
    if packed.bits != 8:
        raise LayoutError(f"the blocks hold weights of {packed.bits} bits, not of 8")
    blocks = _blocks(packed)
    lines = blocks[..., _header(packed) :].unflatten(-1, (-1, LANES, 4))  # 4 inputs
    inputs = lines.permute(0, 3, 1, 2, 4).flatten(3)[..., : packed.group]  # the last line may be padded
    rows = inputs.reshape(-1, packed.in_features)[: packed.out_features]
    return (rows.short() - MIDDLE).to(torch.int8), _scales(blocks, packed).T.contiguous()


def _blocks(packed: Packed) -> Tensor:
    """[outputs/16, groups, bytes of a block]."""
    groups = packed.in_features // packed.group
    return packed.blocks.view(-(-packed.out_features // LANES), groups, -1)


def _header(packed: Packed) -> int:
    return 2 * LINE if packed.scale == torch.float32 else LINE


def _scales(blocks: Tensor, packed: Packed) -> Tensor:
    size = packed.scale.itemsize
    first = 64 if packed.scale == torch.float32 else 32
    return _rows(blocks[..., first : first + LANES * size].contiguous().view(packed.scale), packed)


def _rows(values: Tensor, packed: Packed) -> Tensor:
    """[outputs/16, groups, 16] -> `[groups, N]`."""
    return values.transpose(0, 1).flatten(1)[:, : packed.out_features]
