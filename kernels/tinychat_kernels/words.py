"""4-bit values packed eight to an int32 word; the order of a word's nibbles is the format's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PER_WORD = 8
PLAIN = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(q: Tensor, order: Sequence[int] = PLAIN) -> Tensor:
    """uint8 `[R, C]` in 0..15 -> int32 `[R, C/8]`: nibble i of a word holds column order[i] of its eight."""
    words = q.reshape(q.shape[0], -1, PER_WORD)
    pairs = words[..., list(order[0::2])] | (words[..., list(order[1::2])] << 4)
    return pairs.contiguous().view(torch.int32)[..., 0]


def unpack(packed: Tensor, order: Sequence[int] = PLAIN) -> Tensor:
    """int32 `[R, W]` -> uint8 `[R, 8*W]`, the inverse of pack."""
    pairs = packed.contiguous()[..., None].view(torch.uint8)
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), -1).flatten(-2)
    return nibbles[..., [order.index(column) for column in range(PER_WORD)]].flatten(-2)
