"""What a generated picture shows, apart from how it is drawn: shapes, lettering, bars and a background.

Coordinates are pixels of an IMAGE_SIZE square; the painters scale them as they need.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

IMAGE_SIZE = 96
PATCH = 12
GRID = IMAGE_SIZE // PATCH

Rgb = tuple[int, int, int]

ANCHORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (200, 35, 35), (235, 65, 60)),
    "green": ((0, 128, 0), (40, 180, 70), (60, 205, 50), (0, 220, 40)),
    "blue": ((0, 0, 255), (45, 85, 215), (60, 120, 235)),
    "yellow": ((255, 255, 0), (235, 210, 45), (255, 225, 70)),
    "purple": ((128, 0, 128), (150, 60, 185), (120, 40, 170)),
    "orange": ((255, 140, 0), (240, 135, 35), (255, 160, 40)),
    "black": ((0, 0, 0), (40, 40, 40), (20, 20, 25)),
    "gray": ((128, 128, 128), (150, 150, 150), (115, 118, 122)),
}
COLOURS = tuple(ANCHORS)
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
# the area of each shape of radius 1
AREAS = {"circle": 3.14, "square": 3.24, "triangle": 1.76, "star": 1.44, "cross": 2.26, "heart": 2.21}
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

MAX_SHAPES = 5
WORDS = (
    "cat", "dog", "cup", "hat", "sun", "sky", "sea", "box", "bus", "car", "key", "map", "pen", "pin", "pot", "fox",
    "owl", "bee", "cow", "hen", "pig", "ant", "bat", "egg", "jam", "tea", "ice", "oil", "bag", "bed", "bow", "jar",
    "leg", "arm", "ear", "eye", "lip", "toe", "fig", "nut", "pea", "rye", "ham", "pie", "bun", "sax", "zip", "web",
    "wax", "van", "tub", "tap", "rug", "ram", "rod", "fish", "bird", "tree", "leaf", "lake", "moon", "rain", "snow",
    "wind", "fire", "gold", "iron", "jazz", "king", "lion", "milk", "nest", "park", "quiz", "road", "ship", "sofa",
    "wolf", "yoga", "zoo", "desk", "door", "duck", "farm", "film", "frog", "game", "gate", "goat", "hand", "harp",
    "home", "hook", "kite", "lamp", "mask", "maze", "menu", "nose", "oven", "path", "pear", "pond", "rice", "ring",
    "rope", "salt", "sand", "seed", "shoe", "silk", "soap", "sock", "soup", "stop", "exit", "open", "taxi", "tent",
    "tide", "toy", "vase", "wave", "go", "up", "ok", "ox", "pi", "we", "my", "us",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """One filled shape; `radius` is half its size, `angle` in degrees."""

    kind: str
    colour: str
    rgb: Rgb
    x: float
    y: float
    radius: float
    angle: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.kind

    def clearly_larger(self, other: Shape) -> bool:
        """Whether both its width and its area are well above the other's."""
        wider = self.radius >= 1.15 * other.radius
        return wider and AREAS[self.kind] * self.radius**2 >= 1.2 * AREAS[other.kind] * other.radius**2


@dataclass(frozen=True, slots=True)
class Glyph:
    """One drawn character and the box it covers."""

    character: str
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Lettering:
    """A number or a word. `warp` maps output to source coordinates (PIL's affine order) or is None."""

    text: str
    colour: str
    rgb: Rgb
    glyphs: tuple[Glyph, ...]
    size: int
    stroke: int
    warp: tuple[float, ...] | None
    face: str

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart."""

    colour: str
    rgb: Rgb
    left: float
    top: float
    right: float
    bottom: float

    @property
    def height(self) -> float:
        return self.bottom - self.top


@dataclass(frozen=True, slots=True)
class Background:
    """Two colours, and how they mix: `plain`, `gradient`, or a pattern of the held-out painter."""

    kind: str
    first: Rgb
    second: Rgb


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of one picture."""

    background: Background
    shapes: tuple[Shape, ...] = ()
    lettering: Lettering | None = None
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Style:
    """How one family of pictures differs from another: composing and painting are its functions."""

    background: Callable[[random.Random], Background]
    anchors: dict[str, tuple[Rgb, ...]]
    jitter: int
    tilt: float
    radii: dict[int, tuple[float, float]]
    words: tuple[str, ...]
    lettering: Callable[[random.Random, str, str, Rgb], Lettering]
    paint: Callable[[random.Random, Scene], np.ndarray]


def mix(rng: random.Random, anchors: tuple[Rgb, ...], jitter: int) -> Rgb:
    """A colour between two anchors, off by at most `jitter` a channel."""
    a, b, t = rng.choice(anchors), rng.choice(anchors), rng.random()
    return tuple(  # type: ignore[return-value]
        min(255, max(0, round(u + (v - u) * t) + rng.randint(-jitter, jitter))) for u, v in zip(a, b, strict=True)
    )


def visible(rgb: Rgb, background: Background) -> bool:
    """Whether a colour stands out from both colours of the background."""
    return all(math.dist(rgb, other) > 95 for other in (background.first, background.second))


def ink(rng: random.Random, style: Style, background: Background, colour: str | None = None) -> tuple[str, Rgb]:
    """A colour name and a tone of it that can be seen; another colour is taken where the wished one cannot."""
    for attempt in range(200):
        name = colour if colour is not None and attempt < 20 else rng.choice(COLOURS)
        rgb = mix(rng, style.anchors[name], style.jitter)
        if visible(rgb, background):
            return name, rgb
    raise AssertionError(f"no colour is visible on {background}")


