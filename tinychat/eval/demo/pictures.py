"""The painter of training and validation pictures: PIL at twice the size, then scaled down and worn a little."""

from __future__ import annotations

import io
import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tinychat.eval.demo import strokes
from tinychat.eval.demo.scenes import (
    ANCHORS,
    IMAGE_SIZE,
    WORDS,
    Background,
    Glyph,
    Lettering,
    Rgb,
    Scene,
    Shape,
    Style,
    mix,
)

SCALE = 2
_TINTS: tuple[Rgb, ...] = (
    (255, 225, 225),
    (225, 245, 225),
    (222, 232, 255),
    (255, 250, 215),
    (240, 226, 250),
    (255, 235, 215),
    (215, 240, 242),
)
_LIGHTS: tuple[Rgb, ...] = ((255, 255, 255), (225, 225, 225))
_DARKS: tuple[Rgb, ...] = ((0, 0, 0), (25, 28, 45), (40, 30, 30), (20, 40, 40))


def _regular(corners: int, inner: float | None = None) -> list[tuple[float, float]]:
    radii = [1.0] if inner is None else [1.0, inner]
    total = corners * len(radii)
    turns = [(radii[k % len(radii)], 2 * math.pi * k / total - math.pi / 2) for k in range(total)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in turns]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * k / 40 for k in range(40)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


_T = 0.34
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(40),
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0.0, -0.95), (0.98, 0.85), (-0.98, 0.85)],
    "star": [(1.08 * x, 1.08 * y) for x, y in _regular(5, 0.42)],
    "cross": [
        (-_T, -1), (_T, -1), (_T, -_T), (1, -_T), (1, _T), (_T, _T),
        (_T, 1), (-_T, 1), (-_T, _T), (-1, _T), (-1, -_T), (-_T, -_T),
    ],
    "heart": _heart(),
}  # fmt: skip


def corners(shape: Shape, scale: float, stretch: float = 1.0) -> list[tuple[float, float]]:
    """The polygon of a shape in pixels of a picture `scale` times IMAGE_SIZE."""
    a, r = math.radians(shape.angle), shape.radius * scale
    cos, sin = r * math.cos(a), r * math.sin(a)
    cx, cy = shape.x * scale, shape.y * scale
    return [(cx + x * cos * stretch - y * sin, cy + x * sin * stretch + y * cos) for x, y in OUTLINES[shape.kind]]


def background(rng: random.Random) -> Background:
    """Mostly light and plain, sometimes tinted, graded, patchy or dark."""
    chance = rng.random()
    if chance < 0.12:
        first = mix(rng, _DARKS, 6)
        return Background("plain", first, first)
    first = mix(rng, _TINTS if rng.random() < 0.4 else _LIGHTS, 4)
    if chance < 0.3:
        return Background("gradient", first, mix(rng, _TINTS + _LIGHTS, 4))
    if chance < 0.42:
        return Background("mosaic", first, tuple(max(0, v - rng.randint(5, 25)) for v in first))  # type: ignore[arg-type]
    return Background("plain", first, first)


