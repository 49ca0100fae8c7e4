"""A gate: bounds on figures, such as `top1=0.95,kl=0.05`, and which of them a model does not meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tinychat.errors import UsageError
from tinychat.eval import probes
from tinychat.eval.card import Card, Column


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that can be bounded: from below or from above, and which measure gives it."""

    at_least: bool
    measure: str
    meaning: str


FIGURES: Mapping[str, Figure] = {
    "demo": Figure(True, "demo", "the lowest share of right answers of a demo task"),
    "probes": Figure(True, "probes", "the share of right answers to the probes, each kind with the same weight"),
    "ppl": Figure(False, "ppl", "perplexity"),
    "ppl_ratio": Figure(False, "ppl and --against", "perplexity, divided by that of the model compared with"),
    "kl": Figure(False, "--against", "mean KL divergence a token"),
    "kl99": Figure(False, "--against", "its 99th percentile"),
    "top1": Figure(True, "--against", "the share of tokens with the same likeliest token"),
    "unchanged": Figure(True, "--against", "the share of greedy answers that do not diverge"),
    "sqnr": Figure(True, "--against", "the lowest SQNR of a layer's output, in dB"),
}


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure's name and the value that it must reach, or stay under."""

    name: str
    value: float

    def met(self, found: float | None) -> bool:
        """Whether a value keeps to the bound; NaN and none at all do not."""
        if found is None:
            return False
        return found >= self.value if FIGURES[self.name].at_least else found <= self.value

    def sentence(self, found: float | None) -> str:
        rule = "at least" if FIGURES[self.name].at_least else "at most"
        there = "could not be measured" if found is None else f"is {found:.4g}"
        return f"{self.name} {there}, it must be {rule} {self.value:g}"


def parse(text: str) -> tuple[Bound, ...]:
    """`name=value,...`; a number alone bounds `demo`. Raises UsageError for a name or a number that is none."""
    return tuple(_bound(item.strip()) for item in text.split(","))


def _bound(item: str) -> Bound:
    name, equals, value = (part.strip() for part in item.rpartition("="))
    name = name if equals else "demo"
    if name not in FIGURES:
        raise UsageError(f"--fail-under names {name!r}", f"the figures are {', '.join(FIGURES)}")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--fail-under has {item!r}", "write name=value, such as top1=0.95,kl=0.05")
    return Bound(name, number)


def check_measured(bounds: Iterable[Bound], tasks: Iterable[str], against: bool) -> None:
    """Raises UsageError for a bound on a figure that will not be measured."""
    there = {*tasks, *(["--against"] if against else [])}
    for bound in bounds:
        needed = FIGURES[bound.name].measure.split(" and ")
        if missing := [name for name in needed if name not in there]:
            how = " and ".join("--against BASE" if name == "--against" else f"--tasks {name}" for name in missing)
            raise UsageError(f"--fail-under names {bound.name}, which is not measured", f"add {how}")


def shortfalls(bounds: Iterable[Bound], figures: Mapping[str, float]) -> list[str]:
    """A sentence for each bound that is not met."""
    found = [(bound, figures.get(bound.name)) for bound in bounds]
    return [bound.sentence(value) for bound, value in found if not bound.met(value)]


def figures(card: Card | None, scores: Iterable[Mapping[str, Any]] = ()) -> dict[str, float]:
    """What was measured of the quantized model, by the names of FIGURES; `scores` are those of the demo tasks."""
    shares = [float(score["share"]) for score in scores]
    found = {"demo": min(shares)} if shares else {}
    if card is None:
        return found
    column, base = card.columns["quantized"], card.columns.get("base")
    return found | {name: value for name, of in _OF_CARD.items() if (value := of(column, base)) is not None}


Getter = Callable[[Column, Column | None], float | None]


def _of_divergence(of: Callable[[Any], float | None]) -> Getter:
    return lambda column, _: of(column.divergence["all"]) if column.divergence else None


def _ratio(column: Column, base: Column | None) -> float | None:
    if base is None or base.perplexity is None or column.perplexity is None:
        return None
    return column.perplexity / base.perplexity


_OF_CARD: Mapping[str, Getter] = {
    "probes": lambda column, _: probes.share_right(column.probes) if column.probes else None,
    "ppl": lambda column, _: column.perplexity,
    "ppl_ratio": _ratio,
    "kl": _of_divergence(lambda found: found.kl.value),
    "kl99": _of_divergence(lambda found: found.kl_p99.value),
    "top1": _of_divergence(lambda found: found.top1.value),
    "unchanged": _of_divergence(lambda found: found.unchanged),
    "sqnr": lambda column, _: min((layer.output.sqnr_db for layer in column.layers), default=None),
}
