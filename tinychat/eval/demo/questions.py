"""All questions that can be asked about a scene, with the answers that the scene gives, never the pixels."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tinychat.eval.demo import phrases
from tinychat.eval.demo.scenes import COLOURS, IMAGE_SIZE, SHAPES, Bar, Scene, Shape

ORDINALS = ("first", "second")


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, its answer and the task it belongs to; `pictures` new pictures come with the question."""

    question: str
    answer: str
    task: str
    pictures: int = 0


Chain = tuple[Turn, ...]
Phrases = Mapping[str, tuple[str, ...]]


def say(text: str) -> str:
    """An answer: a capital first and a dot last."""
    return text[0].upper() + text[1:] + "."


@dataclass(frozen=True, slots=True)
class Asker:
    """Makes turns from templates."""

    rng: random.Random
    phrases: Phrases

    def turn(self, key: str, answer: str, task: str, **fields: str) -> Turn:
        return Turn(self.rng.choice(self.phrases[key]).format(**fields), answer, task)

    def yes_no(self, key: str, truth: bool, task: str, **fields: str) -> Turn:
        return self.turn(key, "Yes." if truth else "No.", task, **fields)


def only(values: Iterable[object], value: object) -> bool:
    """Whether a value occurs exactly once."""
    return sum(v == value for v in values) == 1


def names(scene: Scene, shape: Shape) -> list[str]:
    """The ways to name a shape so that no other one is meant."""
    found = []
    if only((s.kind for s in scene.shapes), shape.kind):
        found.append(shape.kind)
    if only((s.colour for s in scene.shapes), shape.colour):
        found.append(f"{shape.colour} shape")
    if only((s.pair for s in scene.shapes), shape.pair):
        found.append(" ".join(shape.pair))
    return found


def full(shape: Shape) -> str:
    return say("the " + " ".join(shape.pair))


def place(shape: Shape) -> str | None:
    """Where a shape is among the nine parts of the picture; None near a border between two."""
    words = [_third(shape.y, ("top", "", "bottom")), _third(shape.x, ("left", "", "right"))]
    if None in words:
        return None
    row, column = words
    if not row and not column:
        return "In the middle."
    if not row:
        return f"On the {column}."
    return f"At the {row} {column}." if column else f"At the {row}."


def _third(value: float, words: tuple[str, str, str]) -> str | None:
    part = value / IMAGE_SIZE * 3
    return None if min(abs(part - 1), abs(part - 2)) < 0.12 else words[int(part)]


def about_shapes(ask: Asker, scene: Scene) -> Iterator[Chain]:
    """All chains of turns about the shapes of one picture."""
    yield from _about_counts(ask, scene)
    yield from _about_existence(ask, scene)
    if not scene.shapes:
        return
    yield from _about_names(ask, scene)
    yield from _about_places(ask, scene)
    if len(scene.shapes) > 1:
        yield from _about_sizes(ask, scene)
        yield from _about_relations(ask, scene)


def _about_names(ask: Asker, scene: Scene) -> Iterator[Chain]:
    kinds, colours = [s.kind for s in scene.shapes], [s.colour for s in scene.shapes]
    by_kind = [s for s in scene.shapes if only(kinds, s.kind)]
    by_colour = [s for s in scene.shapes if only(colours, s.colour)]
    for s in by_kind:
        yield (ask.turn("colour_of", say(s.colour), "colour", a=s.kind),)
    for s in by_colour:
        yield (ask.turn("shape_of", say(s.kind), "shape", c=s.colour),)
    if by_kind:
        s = ask.rng.choice(by_kind)
        asked = s.colour if ask.rng.random() < 0.5 else ask.rng.choice([c for c in COLOURS if c != s.colour])
        yield (ask.yes_no("is_colour", asked == s.colour, "exist", a=s.kind, c=asked),)
    if len(by_kind) > 1:
        s, t = ask.rng.sample(by_kind, 2)
        first = ask.turn("colour_of", say(s.colour), "colour", a=s.kind)
        yield first, ask.turn("and_the", say(t.colour), "follow_up", a=t.kind)
    if len(by_colour) > 1:
        s, t = ask.rng.sample(by_colour, 2)
        first = ask.turn("shape_of", say(s.kind), "shape", c=s.colour)
        yield first, ask.turn("and_the", say(t.kind), "follow_up", a=f"{t.colour} one")
    missing = [k for k in SHAPES if k not in kinds]
    if missing and ask.rng.random() < 0.15:
        kind = ask.rng.choice(missing)
        yield (ask.turn("colour_of", f"There is no {kind}.", "exist", a=kind),)


