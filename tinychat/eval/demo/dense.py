"""Dense labels: what is known of the thing that covers each patch of a generated picture.

Beyond what a thing is and its colour, they tell how it stands among the others: its place, its order from the left,
whether it is the outermost or the largest, how many are like it. A language model that can look up a patch by one of
these and read another off it can then answer about extremes and counts as it answers about colours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinychat.eval.demo.scenes import CHARACTERS, COLOURS, GRID, IMAGE_SIZE, MAX_SHAPES, PATCH, SHAPES, Scene

BAR = 1 + len(SHAPES)
SHAPE_SIZES = (9.0, 11.0, 13.5, 17.0)  # pixels of a shape's radius: the borders between five sizes
BAR_SIZES = (16.0, 28.0, 42.0, 58.0)  # pixels of a bar's height, or of a character's
BETWEEN, FIRST, LAST, ALONE = 1, 2, 3, 4  # how a thing ranks among those of its sort

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape, a bar or a character: its box (left, top, right, bottom) in pixels, and its labels, none of them 0."""

    box: Box
    kind: int
    colour: int
    size: int
    place: int = 0
    order: int = 0
    down_order: int = 0
    extent_order: int = 0
    across: int = 0
    down: int = 0
    extent: int = 0
    like_colour: int = 0
    like_kind: int = 0

    @property
    def middle(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


# the channels of the labels and their classes; 0 is background
CLASSES: dict[str, int] = {
    "kind": BAR + 1 + len(CHARACTERS),
    "colour": 1 + len(COLOURS),
    "centre": 2,
    "size": 2 + len(SHAPE_SIZES),
    "place": 1 + 9,
    "order": 1 + MAX_SHAPES,
    "across": 1 + ALONE,
    "down": 1 + ALONE,
    "extent": 1 + ALONE,
    "like_colour": 1 + MAX_SHAPES,
    "like_kind": 1 + MAX_SHAPES,
    "total": 1 + MAX_SHAPES,
    "down_order": 1 + MAX_SHAPES,
    "extent_order": 1 + MAX_SHAPES,
}
CHANNELS = tuple(CLASSES)


def dense(scene: Scene) -> np.ndarray:
    """[len(CHANNELS), GRID, GRID] int64. `total`, the number of shapes, or else of bars, is told everywhere."""
    labels = np.zeros((len(CHANNELS), GRID, GRID), np.int64)
    shapes, bars, characters = list(_shapes(scene)), list(_bars(scene)), list(_characters(scene))
    for group in (shapes, bars, characters):
        for thing in _ranked(group):
            _mark(labels, thing)
    labels[CHANNELS.index("total")] = len(shapes) or len(bars)
    return labels


def _shapes(scene: Scene) -> Iterator[Thing]:
    for s in scene.shapes:
        reach = s.radius + PATCH * 0.25
        box = (s.x - reach, s.y - reach, s.x + reach, s.y + reach)
        yield Thing(box, 1 + SHAPES.index(s.kind), _colour(s.colour), _bucket(s.radius, SHAPE_SIZES))


def _bars(scene: Scene) -> Iterator[Thing]:
    for b in scene.bars:
        box = (b.left - 1, b.top - PATCH / 4, b.right + 1, b.bottom + PATCH / 4)
        yield Thing(box, BAR, _colour(b.colour), _bucket(b.height, BAR_SIZES))


def _characters(scene: Scene) -> Iterator[Thing]:
    if scene.lettering is None:
        return
    colour = _colour(scene.lettering.colour)
    for g in scene.lettering.glyphs:
        kind = BAR + 1 + CHARACTERS.index(g.character)
        yield Thing((g.left, g.top - 1, g.right, g.bottom + 1), kind, colour, _bucket(g.bottom - g.top, BAR_SIZES))


def _colour(name: str) -> int:
    return 1 + COLOURS.index(name)


def _bucket(value: float, borders: Sequence[float]) -> int:
    return 1 + sum(value > border for border in borders)


def _ranked(things: Sequence[Thing]) -> Iterator[Thing]:
    """The things with what only their company tells."""
    across = _order(things, lambda thing: thing.middle[0])
    down = _order(things, lambda thing: thing.middle[1])
    extent = _order(things, lambda thing: thing.box[1] - thing.box[3])
    count = len(things)
    for i, thing in enumerate(things):
        column, row = (min(2, max(0, int(v * 3 / IMAGE_SIZE))) for v in thing.middle)
        yield replace(
            thing,
            place=1 + 3 * row + column,
            order=across[i],
            down_order=down[i],
            extent_order=extent[i],
            across=_end(across[i], count),
            down=_end(down[i], count),
            extent=_end(extent[i], count),
            like_colour=sum(other.colour == thing.colour for other in things),
            like_kind=sum(other.kind == thing.kind for other in things),
        )


def _order(things: Sequence[Thing], value: Callable[[Thing], float]) -> list[int]:
    """From 1 for the lowest value to len(things)."""
    ranked = sorted(things, key=value)
    return [1 + ranked.index(thing) for thing in things]


def _end(order: int, count: int) -> int:
    if count == 1:
        return ALONE
    return FIRST if order == 1 else LAST if order == count else BETWEEN


def _mark(labels: np.ndarray, thing: Thing) -> None:
    left, top, right, bottom = thing.box
    (x, y), centres = thing.middle, (np.arange(GRID) + 0.5) * PATCH
    covered = (np.abs(centres - y) <= (bottom - top) / 2)[:, None] & (np.abs(centres - x) <= (right - left) / 2)[None]
    row, column = (min(GRID - 1, max(0, int(v // PATCH))) for v in (y, x))
    covered[row, column] = True
    for channel, name in enumerate(CHANNELS):
        if name not in ("centre", "total"):
            labels[channel][covered] = getattr(thing, name)
    labels[CHANNELS.index("centre"), row, column] = 1
