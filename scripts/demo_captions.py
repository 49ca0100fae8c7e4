"""Captions of generated scenes, and which captions are true of which scene.

A scene has facts, short strings such as `red circle` or `=2 star`; a caption needs some of them. It is true of every
scene that has them all, so that a training batch can leave out what is right by chance.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tinychat.eval.demo import scenes
from tinychat.eval.demo.samples import FAMILIES, Split
from tinychat.eval.demo.scenes import COLOURS, IMAGE_SIZE, SHAPES, Scene, Shape

NUMBERS = ("no", "one", "two", "three", "four", "five")
HELD_OUT = frozenset({("gray", "heart"), ("black", "star"), ("purple", "cross"), ("orange", "square")})
APART = 12.0  # pixels of an IMAGE_SIZE square between the middles of what is left of or above something
PREFIXES = ("a picture of", "a picture with", "an image of", "an image with", "a photo of", "show me", "find")


@dataclass(frozen=True, slots=True)
class Caption:
    """A text in small letters, and the facts that make it true."""

    text: str
    needs: frozenset[str]


Drawn = tuple[str, tuple[str, ...]]  # a phrase and its needs
Telling = Callable[[random.Random, Scene], Drawn]


def facts(scene: Scene) -> frozenset[str]:
    """All that a caption may need of the scene."""
    found = {f"whole {_whole(scene)}", *_shape_facts(scene), *_places(scene)}
    if scene.lettering is not None:
        text, kind = scene.lettering.text.lower(), _lettering_kind(scene)
        colour = scene.lettering.colour
        found |= {f"reads {text}", kind, f"{colour} {kind}"}
    if scene.bars:
        ranked = sorted(scene.bars, key=lambda bar: bar.height)
        found |= {"chart", f"={len(ranked)} bars", f"tallest {ranked[-1].colour}", f"shortest {ranked[0].colour}"}
        found |= {f"{bar.colour} bar" for bar in ranked}
    return frozenset(found)


def _shape_facts(scene: Scene) -> Iterator[str]:
    for named in (
        [f"{s.colour} {s.kind}" for s in scene.shapes],
        [s.kind for s in scene.shapes],
        [f"{s.colour} shape" for s in scene.shapes],
        ["shape" for _ in scene.shapes],
    ):
        for name, count in Counter(named).items():
            yield name
            yield f"={count} {name}"
    if not (scene.shapes or scene.bars or scene.lettering):
        yield "nothing"


def _places(scene: Scene) -> Iterator[str]:
    for shape in scene.shapes:
        if place := _place(shape):
            yield f"{shape.colour} {shape.kind} {place}"
        for other in scene.shapes:
            yield from (f"{_pair(shape)} {relation} {_pair(other)}" for relation in _relations(shape, other))


def _place(shape: Shape) -> str:
    """`at the top left` where the shape is clearly in a corner, else nothing."""
    low, high = 0.42 * IMAGE_SIZE, 0.58 * IMAGE_SIZE
    row = "top" if shape.y < low else "bottom" if shape.y > high else ""
    column = "left" if shape.x < low else "right" if shape.x > high else ""
    return f"at the {row} {column}" if row and column else ""


def _relations(a: Shape, b: Shape) -> Iterator[str]:
    across, down = b.x - a.x, b.y - a.y
    if abs(across) > max(APART, abs(down)):
        yield "left of" if across > 0 else "right of"
    if abs(down) > max(APART, abs(across)):
        yield "above" if down > 0 else "below"


def _pair(shape: Shape) -> str:
    return f"{shape.colour} {shape.kind}"


def _lettering_kind(scene: Scene) -> str:
    return "number" if scene.lettering is not None and scene.lettering.is_number else "word"


def _whole(scene: Scene) -> str:
    shapes = sorted(map(_pair, scene.shapes))
    text = f"{scene.lettering.text.lower()} {scene.lettering.colour}" if scene.lettering else ""
    return f"{shapes} {text} {[bar.colour for bar in scene.bars]}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _several(rng: random.Random, count: int, noun: str) -> str:
    if count == 1:
        return rng.choice((_a(noun), _a(noun), _a(noun), f"one {noun}", noun))
    return f"{rng.choice((NUMBERS[count], NUMBERS[count], str(count)))} {plural(noun)}"


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def tell_all(rng: random.Random, scene: Scene) -> Drawn:
    """Everything that the picture shows."""
    parts = [_several(rng, count, noun) for noun, count in Counter(map(_pair, scene.shapes)).items()]
    rng.shuffle(parts)
    if scene.lettering is not None:
        parts.insert(0, f"{_reading(rng, scene)} in {scene.lettering.colour}")
    if scene.bars:
        parts.append(f"a chart with {_listed([f'a {bar.colour} bar' for bar in scene.bars])}")
    return _listed(parts) if parts else "nothing", (f"whole {_whole(scene)}",)


def _reading(rng: random.Random, scene: Scene) -> str:
    assert scene.lettering is not None
    name = rng.choice(("the number", "a number", "the digits") if scene.lettering.is_number else ("the word", "a word"))
    return f"{name} {scene.lettering.text.lower()}"


def _some(rng: random.Random, scene: Scene) -> Drawn:
    """One or two of the kinds of shapes, with their numbers."""
    counts = Counter(map(_pair, scene.shapes))
    chosen = rng.sample(sorted(counts), min(len(counts), rng.choice((1, 1, 2))))
    needs = tuple(noun if counts[noun] == 1 else f"={counts[noun]} {noun}" for noun in chosen)
    return _listed([_several(rng, counts[noun], noun) for noun in chosen]), needs


def _any_number(rng: random.Random, scene: Scene) -> Drawn:
    """A plural without a number, or a colour or a kind alone."""
    shape = rng.choice(scene.shapes)
    noun = rng.choice((shape.kind, f"{shape.colour} shape", _pair(shape)))
    return rng.choice((noun, _a(noun), plural(noun))), (noun,)


def _counted(rng: random.Random, scene: Scene) -> Drawn:
    shape = rng.choice(scene.shapes)
    noun = rng.choice((shape.kind, f"{shape.colour} shape", "shape"))
    count = sum(noun in (other.kind, f"{other.colour} shape", "shape") for other in scene.shapes)
    return _several(rng, count, noun), (f"={count} {noun}",)


def _placed(rng: random.Random, scene: Scene) -> Drawn:
    shape = rng.choice(scene.shapes)
    if not (place := _place(shape)):
        return _some(rng, scene)
    return f"{_a(_pair(shape))} {place}", (f"{_pair(shape)} {place}",)


def _related(rng: random.Random, scene: Scene) -> Drawn:
    a, b = rng.choices(scene.shapes, k=2)
    relations = list(_relations(a, b))
    if not relations:
        return _some(rng, scene)
    relation = rng.choice(relations)
    written = rng.choice((relation, f"to the {relation}")) if relation.endswith("of") else relation
    return f"{_a(_pair(a))} {written} {_a(_pair(b))}", (f"{_pair(a)} {relation} {_pair(b)}",)


def _read(rng: random.Random, scene: Scene) -> Drawn:
    assert scene.lettering is not None
    text, kind = scene.lettering.text.lower(), _lettering_kind(scene)
    colour = f"{scene.lettering.colour} {kind}"
    reads = f"reads {text}"
    return rng.choice(
        ((_reading(rng, scene), (reads,)), (text, (reads,)), (f"{_a(colour)} {text}", (reads, colour)),
         (_a(colour), (colour,)), (_a(kind), (kind,)))
    )  # fmt: skip


def _charted(rng: random.Random, scene: Scene) -> Drawn:
    ranked = sorted(scene.bars, key=lambda bar: bar.height)
    high, low, one = ranked[-1].colour, ranked[0].colour, rng.choice(ranked).colour
    return rng.choice(
        ((f"a chart where the {high} bar is the tallest", (f"tallest {high}",)),
         (f"a chart where the {low} bar is the shortest", (f"shortest {low}",)),
         (f"a chart with {_a(f'{one} bar')}", (f"{one} bar",)), (rng.choice(("a bar chart", "a chart")), ("chart",)),
         (f"a chart with {_several(rng, len(ranked), 'bar')}", (f"={len(ranked)} bars",)))
    )  # fmt: skip


SHAPE_TELLINGS: tuple[Telling, ...] = (_some, _some, _any_number, _counted, _placed, _related)


def tell_part(rng: random.Random, scene: Scene) -> Drawn:
    """Something of what the picture shows."""
    tellings = list[Telling]()
    if scene.shapes:
        tellings.append(rng.choice(SHAPE_TELLINGS))
    if scene.lettering is not None:
        tellings.append(_read)
    if scene.bars:
        tellings.append(_charted)
    if not tellings:
        return rng.choice(("an empty picture", "no shapes", "a blank page")), ("nothing",)
    return rng.choice(tellings)(rng, scene)


def caption(rng: random.Random, scene: Scene, telling: Telling) -> Caption:
    text, needs = telling(rng, scene)
    prefix = f"{rng.choice(PREFIXES)} " if rng.random() < 0.2 else ""
    return Caption(prefix + text, frozenset(needs))


def compose(rng: random.Random, split: Split) -> Scene:
    """Shapes mostly, else lettering, bars, or both: as the split's style has them."""
    style, chance = FAMILIES[split].style, rng.random()
    if chance < 0.64:
        return scenes.compose_shapes(rng, style, rng.choices(range(scenes.MAX_SHAPES + 1), (1, 16, 22, 22, 20, 19))[0])
    if chance < 0.82:
        return scenes.compose_lettering(rng, style)
    return scenes.compose_chart(rng, style) if chance < 0.9 else scenes.compose_mixed(rng, style)


def holds_out(scene: Scene) -> bool:
    """Whether a combination of colour and kind is in it that training never shows."""
    return any(shape.pair in HELD_OUT for shape in scene.shapes)


def words() -> list[str]:
    """Every word that captions are made of, but for what is read off a picture."""
    nouns = [*SHAPES, "shape", "bar", "word", "number", "digits", "chart", "picture", "image", "photo", "page"]
    others = (
        "a an the one no nothing of with in and to where is at left right above below top bottom tallest shortest "
        "blank empty show me find drawing there are"
    )
    return [*COLOURS, *nouns, *map(plural, nouns[:9]), *NUMBERS, *others.split()]
