"""Vision probes: generated pictures with known answers, that ask for one ability each.

Reading text of falling size, counting, naming a colour, reading a bar chart. The `demo` set is drawn by the demo
generator's held-out painter at the demo model's size, and asks in its held-out phrases; the `plain` set is drawn
sharply at a common tower's size, and asks in everyday words. No picture of any training split is among them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinychat.core import Request
from tinychat.eval.demo import heldout as painter
from tinychat.eval.demo import pictures, questions, scenes
from tinychat.eval.demo.evaluation import correct, normal
from tinychat.eval.demo.questions import Asker, Phrases, Turn
from tinychat.eval.demo.samples import Sample
from tinychat.eval.demo.scenes import COLOURS, IMAGE_SIZE, Background, Glyph, Lettering, Rgb, Scene, Style
from tinychat.eval.tasks import Answering, TaskScore, ask, question

KINDS = ("read", "count", "colour", "chart")
PLAIN_SCALE = 4  # 384 pixels
DOTS = 11  # rows of a character of the held-out painter's font
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
Letterer = Callable[[random.Random, str, str, Rgb, float], Lettering]

PLAIN_QUESTIONS: Phrases = {
    "read_number": ("Which number is written in the picture? Answer with the number only.",),
    "read_word": ("Which word is written in the picture? Answer with that word only.",),
    "count": ("How many shapes are in the picture? Answer with a number only.",),
    "colour_of": ("What colour is the {a}? Answer with one word.",),
    "tallest": ("Which colour has the tallest bar of the chart? Answer with one word.",),
    "shortest": ("Which colour has the shortest bar of the chart? Answer with one word.",),
    "count_bars": ("How many bars does the chart have? Answer with a number only.",),
}


@dataclass(frozen=True, eq=False, slots=True)
class Probe:
    """A picture `[S, S, 3]` uint8, a question and its answer; `size`: the text's height as a part of the picture's."""

    kind: str
    picture: np.ndarray
    turn: Turn
    size: float | None = None


@dataclass(frozen=True, slots=True)
class Posed:
    """A probe that waits to be asked, of each model in turn."""

    request: Request
    kind: str
    turn: Turn
    size: float | None


@dataclass(frozen=True, slots=True)
class Mark:
    """What an answer to a probe was worth; `misread`: the part of the text that was read wrongly."""

    kind: str
    size: float | None
    right: bool
    misread: float


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """How the probes of a set are drawn and asked; `sizes` are heights of text in pixels of IMAGE_SIZE, falling."""

    style: Style
    letter: Letterer
    phrases: Phrases
    sizes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """Right answers to the probes of a kind, or of one size of text; `errors`: characters read wrongly, 0 to 1."""

    kind: str
    size: float | None
    right: int
    asked: int
    errors: float | None = None

    @property
    def share(self) -> float:
        return self._score().share

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share (Wilson 1927)."""
        return self._score().interval

    def _score(self) -> TaskScore:
        return TaskScore("probes", self.kind, self.right, self.asked)


def draw_probes(name: str, per_kind: int) -> Iterator[Probe]:
    """`per_kind` probes of each kind, for reading of each size: the same ones at every call."""
    made = SETS[name]
    for size in made.sizes:
        yield from (_reading(made, _rng(name, f"read {size}", i), size) for i in range(per_kind))
    for kind, draw in _DRAWERS.items():
        yield from (draw(made, _rng(name, kind, i)) for i in range(per_kind))


def pose(probe: Probe) -> Posed:
    """The probe as a request, its picture compressed."""
    sample = Sample((probe.picture,), (replace(probe.turn, pictures=1),), None, np.zeros(0))
    return Posed(question(sample, 0), probe.kind, probe.turn, probe.size)


def mark(engine: Answering, posed: Posed) -> Mark:
    """The engine's greedy answer, marked. Raises ModelError where it cannot answer."""
    said = ask(engine, posed.request)
    return Mark(posed.kind, posed.size, right(said, posed.turn), misread(said, posed.turn))


def tally(marks: Iterable[Mark]) -> tuple[ProbeScore, ...]:
    """Scores by kind and size, in the order in which these come first."""
    groups: dict[tuple[str, float | None], list[Mark]] = {}
    for one in marks:
        groups.setdefault((one.kind, one.size), []).append(one)
    return tuple(
        ProbeScore(
            kind,
            size,
            right=sum(one.right for one in group),
            asked=len(group),
            errors=None if size is None else sum(one.misread for one in group) / len(group),
        )
        for (kind, size), group in groups.items()
    )


def score_probes(engine: Answering, asked: Iterable[Probe]) -> tuple[ProbeScore, ...]:
    """Greedy answers, scored by kind and size. Raises ModelError where the engine cannot answer."""
    return tally(mark(engine, pose(probe)) for probe in asked)


def right(said: str, turn: Turn) -> bool:
    """Whether an answer is the expected one, or a sentence that names it and nothing else of its sort."""
    if correct(said, turn.answer, turn.task):
        return True
    words, wanted = re.findall(r"\w+", normal(said)), normal(turn.answer)
    if turn.task == "read":
        return wanted in words
    named = {word for word in map(_digits, words) if word in COLOURS or word.isdigit()}
    return named == {wanted}


def misread(said: str, turn: Turn) -> float:
    """The edit distance between the expected text and the nearest word of the answer, as a part of its length."""
    wanted = normal(turn.answer)
    words = [*re.findall(r"\w+", normal(said)), normal(said).replace(" ", "")]
    return min(min(edits(word, wanted) for word in words) / len(wanted), 1.0)


