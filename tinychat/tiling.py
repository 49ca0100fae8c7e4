"""LLaVA-NeXT's pictures of any resolution: which tiles one is cut into, and how many tokens it becomes.

Sizes and grids are (height, width). A picture is shown to the tower whole, squeezed to one tile, and again at the
resolution that fits it best, cut into tiles; of those the padding is dropped, and a newline ends every row of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinychat.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Size = tuple[int, int]


def select_best_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution that keeps most of a picture's pixels, and of several the one with the least padding."""
    height, width = size

    def fit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=fit)


def margins(size: Size, grid: Size) -> Size:
    """Rows and columns of padding on each side of `grid`, into which a picture of `size` was fitted."""
    (height, width), (rows, columns) = size, grid
    if width * rows > columns * height:
        return (rows - height * columns // width) // 2, 0
    return 0, (columns - width * rows // height) // 2


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of `side` pixels and `patches` features along a side; `resolutions` are what they may cover together."""

    resolutions: tuple[Size, ...]
    side: int
    patches: int

    def __post_init__(self) -> None:
        wrong = [f"{h}x{w}" for h, w in self.resolutions if min(h, w) < 1 or h % self.side or w % self.side]
        if wrong or not self.resolutions:
            found = f"{', '.join(wrong)} in image_grid_pinpoints" if wrong else "an empty image_grid_pinpoints"
            raise ModelError(f"the config has {found}", f"the tower's tiles have {self.side} pixels a side: multiples")

    def grid(self, size: Size) -> Size:
        """Rows and columns of tiles for a picture, without the one that shows it whole."""
        height, width = select_best_resolution(size, self.resolutions)
        return height // self.side, width // self.side

    def tiles(self, size: Size) -> int:
        """Tiles of a picture, the one that shows it whole among them."""
        rows, columns = self.grid(size)
        return 1 + rows * columns

    def tokens(self, size: Size) -> int:
        """Tokens of a picture: the whole one, then rows of features without padding, a newline after each."""
        rows, columns = self.grid(size)
        grid = (rows * self.patches, columns * self.patches)
        vertical, horizontal = margins(size, grid)
        return self.patches**2 + (grid[0] - 2 * vertical) * (grid[1] - 2 * horizontal + 1)

    @property
    def most_tiles(self) -> int:
        return max(self.tiles(resolution) for resolution in self.resolutions)

    @property
    def most_tokens(self) -> int:
        """Tokens of the picture that takes most: one shaped as one of the resolutions."""
        return max(self.tokens(resolution) for resolution in self.resolutions)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Pictures for a tower: the tiles of each `[tiles, 3, S, S]`, the whole one first, and each one's own size."""

    pixels: tuple[Tensor, ...]
    sizes: tuple[Size, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, where: torch.device | torch.dtype | str) -> Tiles:
        """The same on a device, or in a dtype."""
        return Tiles(tuple(pixels.to(where) for pixels in self.pixels), self.sizes)