def compose_shapes(rng: random.Random, style: Style, count: int, top: float = 0.0) -> Scene:
    """A scene of `count` shapes that do not touch, in the part of the picture below `top`."""
    background = style.background(rng)
    kinds, palette = _pool(rng, SHAPES, 2, count), _pool(rng, COLOURS, 3, count)
    shapes: tuple[Shape, ...] = ()
    while len(shapes) < count:
        free = _place(rng, style, shapes, count, top)
        if free is None:
            shapes = shapes[:-1]
            continue
        x, y, radius = free
        colour, rgb = ink(rng, style, background, palette[len(shapes)])
        shapes += (Shape(kinds[len(shapes)], colour, rgb, x, y, radius, rng.uniform(-style.tilt, style.tilt)),)
    return Scene(background, shapes)


def _pool(rng: random.Random, known: tuple[str, ...], few: int, count: int) -> list[str]:
    """`count` names: all different, or from few, or any."""
    chance = rng.random()
    if chance < 0.35:
        return rng.sample(known, count)
    return rng.choices(rng.sample(known, few) if chance < 0.55 else known, k=count)


def _place(
    rng: random.Random, style: Style, shapes: tuple[Shape, ...], count: int, top: float
) -> tuple[float, float, float] | None:
    low, high = style.radii[count]
    for _ in range(60):
        radius = min(rng.uniform(low, high), (IMAGE_SIZE - top) / 2 - 3)
        x = rng.uniform(radius + 2, IMAGE_SIZE - radius - 2)
        y = rng.uniform(top + radius + 2, IMAGE_SIZE - radius - 2)
        if all(math.hypot(x - s.x, y - s.y) > (radius + s.radius) * 1.12 + 2 for s in shapes):
            return x, y, radius
    return None


def change(rng: random.Random, style: Style, scene: Scene) -> tuple[Scene, tuple[str, int]]:
    """The scene with one difference, which kind (`colour`, `shape`, `missing` or `none`), and the shape's index."""
    index, kind = rng.randrange(len(scene.shapes)), rng.choice(("colour", "shape", "missing", "none"))
    old = scene.shapes[index]
    rest = scene.shapes[:index], scene.shapes[index + 1 :]
    if kind == "missing":
        return replace(scene, shapes=rest[0] + rest[1]), (kind, index)
    new = old
    while kind == "colour" and new.colour == old.colour:
        colour, rgb = ink(rng, style, scene.background)
        new = replace(old, colour=colour, rgb=rgb)
    if kind == "shape":
        new = replace(old, kind=rng.choice([k for k in SHAPES if k != old.kind]))
    return replace(scene, shapes=(*rest[0], new, *rest[1])), (kind, index)


def compose_lettering(rng: random.Random, style: Style) -> Scene:
    """A number, or a word."""
    background = style.background(rng)
    text = number(rng) if rng.random() < 0.5 else word(rng, style.words)
    colour, rgb = ink(rng, style, background, rng.choice(COLOURS))
    return Scene(background, lettering=style.lettering(rng, text, colour, rgb))


def number(rng: random.Random) -> str:
    """One to three digits, no leading zero unless alone."""
    digits = rng.choice((1, 2, 2, 3, 3, 3))
    return str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def word(rng: random.Random, words: tuple[str, ...]) -> str:
    """A short word in small or capital letters, or a few letters that make no word."""
    chance = rng.random()
    if chance < 0.3:
        return "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.choice((1, 2, 3))))
    if chance < 0.5:
        return (
            rng.choice("bdghkmnprstwz")
            + rng.choice("aeou")
            + "".join(rng.choices("bcdefgkmnpqrstuvxyz", k=rng.choice((1, 2))))
        )
    chosen = rng.choice(words)
    return chosen.upper() if rng.random() < 0.5 else chosen


def compose_chart(rng: random.Random, style: Style) -> Scene:
    """Two to four bars of different colours and clearly different heights."""
    background = style.background(rng)
    count = rng.choice((2, 3, 3, 4, 4))
    inks: dict[str, Rgb] = {}
    while len(inks) < count:
        inks.update([ink(rng, style, background)])
    bottom, step = rng.uniform(78, 90), rng.uniform(62, 84) / count
    left, tallest = rng.uniform(6, 88 - step * count), rng.uniform(48, bottom - 6)
    heights = _heights(rng, count, tallest)
    width = step * rng.uniform(0.55, 0.85)
    bars = tuple(
        Bar(colour, rgb, left + i * step, bottom - height, left + i * step + width, bottom)
        for i, ((colour, rgb), height) in enumerate(zip(inks.items(), heights, strict=True))
    )
    return Scene(background, bars=bars)


def _heights(rng: random.Random, count: int, tallest: float) -> list[float]:
    while True:
        heights = [rng.uniform(8, tallest) for _ in range(count)]
        ranked = sorted(heights)
        if all(b - a >= 6 for a, b in zip(ranked, ranked[1:], strict=False)):
            return heights


def compose_mixed(rng: random.Random, style: Style) -> Scene:
    """A short number or word in the upper part and one to three shapes below."""
    scene = compose_shapes(rng, style, rng.choice((1, 1, 2, 3)), top=44.0)
    text = number(rng) if rng.random() < 0.6 else word(rng, style.words)
    colour, rgb = ink(rng, style, scene.background, rng.choice(COLOURS))
    lettering = style.lettering(rng, text, colour, rgb)
    lowest = max(glyph.bottom for glyph in lettering.glyphs)
    return replace(scene, lettering=lettering) if lowest < 46 else scene