@lru_cache(maxsize=256)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface that comes inside Pillow."""
    face = ImageFont.load_default(size)
    assert isinstance(face, ImageFont.FreeTypeFont)
    return face


FACES = {"smooth": 0.55, "coarse": 0.15, "plotted": 0.15, "serif": 0.15}


@lru_cache(maxsize=8192)
def extent(character: str, size: int, stroke: int, face: str) -> tuple[float, tuple[float, float, float, float]]:
    """How far a character advances, and the box of its ink from its origin, in pixels of the large picture."""
    if face in ("plotted", "serif"):
        return strokes.extent(character, size, stroke, face == "serif")
    _, top, right, bottom = font(size).getbbox(character, stroke_width=stroke)
    return font(size).getlength(character) + stroke, (0.0, top, right, bottom)


def lettering(rng: random.Random, text: str, colour: str, rgb: Rgb) -> Lettering:
    """Text of a random face, size, weight, spacing and slant, at a random place."""
    room = (IMAGE_SIZE - 8) * SCALE
    size = rng.randint(48, max(52, min(104, int(room / (0.64 * len(text))))))
    stroke, tracking = rng.choice((0, 0, 0, 1, 1, 2)), rng.uniform(0, 5)
    face = rng.choices(tuple(FACES), tuple(FACES.values()))[0]
    widths = [extent(c, size, stroke, face)[0] + tracking for c in text]
    top, bottom = (f(extent(c, size, stroke, face)[1][i] for c in text) for f, i in ((min, 1), (max, 3)))
    x = rng.uniform(4, max(5.0, IMAGE_SIZE * SCALE - sum(widths) - 4))
    y = rng.uniform(4, max(5.0, IMAGE_SIZE * SCALE - (bottom - top) - 4)) - top
    glyphs = []
    for character, width in zip(text, widths, strict=True):
        box = extent(character, size, stroke, face)[1]
        glyphs.append(Glyph(character, x / SCALE, (y + box[1]) / SCALE, (x + width) / SCALE, (y + box[3]) / SCALE))
        x += width
    laid = tuple(glyphs)
    warp = None if rng.random() < 0.4 else fitting_slant(rng, laid)
    if warp is not None:
        laid = tuple(moved(glyph, warp) for glyph in laid)
    return Lettering(text, colour, rgb, laid, size, stroke, warp, face)


def fitting_slant(rng: random.Random, glyphs: tuple[Glyph, ...]) -> tuple[float, ...] | None:
    """A slant that keeps all glyphs in the picture, or None where a few tries found none."""
    for _ in range(4):
        warp = slant(rng, glyphs, rng.uniform(-9, 9), rng.uniform(-0.2, 0.2))
        boxes = [moved(glyph, warp) for glyph in glyphs]
        low = min(min(box.left, box.top) for box in boxes)
        if low > 2 and max(max(box.right, box.bottom) for box in boxes) < IMAGE_SIZE - 2:
            return warp
    return None


def slant(rng: random.Random, glyphs: tuple[Glyph, ...], angle: float, shear: float) -> tuple[float, ...]:
    """An affine map, output to source, that turns and shears about the middle of the text."""
    cx, cy = (glyphs[0].left + glyphs[-1].right) / 2, (glyphs[0].top + glyphs[0].bottom) / 2
    wide, high = rng.uniform(0.85, 1.35), rng.uniform(0.9, 1.15)
    a = math.radians(angle)
    m = (math.cos(a) * wide, (math.sin(a) + shear) * wide, -math.sin(a) * high, math.cos(a) * high)
    return m[0], m[1], cx - m[0] * cx - m[1] * cy, m[2], m[3], cy - m[2] * cx - m[3] * cy


def moved(glyph: Glyph, warp: tuple[float, ...]) -> Glyph:
    """The upright box of a glyph after the picture is warped."""
    a, b, c, d, e, f = warp
    x, y = (glyph.left + glyph.right) / 2 - c, (glyph.top + glyph.bottom) / 2 - f
    det = a * e - b * d
    u, v = (e * x - b * y) / det, (a * y - d * x) / det
    w, h = (glyph.right - glyph.left) / 2 * abs(e / det), (glyph.bottom - glyph.top) / 2 * abs(a / det)
    return Glyph(glyph.character, u - w, v - h, u + w, v + h)


def unmoved(glyph: Glyph, warp: tuple[float, ...]) -> tuple[float, float]:
    """Where the left top corner of a warped glyph's box was before."""
    a, b, c, d, e, f = warp
    u, v = (glyph.left + glyph.right) / 2, (glyph.top + glyph.bottom) / 2
    x, y = a * u + b * v + c, d * u + e * v + f
    det = a * e - b * d
    return x - (glyph.right - glyph.left) / 2 * abs(det / e), y - (glyph.bottom - glyph.top) / 2 * abs(det / a)


def paint(rng: random.Random, scene: Scene) -> np.ndarray:
    """[IMAGE_SIZE, IMAGE_SIZE, 3] uint8."""
    return worn(rng, render(rng, scene, SCALE).reduce(SCALE))


