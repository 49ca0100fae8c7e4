"""Held-out pictures and phrasings: other outlines, tones, grounds, sizes, letters and words than in training.

The painter is numpy alone: every shape is an inequality, evaluated on a grid three times as fine as the picture.
Letters come from Pillow's bitmap font, enlarged.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinychat.eval.demo.pictures import fitting_slant, moved, unmoved
from tinychat.eval.demo.scenes import IMAGE_SIZE, Background, Glyph, Lettering, Rgb, Scene, Shape, Style, mix

FINE = 3
SIDE = IMAGE_SIZE * FINE

ANCHORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((220, 20, 40), (178, 24, 24), (250, 45, 35)),
    "green": ((34, 139, 34), (50, 205, 50), (20, 160, 90)),
    "blue": ((0, 0, 205), (65, 105, 225), (30, 100, 200)),
    "yellow": ((250, 220, 0), (255, 240, 60)),
    "purple": ((148, 40, 200), (110, 20, 130)),
    "orange": ((250, 128, 10), (255, 150, 20)),
    "black": ((10, 10, 10), (30, 30, 34)),
    "gray": ((120, 120, 120), (145, 145, 145)),
}
WORDS = (
    "ape", "cab", "den", "elk", "fan", "gum", "hut", "ink", "jug", "keg", "log", "mud", "net", "oak", "pad", "rib",
    "sip", "ton", "urn", "vet", "yak", "arch", "bell", "cone", "drum", "fern", "glue", "hose", "jump", "knot",
    "lime", "moth", "note", "plum", "raft", "swan", "tuba", "vine", "worm", "yarn",
)  # fmt: skip
_GROUNDS: tuple[Rgb, ...] = ((250, 245, 235), (255, 255, 255), (215, 225, 228), (235, 240, 210), (232, 220, 215))

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sector = 2 * math.pi / 5
    turn = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    tip, notch = 1.05, 0.46
    # the edge from a tip to the notch beside it, as a line in polar coordinates
    ax, ay, bx, by = tip, 0.0, notch * math.cos(sector / 2), notch * math.sin(sector / 2)
    distance = np.hypot(x, y)
    px, py = distance * np.cos(turn), distance * np.sin(turn)
    return (bx - ax) * (py - ay) - (by - ay) * (px - ax) >= 0


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lobes = np.hypot(np.abs(x) - 0.48, y + 0.38) <= 0.52
    return lobes | ((y > -0.38) & (np.abs(x) * 0.98 + y * 0.86 <= 0.82) & (np.abs(x) <= 1.0))


INSIDE: dict[str, Inside] = {
    "circle": lambda x, y: np.hypot(x, y) <= 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.84,
    "triangle": lambda x, y: (y <= 0.75) & (2 * np.abs(x) - y <= 1.0),
    "star": _star,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.27) & (np.maximum(np.abs(x), np.abs(y)) <= 0.97),
    "heart": _heart,
}


def background(rng: random.Random) -> Background:
    """Faint stripes, dots or a checked ground, or a plain one."""
    first = mix(rng, _GROUNDS, 4)
    kind = rng.choice(("plain", "stripes", "dots", "checks"))
    shift = rng.randint(8, 22)
    return Background(kind, first, tuple(max(0, v - shift) for v in first) if kind != "plain" else first)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(SIDE) + 0.5) / FINE
    return np.meshgrid(axis, axis)


def _ground(rng: random.Random, ground: Background) -> np.ndarray:
    x, y = _grid()
    step, angle = rng.uniform(5, 14), rng.uniform(0, math.pi)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    patterns = {
        "plain": np.zeros_like(x, bool),
        "stripes": np.floor(along / step) % 2 == 0,
        "checks": (np.floor(along / step) + np.floor(across / step)) % 2 == 0,
        "dots": np.hypot(along % step - step / 2, across % step - step / 2) < step / 4,
    }
    return np.where(
        patterns[ground.kind][..., None], np.array(ground.second, np.float32), np.array(ground.first, np.float32)
    )


def _covers(shape: Shape) -> np.ndarray:
    x, y = _grid()
    angle = math.radians(shape.angle)
    u, v = (x - shape.x) / shape.radius, (y - shape.y) / shape.radius
    return INSIDE[shape.kind](u * math.cos(angle) + v * math.sin(angle), v * math.cos(angle) - u * math.sin(angle))


def paint(rng: random.Random, scene: Scene) -> np.ndarray:
    """[IMAGE_SIZE, IMAGE_SIZE, 3] uint8."""
    canvas = _ground(rng, scene.background)
    x, y = _grid()
    for shape in scene.shapes:
        canvas[_covers(shape)] = shape.rgb
    for bar in scene.bars:
        canvas[(x >= bar.left) & (x <= bar.right) & (y >= bar.top) & (y <= bar.bottom)] = bar.rgb
    if scene.lettering is not None:
        ink = _letters(scene.lettering)[..., None]
        canvas = canvas * (1 - ink) + np.array(scene.lettering.rgb, np.float32) * ink
    small = canvas.reshape(IMAGE_SIZE, FINE, IMAGE_SIZE, FINE, 3).mean((1, 3))
    grain = np.random.default_rng(rng.getrandbits(32)).uniform(-5, 5, small.shape)
    return np.clip(small * rng.uniform(0.92, 1.0) + grain, 0, 255).astype(np.uint8)


@lru_cache(maxsize=128)
def _stamp(character: str) -> Image.Image:
    """A character of the bitmap font on a tight box."""
    face = ImageFont.load_default_imagefont()
    left, top, right, bottom = face.getbbox(character)
    cell = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(cell).text((-left, -top), character, 255, face)
    box = cell.getbbox()
    assert box is not None, character
    return cell.crop((box[0], 0, box[2], cell.height))


def lettering(rng: random.Random, text: str, colour: str, rgb: Rgb) -> Lettering:
    """Enlarged bitmap letters at a random place; `size` is how many pixels of the picture one dot takes, times ten."""
    dots = [_stamp(c).size for c in text]
    wide, high = sum(w + 1 for w, _ in dots), max(h for _, h in dots)
    dot = rng.uniform(2.0, max(2.1, min(4.2, 84 / wide)))
    x = rng.uniform(4, max(4.1, IMAGE_SIZE - wide * dot - 4))
    y = rng.uniform(3, max(3.1, IMAGE_SIZE - high * dot - 3))
    glyphs = []
    for character, (w, h) in zip(text, dots, strict=True):
        glyphs.append(Glyph(character, x, y, x + w * dot, y + h * dot))
        x += (w + 1) * dot
    laid = tuple(glyphs)
    warp = fitting_slant(rng, laid) if rng.random() < 0.5 else None
    if warp is not None:
        laid = tuple(moved(glyph, warp) for glyph in laid)
    return Lettering(text, colour, rgb, laid, round(dot * 10), 0, warp, "bitmap")


def _letters(text: Lettering) -> np.ndarray:
    mask = Image.new("L", (SIDE, SIDE))
    scale = text.size / 10 * FINE
    for glyph in text.glyphs:
        stamp = _stamp(glyph.character)
        large = stamp.resize((round(stamp.width * scale), round(stamp.height * scale)), Image.Resampling.BICUBIC)
        x, y = (glyph.left, glyph.top) if text.warp is None else unmoved(glyph, text.warp)
        mask.paste(large, (round(x * FINE), round(y * FINE)), large)
    if text.warp is not None:
        a, b, c, d, e, f = text.warp
        matrix = (a, b, c * FINE, d, e, f * FINE)
        mask = mask.transform(mask.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(mask, np.float32) / 255


STYLE = Style(
    background=background,
    anchors=ANCHORS,
    jitter=5,
    tilt=20.0,
    radii={0: (9, 20), 1: (8, 30), 2: (8, 25), 3: (7.5, 19), 4: (7, 16), 5: (7, 14.5)},
    words=WORDS,
    lettering=lettering,
    paint=paint,
)

QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour_of": (
        "Can you tell me the colour of the {a}?",
        "The colour of the {a} is what?",
        "And what colour has the {a}?",
    ),
    "shape_of": ("Which {c} shape do you see?", "Tell me the shape of the {c} one.", "The {c} object is what shape?"),
    "is_colour": ("Is it {c}, the {a}?", "Do you see the {a} in {c}?"),
    "count": ("Tell me how many shapes there are.", "Can you count the shapes?", "What number of objects do you see?"),
    "count_of": ("Tell me how many {p} there are.", "Can you count the {p}?", "What number of {p} do you see?"),
    "largest": (
        "Of the shapes, which is the largest?",
        "Can you name the biggest object?",
        "Tell me the largest shape.",
    ),
    "smallest": (
        "Of the shapes, which is the smallest?",
        "Can you name the smallest object?",
        "Tell me the smallest shape.",
    ),
    "larger": ("Does the {a} look larger than the {b}?", "Tell me, is the {a} bigger than the {b}?"),
    "leftmost": (
        "Tell me the leftmost shape.",
        "What do you see on the far left?",
        "Which object is the leftmost one?",
    ),
    "rightmost": (
        "Tell me the rightmost shape.",
        "What do you see on the far right?",
        "Which object is the rightmost one?",
    ),
    "topmost": ("Tell me the topmost shape.", "What do you see at the top?", "Which object is the highest?"),
    "bottom": ("Tell me the lowest shape.", "What do you see at the bottom?", "Which object is the lowest?"),
    "left_of": ("Do you see the {a} to the left of the {b}?", "Tell me, is the {a} left of the {b}?"),
    "right_of": ("Do you see the {a} to the right of the {b}?", "Tell me, is the {a} right of the {b}?"),
    "above": ("Do you see the {a} above the {b}?", "Tell me, is the {a} above the {b}?"),
    "below": ("Do you see the {a} below the {b}?", "Tell me, is the {a} below the {b}?"),
    "where": ("Where do you see the {a}?", "Can you tell me where the {a} is?", "In what part is the {a}?"),
    "exist": ("Tell me, is there {x}?", "Can you see {x} here?", "Is {x} in this picture?"),
    "read_number": ("Can you read the number?", "Tell me the number.", "Which number is in the picture?"),
    "read_word": ("Can you read the word?", "Tell me the word.", "Which word is in the picture?"),
    "read": ("Can you read the text?", "Tell me what is written.", "What text do you see?"),
    "text_colour": ("Which colour has the {t}?", "Can you tell me the colour of the {t}?"),
    "tallest": ("Tell me the colour of the tallest bar.", "Of the bars, which is the tallest?"),
    "shortest": ("Tell me the colour of the shortest bar.", "Of the bars, which is the shortest?"),
    "count_bars": ("Tell me how many bars there are.", "Can you count the bars?"),
    "taller": ("Tell me, is the {c} bar taller than the {d} bar?", "Is the {c} one taller than the {d} one?"),
    "first_bar": ("Tell me the colour of the leftmost bar.", "Which colour has the bar on the left?"),
    "last_bar": ("Tell me the colour of the rightmost bar.", "Which colour has the bar on the right?"),
    "what_kind": ("Tell me what this is.", "What is it?"),
    "describe": ("Can you describe the picture?", "Tell me what is in the picture.", "What do you see here?"),
    "same_count": ("Is the number of shapes in both pictures the same?", "Do both have the same number of shapes?"),
    "more": ("Tell me which picture has more shapes.", "Do you see more shapes in the first or in the second?"),
    "count_in": ("Tell me how many shapes the {n} picture has.", "In the {n} picture, how many shapes are there?"),
    "exist_in": ("In the {n} picture, is there {x}?", "Can you see {x} in the {n} picture?"),
    "colour_in": ("Tell me the colour of the {a} in the {n} picture.", "Which colour is the {a} in the {n} picture?"),
    "which_has": ("Tell me which picture has {x}.", "Where is {x}, in the first or in the second picture?"),
    "differs": ("Tell me what is different.", "What is the difference in the second picture?"),
    "identical": ("Do the pictures show the same?", "Tell me, are the pictures the same?"),
    "different": ("Do you see a difference?", "Is the second picture different?"),
    "its_colour": ("Tell me its colour.", "Its colour?"),
    "its_shape": ("Tell me its shape.", "Its shape?"),
    "its_place": ("Tell me where it is.", "In which part is it?"),
    "and_the": ("Tell me about the {a}.", "And what of the {a}?"),
    "and_how_many": ("And the number of {p}?", "Tell me how many {p}."),
    "unknown": (
        "Who painted it?",
        "Which year is it?",
        "Is it cold outside?",
        "Where do you live?",
        "What should I buy?",
        "What language is spoken in Brazil?",
        "Who is the king of Sweden?",
        "What is the square root of {digit}?",
        "Can I eat a mushroom?",
        "What is the dolphin doing?",
        "How many people live in Chicago?",
        "Is the teacher sad?",
        "Please explain gravity.",
        "What is inside the suitcase?",
        "How tall is the tower?",
        "When does the shop close?",
    ),
}
