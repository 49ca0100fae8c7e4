"""Samples: pictures with their dialogue and dense labels, each a function of a split, an index and a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from tinychat.eval.demo import beyond, dense, dialogues, heldout, phrases, pictures, questions, scenes
from tinychat.eval.demo.questions import Asker, Chain, Phrases, Turn
from tinychat.eval.demo.scenes import Scene, Style

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")


@dataclass(frozen=True, eq=False)
class Sample:
    """Pictures [S, S, 3] uint8, the turns about them, a system prompt or none, dense labels [N, C, GRID, GRID]."""

    pictures: tuple[np.ndarray, ...]
    turns: tuple[Turn, ...]
    system: str | None
    dense: np.ndarray


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A sample before its pictures are painted."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]
    system: str | None


@dataclass(frozen=True, slots=True)
class Family:
    """A style of pictures, the phrases that go with it, and how often each task is asked."""

    style: Style
    phrases: Phrases
    dressed: bool
    weights: Mapping[str, float] = field(default_factory=lambda: dialogues.TASK_WEIGHTS)


_TRAINING = Family(pictures.TRAINING, {**phrases.QUESTIONS, "unknown": beyond.UNKNOWN}, True)
FAMILIES: dict[Split, Family] = {
    "train": replace(_TRAINING, weights=dialogues.DRILL),
    "validation": _TRAINING,
    "heldout": Family(heldout.STYLE, {**phrases.QUESTIONS, **heldout.QUESTIONS}, False),
}

Chains = list[Chain]
Composed = tuple[tuple[Scene, ...], tuple[Chains, ...]]
Composer = Callable[[random.Random, Family], Composed]


def _one(rng: random.Random, family: Family, scene: Scene) -> Composed:
    return (scene,), ([*_about(rng, family, scene), (dialogues.talk(Asker(rng, family.phrases)),)],)


def _about(rng: random.Random, family: Family, scene: Scene) -> Chains:
    ask = Asker(rng, family.phrases)
    return [*questions.about_one(ask, scene), (dialogues.unknown(ask),)]


def _some_shapes(rng: random.Random, family: Family) -> Scene:
    count = rng.choices(range(scenes.MAX_SHAPES + 1), (2, 10, 16, 24, 24, 24))[0]
    return scenes.compose_shapes(rng, family.style, count)


def _shapes(rng: random.Random, family: Family) -> Composed:
    return _one(rng, family, _some_shapes(rng, family))


def _lettering(rng: random.Random, family: Family) -> Composed:
    return _one(rng, family, scenes.compose_lettering(rng, family.style))


def _chart(rng: random.Random, family: Family) -> Composed:
    return _one(rng, family, scenes.compose_chart(rng, family.style))


def _mixed(rng: random.Random, family: Family) -> Composed:
    return _one(rng, family, scenes.compose_mixed(rng, family.style))


def _pair(rng: random.Random, family: Family) -> Composed:
    first = scenes.compose_shapes(rng, family.style, rng.randint(1, scenes.MAX_SHAPES))
    if rng.random() < 0.4:
        second, changed = scenes.change(rng, family.style, first)
    else:
        second, changed = scenes.compose_shapes(rng, family.style, rng.randint(1, scenes.MAX_SHAPES)), None
    pair = first, second
    return pair, (list(questions.about_two(Asker(rng, family.phrases), pair, changed)),)


def _one_more(rng: random.Random, family: Family) -> Composed:
    """A second picture comes after some turns about the first: what is asked then is about the second, or both."""
    first, second = (
        _some_shapes(rng, family) if rng.random() < 0.6 else scenes.compose_lettering(rng, family.style)
        for _ in range(2)
    )
    later = _about(rng, family, second)
    if first.lettering is None and second.lettering is None:
        later += questions.about_two(Asker(rng, family.phrases), (first, second), None)
    return (first, second), (_about(rng, family, first), later)


def _nothing(rng: random.Random, family: Family) -> Composed:
    return (), (list(dialogues.without_picture(Asker(rng, family.phrases))),)


COMPOSERS: tuple[tuple[float, int, Composer], ...] = (
    (0.35, 1, _shapes),
    (0.39, 1, _lettering),
    (0.08, 1, _chart),
    (0.05, 1, _mixed),
    (0.08, 2, _pair),
    (0.03, 2, _one_more),
    (0.02, 0, _nothing),
)


def dialogue(rng: random.Random, split: Split, pictures: int | None = None) -> Dialogue:
    """Scenes and turns without painting; `pictures` asks for samples with just so many pictures."""
    family = FAMILIES[split]
    rows = [row for row in COMPOSERS if pictures in (None, row[1])]
    shown, groups = rng.choices(rows, [row[0] for row in rows])[0][2](rng, family)
    turns: list[Turn] = []
    for chains in groups:
        part = dialogues.choose(rng, chains, 1 / len(groups), family.weights)
        if family.dressed:
            part = tuple(replace(turn, question=dialogues.dress(rng, turn.question)) for turn in part)
        turns += [replace(part[0], pictures=len(shown) // len(groups)), *part[1:]]
    system = rng.choice(beyond.SYSTEMS) if rng.random() < 0.08 else None
    kept = dialogues.fitting(turns)
    return Dialogue(shown[: sum(turn.pictures for turn in kept)], kept, system)


def sample(rng: random.Random, split: Split, pictures: int | None = None) -> Sample:
    """A sample of a split, drawn with `rng`; `pictures` (0, 1 or 2) keeps to samples with so many pictures."""
    drawn = dialogue(rng, split, pictures)
    painted = tuple(FAMILIES[split].style.paint(rng, scene) for scene in drawn.scenes)
    labels = [dense.dense(scene) for scene in drawn.scenes]
    empty = np.zeros((0, len(dense.CHANNELS), scenes.GRID, scenes.GRID), np.int64)
    return Sample(painted, drawn.turns, drawn.system, np.stack(labels) if labels else empty)


def generator(split: Split, index: int, seed: int = 0) -> random.Random:
    """The source of chance of one sample: no two splits share one."""
    return random.Random(f"{split}/{seed}/{index}")


def sample_at(split: Split, index: int, seed: int = 0, pictures: int | None = None) -> Sample:
    """Sample `index` of a split: the same one at every call."""
    return sample(generator(split, index, seed), split, pictures)


def dialogue_at(split: Split, index: int, seed: int = 0) -> Dialogue:
    """The scenes and turns of `sample_at`."""
    return dialogue(generator(split, index, seed), split)