def edits(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements between two strings (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def share_right(scores: Sequence[ProbeScore]) -> float:
    """The share of right answers, each kind with the same weight."""
    kinds = {kind: [score for score in scores if score.kind == kind] for kind in dict.fromkeys(s.kind for s in scores)}
    shares = [sum(s.right for s in group) / sum(s.asked for s in group) for group in kinds.values()]
    return sum(shares) / len(shares)


def _rng(name: str, kind: str, index: int) -> random.Random:
    return random.Random(f"probes/{name}/{kind}/{index}")


def _digits(word: str) -> str:
    return str(NUMBERS.index(word)) if word in NUMBERS else word


def _reading(made: ProbeSet, rng: random.Random, size: float) -> Probe:
    number = rng.random() < 0.5
    text = str(rng.randint(10, 999)) if number else rng.choice([word for word in painter.WORDS if len(word) == 3])
    background = made.style.background(rng)
    colour, rgb = scenes.ink(rng, made.style, background)
    scene = Scene(background, lettering=made.letter(rng, text, colour, rgb, size))
    turn = Asker(rng, made.phrases).turn("read_number" if number else "read_word", text, "read")
    return Probe("read", made.style.paint(rng, scene), turn, size / IMAGE_SIZE)


def _count(made: ProbeSet, rng: random.Random) -> Probe:
    scene = scenes.compose_shapes(rng, made.style, rng.randint(1, scenes.MAX_SHAPES))
    turn = Asker(rng, made.phrases).turn("count", str(len(scene.shapes)), "count")
    return Probe("count", made.style.paint(rng, scene), turn)


def _colour(made: ProbeSet, rng: random.Random) -> Probe:
    """Shapes of which one is the only one of its kind."""
    while True:
        scene = scenes.compose_shapes(rng, made.style, rng.randint(1, 3))
        kinds = [shape.kind for shape in scene.shapes]
        if single := [shape for shape in scene.shapes if questions.only(kinds, shape.kind)]:
            break
    shape = rng.choice(single)
    turn = Asker(rng, made.phrases).turn("colour_of", questions.say(shape.colour), "colour", a=shape.kind)
    return Probe("colour", made.style.paint(rng, scene), turn)


def _chart(made: ProbeSet, rng: random.Random) -> Probe:
    scene = scenes.compose_chart(rng, made.style)
    ranked = sorted(scene.bars, key=lambda bar: bar.height)
    answers = {
        "tallest": questions.say(ranked[-1].colour),
        "shortest": questions.say(ranked[0].colour),
        "count_bars": str(len(ranked)),
    }
    key = rng.choice(tuple(answers))
    return Probe("chart", made.style.paint(rng, scene), Asker(rng, made.phrases).turn(key, answers[key], "chart"))


_DRAWERS: Mapping[str, Callable[[ProbeSet, random.Random], Probe]] = {
    "count": _count,
    "colour": _colour,
    "chart": _chart,
}


def bitmap(rng: random.Random, text: str, colour: str, rgb: Rgb, size: float) -> Lettering:
    """Upright letters of the held-out painter, `size` pixels high."""
    while (drawn := painter.lettering(rng, text, colour, rgb)).warp is not None:
        pass
    dot = size / DOTS
    factor = dot * 10 / drawn.size
    first = drawn.glyphs[0]
    boxes = [
        Glyph(g.character, (g.left - first.left) * factor, 0.0, (g.right - first.left) * factor, size)
        for g in drawn.glyphs
    ]
    return replace(drawn, glyphs=_somewhere(rng, boxes), size=round(dot * 10))


def smooth(rng: random.Random, text: str, colour: str, rgb: Rgb, size: float) -> Lettering:
    """Upright letters of Pillow's typeface, their line `size` pixels high."""
    points = round(size * pictures.SCALE)
    x, boxes = 0.0, []
    for character in text:
        advance, (_, top, _, bottom) = pictures.extent(character, points, 0, "smooth")
        width = advance / pictures.SCALE
        # render takes a character's top off its origin unscaled: this keeps all on one line
        boxes.append(Glyph(character, x, top / PLAIN_SCALE, x + width, bottom / pictures.SCALE))
        x += width
    return Lettering(text, colour, rgb, _somewhere(rng, boxes), points, 0, None, "smooth")


def _somewhere(rng: random.Random, boxes: Sequence[Glyph]) -> tuple[Glyph, ...]:
    """The boxes moved together to a random place inside the picture."""
    low = max(0.0, IMAGE_SIZE - 4 - max(box.bottom for box in boxes))
    x, y = rng.uniform(3, max(3.1, IMAGE_SIZE - 4 - boxes[-1].right)), rng.uniform(2, max(2.1, low))
    return tuple(Glyph(b.character, b.left + x, b.top + y, b.right + x, b.bottom + y) for b in boxes)


def _plain_ground(rng: random.Random) -> Background:
    tone = rng.randint(225, 255)
    return Background("plain", (tone, tone, tone), (tone, tone, tone))


def _paint_sharply(rng: random.Random, scene: Scene) -> np.ndarray:
    return np.array(pictures.render(rng, scene, PLAIN_SCALE, vary=False))


_PLAIN = replace(painter.STYLE, background=_plain_ground, paint=_paint_sharply)
_DEMO_QUESTIONS: Phrases = painter.QUESTIONS
SETS = {
    "demo": ProbeSet(painter.STYLE, bitmap, _DEMO_QUESTIONS, (44.0, 33.0, 22.0, 16.5, 11.0)),
    "plain": ProbeSet(_PLAIN, smooth, PLAIN_QUESTIONS, (24.0, 12.0, 8.0, 6.0, 4.0, 3.0)),
}
