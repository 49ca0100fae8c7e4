"""Bounds on figures: how they are written, which are met, and what is said of those that are not."""

from __future__ import annotations

import math

import pytest

from tinychat.errors import UsageError
from tinychat.eval.card import Card, Column, Measured
from tinychat.eval.divergence import Divergence, Estimate
from tinychat.eval.fidelity import Fidelity, LayerFidelity
from tinychat.eval.gate import FIGURES, Bound, check_measured, figures, parse, shortfalls
from tinychat.eval.probes import ProbeScore


def exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def card() -> Card:
    found = Divergence(10, 4, exactly(0.02), exactly(0.3), exactly(0.9), (None, 2, None, None), (), ())
    layers = (LayerFidelity(0, Fidelity(21, 1)), LayerFidelity(1, Fidelity(18, 1)))
    column = Column("4 bit", 6.6, (ProbeScore("count", None, 3, 4),), {"all": found}, layers)
    return Card({"base": Column("16 bit", 6.0), "quantized": column}, Measured("plain", 1), {}, (), {})


def test_every_figure_is_found() -> None:
    found = figures(card(), [{"share": 0.5}, {"share": 0.25}])
    expected = {
        "demo": 0.25, "probes": 0.75, "ppl": 6.6, "ppl_ratio": 1.1, "kl": 0.02, "kl99": 0.3, "top1": 0.9,
        "unchanged": 0.75, "sqnr": 18,
    }  # fmt: skip
    assert found == pytest.approx(expected) and set(found) == set(FIGURES)
    assert figures(None, [{"share": 0.5}]) == {"demo": 0.5}


def test_bounds_are_names_with_values() -> None:
    assert parse("top1=0.95, kl=0.05,probes=.8") == (Bound("top1", 0.95), Bound("kl", 0.05), Bound("probes", 0.8))
    assert parse("0.5") == (Bound("demo", 0.5),)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("taste=1", "--fail-under names 'taste'; the figures are demo, probes, ppl, "),
        ("=1", "--fail-under names ''"),
        ("kl=", "--fail-under has 'kl='; write name=value, such as top1=0.95,kl=0.05"),
        ("kl=low", "--fail-under has 'kl=low'"),
        ("top1=nan", "--fail-under has 'top1=nan'"),
        ("kl=0.1,", "--fail-under has ''"),
    ],
)
def test_what_is_no_bound_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse(text)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("top1=0.9,kl=0.02,sqnr=18,ppl_ratio=1.2", []),
        ("demo=0.5", ["demo could not be measured, it must be at least 0.5"]),
        ("top1=0.91", ["top1 is 0.9, it must be at least 0.91"]),
        ("kl=0.01,probes=0.9", ["kl is 0.02, it must be at most 0.01", "probes is 0.75, it must be at least 0.9"]),
    ],
)
def test_a_figure_on_the_wrong_side_is_named(text: str, sentences: list[str]) -> None:
    assert shortfalls(parse(text), figures(card())) == sentences


@pytest.mark.parametrize("name", list(FIGURES))
def test_what_is_not_a_number_meets_no_bound(name: str) -> None:
    assert not Bound(name, 0.5).met(math.nan)


@pytest.mark.parametrize(
    ("text", "tasks", "against", "sentence"),
    [
        ("kl=1", ("ppl",), False, "names kl, which is not measured; add --against BASE"),
        ("0.5", ("ppl",), True, "names demo, which is not measured; add --tasks demo"),
        ("ppl_ratio=2", ("demo",), False, "names ppl_ratio, which is not measured; add --tasks ppl and --against BASE"),
    ],
)
def test_bounds_need_their_measures(text: str, tasks: tuple[str, ...], against: bool, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_measured(parse(text), tasks, against)
    check_measured(parse(text), ("demo", "ppl", "probes"), True)
