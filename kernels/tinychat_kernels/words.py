"""4-bit values packed eight to an int32 word, in an order that is the format's; 8-bit values four to a word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PER_WORD = 8
PLAIN = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(q: Tensor, order: Sequence[int] = PLAIN) -> Tensor:
    """uint8 `[R, C]` in 0..15 -> int32 `[R, C/8]`: nibble i of a word holds column order[i] of its eight."""
    columns = q.reshape(q.shape[0], -1, PER_WORD)
    pairs = torch.empty((*columns.shape[:2], PER_WORD // 2), dtype=torch.uint8, device=q.device)
    for i in range(PER_WORD // 2):
        pairs[..., i] = columns[..., order[2 * i]] | (columns[..., order[2 * i + 1]] << 4)
    return pairs.view(torch.int32)[..., 0]


def unpack(packed: Tensor, order: Sequence[int] = PLAIN) -> Tensor:
    """int32 `[R, W]` -> uint8 `[R, 8*W]`, the inverse of pack."""
    columns = torch.empty((*packed.shape, PER_WORD), dtype=torch.uint8, device=packed.device)
    for i, column in enumerate(order):
        columns[..., column] = (packed >> (4 * i)).to(torch.uint8) & 0xF
    return columns.flatten(-2)


def pack_bytes(q: Tensor) -> Tensor:
    """uint8 `[R, C]` -> int32 `[R, C/4]`: byte i of a word, from the lowest, holds column i of its four."""
    return q.reshape(-1).view(torch.int32).reshape(len(q), -1)


def unpack_bytes(packed: Tensor) -> Tensor:
    """int32 `[R, W]` -> uint8 `[R, 4*W]`, the inverse of pack_bytes."""
    return packed.reshape(-1).view(torch.uint8).reshape(len(packed), -1)
