"""The sample pictures that ship with the demo model, and what to ask about them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tinychat.eval.demo import pictures
from tinychat.eval.demo.scenes import ANCHORS, IMAGE_SIZE, Background, Bar, Lettering, Scene, Shape

SCALE = 4
_WHITE = Background("plain", (255, 255, 255), (255, 255, 255))
_CREAM = Background("plain", (255, 250, 225), (255, 250, 225))
_PALE = Background("plain", (222, 232, 250), (222, 232, 250))


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one or two sample pictures, by file name, and the right answer."""

    pictures: tuple[str, ...]
    question: str
    answer: str
    task: str


def _shape(kind: str, colour: str, x: float, y: float, radius: float) -> Shape:
    return Shape(kind, colour, ANCHORS[colour][1], x, y, radius, 0.0)


def _lettering(text: str, colour: str) -> Lettering:
    """Upright, smooth lettering of at least middle size about the middle: the first that a source of chance gives."""
    rng, middle = random.Random(0), IMAGE_SIZE / 2
    while True:
        drawn = pictures.lettering(rng, text, colour, ANCHORS[colour][0])
        first, last = drawn.glyphs[0], drawn.glyphs[-1]
        centred = abs(first.left + last.right - 2 * middle) < 12 and abs(first.top + first.bottom - 2 * middle) < 20
        if drawn.warp is None and drawn.face == "smooth" and drawn.size > 60 and centred:
            return drawn


def _bars(*columns: tuple[str, float]) -> tuple[Bar, ...]:
    left, step, width, bottom = 16.0, 22.0, 15.0, 84.0
    return tuple(
        Bar(colour, ANCHORS[colour][1], left + i * step, bottom - height, left + i * step + width, bottom)
        for i, (colour, height) in enumerate(columns)
    )


def showcase() -> dict[str, Scene]:
    """The sample pictures by file name."""
    return {
        "shapes.png": Scene(
            _WHITE,
            (
                _shape("circle", "red", 24, 24, 15),
                _shape("square", "blue", 72, 34, 11),
                _shape("star", "yellow", 26, 72, 13),
                _shape("triangle", "green", 70, 76, 10),
            ),
        ),
        "more-shapes.png": Scene(
            _CREAM,
            (
                _shape("heart", "purple", 22, 26, 12),
                _shape("circle", "red", 50, 50, 9),
                _shape("cross", "black", 76, 20, 10),
                _shape("circle", "orange", 20, 76, 10),
                _shape("square", "green", 74, 74, 14),
            ),
        ),
        "number.png": Scene(_WHITE, lettering=_lettering("731", "blue")),
        "word.png": Scene(_PALE, lettering=_lettering("CAT", "red")),
        "chart.png": Scene(_WHITE, bars=_bars(("red", 40), ("blue", 66), ("green", 18))),
    }


QUESTIONS = (
    Question(("shapes.png",), "What colour is the circle?", "Red.", "colour"),
    Question(("shapes.png",), "What shape is blue?", "Square.", "shape"),
    Question(("shapes.png",), "How many shapes are there?", "4", "count"),
    Question(("shapes.png",), "Which shape is the largest?", "The red circle.", "size"),
    Question(("shapes.png",), "Where is the yellow star?", "At the bottom left.", "position"),
    Question(("shapes.png",), "Is there a black cross?", "No.", "exist"),
    Question(("shapes.png",), "What is the weather like today?", "I do not know.", "unknown"),
    Question(("more-shapes.png",), "How many circles are there?", "2", "count"),
    Question(("more-shapes.png",), "What colour is the heart?", "Purple.", "colour"),
    Question(("more-shapes.png",), "Is the heart left of the cross?", "Yes.", "position"),
    Question(("number.png",), "What number is written?", "731", "read"),
    Question(("number.png",), "What colour is the number?", "Blue.", "text_colour"),
    Question(("word.png",), "What word is written?", "CAT", "read"),
    Question(("word.png",), "Describe the picture.", "The word CAT in red.", "describe"),
    Question(("chart.png",), "Which bar is the tallest?", "Blue.", "chart"),
    Question(("chart.png",), "How many bars are there?", "3", "chart"),
    Question(("shapes.png", "more-shapes.png"), "Which picture has more shapes?", "The second.", "compare"),
)


def draw_samples(folder: Path) -> tuple[Question, ...]:
    """Write the sample pictures, 384 pixels wide, and return what to ask about them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in showcase().items():
        large = pictures.render(random.Random(0), scene, 2 * SCALE, vary=False)
        small = large.resize((IMAGE_SIZE * SCALE, IMAGE_SIZE * SCALE), Image.Resampling.BOX)
        small.quantize(64, dither=Image.Dither.NONE).save(folder / name, optimize=True)
    return QUESTIONS
