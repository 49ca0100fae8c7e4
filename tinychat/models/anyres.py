"""LLaVA-NeXT: the features of a picture's tiles become one sequence, read row by row across the tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from tinychat.errors import UsageError
from tinychat.tiling import Size, Tiling, margins


def pack_tiles(features: Tensor, tiling: Tiling, size: Size, newline: Tensor) -> Tensor:
    """Features `[tiles, n*n, D]` of a picture of this (height, width), newline `[D]` -> `[tiling.tokens(size), D]`.

    The whole picture comes first. One tile alone is that, and one newline. Raises UsageError for a wrong number.
    """
    whole, tiles = features[0], features[1:]
    if not len(tiles):
        return torch.cat((whole, newline[None].to(whole)))
    if len(features) != tiling.tiles(size):
        cut = f"a picture of {size[0]} x {size[1]} pixels is cut into {tiling.tiles(size)} tiles"
        raise UsageError(f"{cut}, {len(features)} came", "give each picture with its own height and width")
    (rows, columns), n = tiling.grid(size), tiling.patches
    grid = tiles.reshape(rows, columns, n, n, -1).transpose(1, 2).reshape(rows * n, columns * n, -1)
    vertical, horizontal = margins(size, (rows * n, columns * n))
    seen = grid[vertical : rows * n - vertical, horizontal : columns * n - horizontal]
    ends = newline.to(seen).expand(len(seen), 1, -1)
    return torch.cat((whole, torch.cat((seen, ends), dim=1).flatten(0, 1)))
