"""Pictures that wait for the next question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinychat.core import Image
from tinychat.terminal.clean import shown_name

Inspect = Callable[[Image], tuple[Image, int, int]]


@dataclass(frozen=True, slots=True)
class Staged:
    """A picture that was found readable, with its size in pixels."""

    image: Image
    width: int
    height: int

    def label(self, number: int) -> str:
        """As it is shown: `[image 1: cat.png, 640x480]`."""
        return f"[image {number}: {name_of(self.image)}, {self.width}x{self.height}]"


def inspect(image: Image) -> tuple[Image, int, int]:
    """The picture with its bytes and its digest, its width and its height, from its header. Raises MediaError."""
    from tinychat.inputs.images import image_size, load_image

    loaded = load_image(image)
    height, width = image_size(loaded)
    return loaded, width, height


def stage(images: Sequence[Image], inspect: Inspect) -> tuple[Staged, ...]:
    """All of the pictures, or MediaError for the first that cannot be read."""
    return tuple(Staged(*inspect(image)) for image in images)


def from_path(path: Path) -> Image:
    """The picture at a path, named absolutely: the working folder may change."""
    return Image(path=str(path.absolute()))


def name_of(image: Image) -> str:
    """The name of a picture's file, fit to be printed."""
    return "picture" if image.path is None else shown_name(image.path)