def _about_counts(ask: Asker, scene: Scene) -> Iterator[Chain]:
    yield (ask.turn("count", str(len(scene.shapes)), "count"),)
    colours, kinds = {s.colour for s in scene.shapes}, {s.kind for s in scene.shapes}
    colour = _present_or_not(ask.rng, colours, COLOURS)
    kind, other = _present_or_not(ask.rng, kinds, SHAPES), ask.rng.choice(SHAPES)
    for group, number in (
        (f"{colour} shapes", sum(s.colour == colour for s in scene.shapes)),
        (plural(kind), sum(s.kind == kind for s in scene.shapes)),
    ):
        yield (ask.turn("count_of", str(number), "count", p=group),)
    if kind != other:
        first = ask.turn("count_of", str(sum(s.kind == kind for s in scene.shapes)), "count", p=plural(kind))
        number = sum(s.kind == other for s in scene.shapes)
        yield first, ask.turn("and_how_many", str(number), "follow_up", p=plural(other))


def _present_or_not(rng: random.Random, present: set[str], known: tuple[str, ...]) -> str:
    return rng.choice(sorted(present)) if present and rng.random() < 0.75 else rng.choice(known)


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def an(words: str) -> str:
    """The words with their indefinite article."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def thing_to_look_for(rng: random.Random, scenes: tuple[Scene, ...]) -> tuple[str, list[bool]]:
    """A shape, a colour or both, present in some picture half of the time, and whether each picture has it."""
    shapes = [s for scene in scenes for s in scene.shapes]
    colour, kind = rng.choice(COLOURS), rng.choice(SHAPES)
    if shapes and rng.random() < 0.4:
        colour, kind = rng.choice(shapes).pair
    elif shapes and rng.random() < 0.3:
        colour = rng.choice(shapes).colour
    form = rng.randrange(3)
    if form == 0:
        return an(f"{colour} shape"), [any(s.colour == colour for s in scene.shapes) for scene in scenes]
    if form == 1:
        return an(kind), [any(s.kind == kind for s in scene.shapes) for scene in scenes]
    return an(f"{colour} {kind}"), [any(s.pair == (colour, kind) for s in scene.shapes) for scene in scenes]


def _about_existence(ask: Asker, scene: Scene) -> Iterator[Chain]:
    for _ in range(2):
        thing, (here,) = thing_to_look_for(ask.rng, (scene,))
        yield (ask.yes_no("exist", here, "exist", x=thing),)
    placed = [s for s in scene.shapes if place(s) and only((t.pair for t in scene.shapes), s.pair)]
    if placed:
        s = ask.rng.choice(placed)
        first = ask.turn("exist", "Yes.", "exist", x=an(" ".join(s.pair)))
        yield first, ask.turn("its_place", place(s) or "", "follow_up")


_AXES = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "bottom": ("y", -1)}


def extreme(shapes: tuple[Shape, ...], side: str, margin: float = 5.0) -> Shape | None:
    """The shape furthest to one side, by its middle and by its edge; None where two are about as far."""
    axis, sign = _AXES[side]
    ranked = sorted(shapes, key=lambda s: sign * getattr(s, axis))
    first = ranked[0]
    clear = all(
        sign * (getattr(s, axis) - getattr(first, axis)) >= max(margin, s.radius - first.radius + 1) for s in ranked[1:]
    )
    return first if clear else None


def _about_places(ask: Asker, scene: Scene) -> Iterator[Chain]:
    ends = {side: s for side in phrases.SIDES if (s := extreme(scene.shapes, side)) is not None}
    if len(scene.shapes) > 1:
        for side, s in ends.items():
            yield (ask.turn(side, full(s), "position"),)
        if len(ends) > 1:
            one, two = ask.rng.sample(sorted(ends), 2)
            first = ask.turn(one, full(ends[one]), "position")
            yield first, ask.turn("and_the", full(ends[two]), "follow_up", a=phrases.AND_SIDE[two] + " one")
    for s in scene.shapes:
        spot, called = place(s), names(scene, s)
        if spot and called:
            yield (ask.turn("where", spot, "position", a=ask.rng.choice(called)),)


def _about_relations(ask: Asker, scene: Scene) -> Iterator[Chain]:
    named = [s for s in scene.shapes if names(scene, s)]
    if len(named) < 2:
        return
    for key, axis, sign in (("left_of", "x", 1), ("right_of", "x", -1), ("above", "y", 1), ("below", "y", -1)):
        s, t = ask.rng.sample(named, 2)
        gap = sign * (getattr(t, axis) - getattr(s, axis))
        if abs(gap) >= 8 and ask.rng.random() < 0.6:
            a, b = (ask.rng.choice(names(scene, v)) for v in (s, t))
            yield (ask.yes_no(key, gap > 0, "position", a=a, b=b),)


def _about_sizes(ask: Asker, scene: Scene) -> Iterator[Chain]:
    ranked = sorted(scene.shapes, key=lambda s: s.radius)
    small, large = ranked[0], ranked[-1]
    ends: dict[str, Shape] = {}
    if all(large.clearly_larger(other) for other in ranked[:-1]):
        ends["largest"] = large
    if all(other.clearly_larger(small) for other in ranked[1:]):
        ends["smallest"] = small
    for key, s in ends.items():
        yield (ask.turn(key, full(s), "size"),)
        spot = place(s)
        if spot and ask.rng.random() < 0.5:
            yield ask.turn(key, full(s), "size"), ask.turn("its_place", spot, "follow_up")
    if len(ends) == 2:
        yield ask.turn("largest", full(large), "size"), ask.turn("and_the", full(small), "follow_up", a="smallest one")
    s, t = ask.rng.sample(scene.shapes, 2)
    called = names(scene, s), names(scene, t)
    if all(called) and (s.clearly_larger(t) or t.clearly_larger(s)):
        a, b = (ask.rng.choice(c) for c in called)
        yield (ask.yes_no("larger", s.clearly_larger(t), "size", a=a, b=b),)


def about_lettering(ask: Asker, scene: Scene) -> Iterator[Chain]:
    """All chains about a number or a word."""
    text = scene.lettering
    if text is None:
        return
    kind = "number" if text.is_number else "word"
    yield (ask.turn(f"read_{kind}", text.text, "read"),)
    yield (ask.turn("read", text.text, "read"),)
    yield (ask.turn("text_colour", say(text.colour), "text_colour", t=kind),)
    yield ask.turn("read", text.text, "read"), ask.turn("its_colour", say(text.colour), "follow_up")


def about_bars(ask: Asker, scene: Scene) -> Iterator[Chain]:
    """All chains about a bar chart."""
    ranked = sorted(scene.bars, key=lambda b: b.height)
    tallest, shortest = (
        ask.turn("tallest", say(ranked[-1].colour), "chart"),
        ask.turn("shortest", say(ranked[0].colour), "chart"),
    )
    yield (tallest,)
    yield (shortest,)
    yield (ask.turn("count_bars", str(len(ranked)), "chart"),)
    yield (ask.turn("first_bar", say(scene.bars[0].colour), "chart"),)
    yield (ask.turn("last_bar", say(scene.bars[-1].colour), "chart"),)
    yield (ask.turn("what_kind", "A bar chart.", "chart"),)
    yield tallest, ask.turn("and_the", shortest.answer, "follow_up", a=ask.rng.choice(("shortest", "smallest")))
    for _ in range(2):
        b, c = ask.rng.sample(scene.bars, 2)
        yield (ask.yes_no("taller", b.height > c.height, "chart", c=b.colour, d=c.colour),)


def about_two(ask: Asker, scenes: tuple[Scene, ...], changed: tuple[str, int] | None) -> Iterator[Chain]:
    """All chains that compare two pictures; `changed` tells how the second was made from the first, if it was."""
    counts = [len(scene.shapes) for scene in scenes]
    yield (ask.yes_no("same_count", counts[0] == counts[1], "compare"),)
    more = "Both have the same number." if counts[0] == counts[1] else say("the " + ORDINALS[counts[1] > counts[0]])
    yield (ask.turn("more", more, "compare"),)
    for n, scene in zip(ORDINALS, scenes, strict=True):
        yield (ask.turn("count_in", str(len(scene.shapes)), "compare", n=n),)
        thing, (here,) = thing_to_look_for(ask.rng, (scene,))
        yield (ask.yes_no("exist_in", here, "compare", x=thing, n=n),)
        single = [s for s in scene.shapes if only((t.kind for t in scene.shapes), s.kind)]
        if single:
            s = ask.rng.choice(single)
            yield (ask.turn("colour_in", say(s.colour), "compare", a=s.kind, n=n),)
    thing, here = thing_to_look_for(ask.rng, scenes)
    if sum(here) == 1:
        yield (ask.turn("which_has", say("the " + ORDINALS[here.index(True)]), "compare", x=thing),)
    if changed is not None:
        yield from _about_change(ask, scenes[0], *changed)


def _about_change(ask: Asker, before: Scene, kind: str, index: int) -> Iterator[Chain]:
    shape = before.shapes[index]
    said = {
        "none": "Nothing.",
        "missing": f"The {shape.colour} {shape.kind} is missing.",
        "colour": f"The colour of the {shape.kind}.",
        "shape": f"The {shape.colour} shape.",
    }
    yield (ask.turn("differs", said[kind], "compare"),)
    yield (ask.yes_no("identical", kind == "none", "compare"),)
    yield (ask.yes_no("different", kind != "none", "compare"),)


def listing(parts: list[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def caption(scene: Scene) -> str | None:
    """One sentence, shapes from left to right; None where two stand about as far left."""
    ordered = sorted(scene.shapes, key=lambda s: s.x)
    if any(b.x - a.x < 4 for a, b in zip(ordered, ordered[1:], strict=False)):
        return None
    parts = [an(" ".join(s.pair)) for s in ordered]
    if scene.lettering is not None:
        kind = "number" if scene.lettering.is_number else "word"
        parts.insert(0, f"the {kind} {scene.lettering.text} in {scene.lettering.colour}")
    if scene.bars:
        parts.append(f"a bar chart with {listing([_bar(b) for b in scene.bars])}")
    return say(listing(parts)) if parts else "Nothing."


def _bar(bar: Bar) -> str:
    return an(f"{bar.colour} bar")


def about_one(ask: Asker, scene: Scene) -> Iterator[Chain]:
    """All chains about one picture, whatever it shows."""
    if scene.bars:
        yield from about_bars(ask, scene)
    elif scene.lettering is None or scene.shapes:
        yield from about_shapes(ask, scene)
    if scene.lettering is not None:
        yield from about_lettering(ask, scene)
    sentence = caption(scene)
    if sentence:
        brief = not scene.bars and len(scene.shapes) < 3 and ask.rng.random() < 0.3
        yield (ask.turn("what_kind" if brief else "describe", sentence, "describe"),)
