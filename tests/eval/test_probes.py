"""Probes: the same at every call, solvable by who knows the answers, and their text as large as it is said to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from tinychat.core import Failed
from tinychat.errors import ModelError
from tinychat.eval import probes
from tinychat.eval.demo import heldout as painter
from tinychat.eval.demo import sample_at, task_questions
from tinychat.eval.demo.questions import Turn
from tinychat.eval.probes import Probe, draw_probes, edits, misread, right, score_probes, share_right

NAMES = ("demo", "plain")


def drawn(name: str, count: int) -> list[Probe]:
    return list(draw_probes(name, count))


@pytest.mark.parametrize("name", NAMES)
def test_probes_are_the_same_at_every_call(name: str) -> None:
    one, other = drawn(name, 1), drawn(name, 2)[::2]
    assert [probe.turn for probe in one] == [probe.turn for probe in other]
    assert all((a.picture == b.picture).all() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_who_knows_the_answers_gets_all_and_who_does_not_none(name: str) -> None:
    asked = drawn(name, 2)
    scores = score_probes(ScriptedEngine([probe.turn.answer for probe in asked]), iter(asked))
    assert {score.share for score in scores} == {1.0} and share_right(scores) == 1.0
    assert {score.errors for score in scores} == {0.0, None}
    none = score_probes(ScriptedEngine(["I do not know."]), iter(asked))
    assert {score.share for score in none} == {0.0} and share_right(none) == 0.0
    sizes = [score.size for score in scores if score.kind == "read"]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)  # type: ignore[type-var]
    assert [score.kind for score in scores if score.size is None] == ["count", "colour", "chart"]


def test_every_kind_weighs_the_same() -> None:
    score = probes.ProbeScore
    assert share_right((score("read", 0.5, 0, 10), score("read", 0.1, 0, 10), score("count", None, 4, 4))) == 0.5


@lru_cache(maxsize=1)
def training() -> set[bytes]:
    samples: Iterator[np.ndarray] = (p for i in range(300) for p in sample_at("train", i).pictures)
    return {picture.tobytes() for picture in samples}


def test_no_probe_is_a_picture_of_the_demo_task_sets() -> None:
    others = {p.tobytes() for sample, _ in task_questions("heldout", "read", 30) for p in sample.pictures} | training()
    assert not others & {probe.picture.tobytes() for probe in drawn("demo", 10)}


def ink(picture: np.ndarray, plain: np.ndarray) -> tuple[int, int, int, int]:
    """The box of what differs between two pictures: top, bottom, left, right."""
    rows, columns = np.nonzero(np.abs(picture.astype(int) - plain.astype(int)).max(2) > 60)
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


@pytest.mark.parametrize("name", NAMES)
def test_text_has_its_size_and_lies_in_the_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ink of `d` and the like takes about two thirds of a line's height."""
    made = probes.SETS[name]
    painted: list[tuple[np.ndarray, np.ndarray]] = []

    def both(rng: object, scene: object) -> np.ndarray:
        state = rng.getstate()  # type: ignore[attr-defined]
        shown = made.style.paint(rng, scene)  # type: ignore[arg-type]
        rng.setstate(state)  # type: ignore[attr-defined]
        painted.append((shown, made.style.paint(rng, replace(scene, lettering=None))))  # type: ignore[arg-type, type-var]
        return shown

    monkeypatch.setattr(painter, "WORDS", ("oak", "hut"))
    monkeypatch.setitem(probes.SETS, name, replace(made, style=replace(made.style, paint=both)))
    asked = [probe for probe in drawn(name, 3) if probe.kind == "read"]
    for probe, (shown, plain) in zip(asked, painted, strict=False):
        top, bottom, left, right_end = ink(shown, plain)
        side = len(shown)
        assert 0.45 <= (bottom - top) / (probe.size or 0) / side <= 1.0, (probe.size, top, bottom)
        assert top > 0 and bottom < side and left > 0 and right_end < side


@pytest.mark.parametrize(
    ("said", "task", "answer", "is_right"),
    [
        ("Red.", "colour", "Red.", True),
        ("The circle is red.", "colour", "Red.", True),
        ("It is red or blue.", "colour", "Red.", False),
        ("reddish", "colour", "Red.", False),
        ("3", "count", "3", True),
        ("There are three shapes.", "count", "3", True),
        ("There are 3 or 4.", "count", "3", False),
        ("There are 13.", "count", "3", False),
        ("Grey", "chart", "Gray.", True),
        ('The word is "CAB".', "read", "cab", True),
        ("c a b", "read", "cab", True),
        ("The word is cabin.", "read", "cab", False),
        ("", "read", "cab", False),
    ],
)
def test_sentences_count_where_they_name_the_answer_alone(said: str, task: str, answer: str, is_right: bool) -> None:
    assert right(said, Turn("?", answer, task)) is is_right


@pytest.mark.parametrize(
    ("said", "errors"),
    [("cab", 0), ("It says CAT.", 1 / 3), ("", 1), ("c a b", 0), ("cabbage and kings", 1), ("cabs", 1 / 3)],
)
def test_misread_characters_are_counted(said: str, errors: float) -> None:
    assert misread(said, Turn("?", "cab", "read")) == pytest.approx(errors)


def slow_edits(one: str, other: str) -> int:
    """The definition, by recursion."""
    if not one or not other:
        return len(one) + len(other)
    rest = slow_edits(one[1:], other[1:]) + (one[0] != other[0])
    return min(rest, slow_edits(one[1:], other) + 1, slow_edits(one, other[1:]) + 1)


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_edit_distance_is_its_definition(one: str, other: str) -> None:
    assert edits(one, other) == slow_edits(one, other)


def test_a_model_that_cannot_answer_is_named() -> None:
    with pytest.raises(ModelError, match="cannot be evaluated: it reads text only"):
        score_probes(ScriptedEngine([Failed("eval", "it reads text only", "take another", 2)]), draw_probes("demo", 1))