def render(rng: random.Random, scene: Scene, scale: int, vary: bool = True) -> Image.Image:
    """The scene drawn `scale` times as large; `vary` gives some pictures bands, some shapes edges or a stretch."""
    picture = _canvas(rng, scene.background, IMAGE_SIZE * scale)
    draw = ImageDraw.Draw(picture)
    if vary and rng.random() < 0.05:
        _draw_bands(rng, draw, scene, scale)
    edge = vary and rng.random() < 0.2
    for shape in scene.shapes:
        dark = tuple(v * 3 // 5 for v in shape.rgb) if edge else None
        stretch = rng.uniform(0.92, 1.08) if vary else 1.0
        draw.polygon(corners(shape, scale, stretch), fill=shape.rgb, outline=dark, width=scale)
    _draw_bars(rng, draw, scene, scale)
    if scene.lettering is not None:
        _draw_lettering(picture, scene.lettering, scale)
    return picture


def _draw_bands(rng: random.Random, draw: ImageDraw.ImageDraw, scene: Scene, scale: int) -> None:
    """Gray bands on two sides, where nothing is drawn: what padding makes of a picture that is not square."""
    boxes = [(s.x - s.radius, s.y - s.radius, s.x + s.radius, s.y + s.radius) for s in scene.shapes]
    boxes += [(g.left, g.top, g.right, g.bottom) for g in (scene.lettering.glyphs if scene.lettering else ())]
    if scene.bars or not boxes:
        return
    axis, side = rng.randrange(2), IMAGE_SIZE * scale
    free = min(min(min(box[axis], IMAGE_SIZE - box[axis + 2]) for box in boxes) - 3, IMAGE_SIZE / 4)
    if free > 2:
        tone, width = (rng.randint(105, 135),) * 3, int(free * scale)
        near, far = ([0, 0, side, width], [0, side - width, side, side])
        for band in (near, far):
            draw.rectangle(band if axis else [band[1], band[0], band[3], band[2]], fill=tone)


def _canvas(rng: random.Random, ground: Background, side: int) -> Image.Image:
    if ground.kind == "plain":
        return Image.new("RGB", (side, side), ground.first)
    mask = _mosaic(rng, side) if ground.kind == "mosaic" else Image.linear_gradient("L").resize((side, side))
    if rng.random() < 0.5:
        mask = mask.transpose(Image.Transpose.ROTATE_90)
    first, second = (Image.new("RGB", (side, side), c) for c in (ground.first, ground.second))
    return Image.composite(second, first, mask)


def _mosaic(rng: random.Random, side: int) -> Image.Image:
    """Random patches, sharp or soft, of a random size."""
    across, down = rng.randint(2, 24), rng.randint(2, 24)
    small = Image.frombytes("L", (across, down), rng.randbytes(across * down))
    return small.resize((side, side), rng.choice((Image.Resampling.NEAREST, Image.Resampling.BILINEAR)))


def _draw_bars(rng: random.Random, draw: ImageDraw.ImageDraw, scene: Scene, scale: int) -> None:
    if not scene.bars:
        return
    for bar in scene.bars:
        draw.rectangle([v * scale for v in (bar.left, bar.top, bar.right, bar.bottom)], fill=bar.rgb)
    dark = sum(scene.background.first) < 300
    line = (200, 200, 200) if dark else (60, 60, 60)
    left, right, bottom = scene.bars[0].left - 3, scene.bars[-1].right + 3, scene.bars[0].bottom
    draw.line([left * scale, bottom * scale, right * scale, bottom * scale], fill=line, width=scale)
    if rng.random() < 0.6:
        draw.line([left * scale, 5 * scale, left * scale, bottom * scale], fill=line, width=scale)


def _draw_lettering(picture: Image.Image, text: Lettering, scale: int) -> None:
    mask = Image.new("L", picture.size)
    draw = ImageDraw.Draw(mask)
    size, stroke = text.size * scale // SCALE, text.stroke * scale // SCALE
    for glyph in text.glyphs:
        x, y = (glyph.left, glyph.top) if text.warp is None else unmoved(glyph, text.warp)
        left, top = extent(glyph.character, size, stroke, text.face)[1][:2]
        origin = x * scale - left, y * scale - top
        if text.face in ("plotted", "serif"):
            strokes.write(draw, origin, glyph.character, size, stroke, text.face == "serif")
        else:
            draw.text(origin, glyph.character, 255, font(size), stroke_width=stroke)
    if text.face == "coarse":
        mask = coarsened(mask, text.size * scale / SCALE)
    if text.warp is not None:
        a, b, c, d, e, f = text.warp
        matrix = (a, b, c * scale, d, e, f * scale)
        mask = mask.transform(mask.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    picture.paste(text.rgb, mask=mask)


def coarsened(mask: Image.Image, size: float) -> Image.Image:
    """The lettering as if it were drawn on a raster of about eleven dots a line."""
    dots = max(8, round(mask.width * 13 / size))
    small = mask.resize((dots, dots), Image.Resampling.BOX).point([0] * 105 + [255] * 151)
    return small.resize(mask.size, Image.Resampling.NEAREST)


def worn(rng: random.Random, picture: Image.Image) -> np.ndarray:
    """The picture as pixels, sometimes blurred, compressed or noisy."""
    if rng.random() < 0.12:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=rng.randint(40, 90))
        picture = Image.open(buffer)
    pixels = np.asarray(picture)
    if rng.random() < 0.25:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 9), pixels.shape)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)


TRAINING = Style(
    background=background,
    anchors=ANCHORS,
    jitter=8,
    tilt=16.0,
    radii={0: (9, 20), 1: (9, 26), 2: (8, 22), 3: (7.5, 18), 4: (7, 15), 5: (7, 14)},
    words=WORDS,
    lettering=lettering,
    paint=paint,
)
