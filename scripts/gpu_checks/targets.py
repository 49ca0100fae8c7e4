"""What is aimed at on an H100, beside what was found. Fractions are of the copy bandwidth of the same run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]

MODEL = "Llama-3-8B"
GEMV = {"4k x 14k": 0.60, "8k x 28k": 0.80}  # of the copy's bandwidth, for one row
GEMM, GEMM_ROWS = 0.50, range(2, 17)  # of the same shapes
ATTENTION, ATTENTION_FROM = 0.50, 4096  # keys
PREFILL, PREFILL_FROM = 0.9, 512  # times float16's speed; rows
AHEAD, BEHIND = 1.0, 0.9  # times a rival's speed: the geometric mean over shapes, and each shape
ROOFLINE, ROOFLINE_GOAL = 0.60, 0.80
TIMES, TIMES_GOAL = 2.5, 3.0  # transformers' speed


class Target(NamedTuple):
    """What is aimed at, what was found, the floor, and the goal where there is one beyond it."""

    aim: str
    found: float
    floor: float
    goal: float | None = None

    @property
    def held(self) -> str:
        if not self.found >= self.floor:
            return "NO"
        return "yes" if self.goal is None or self.found >= self.goal else f"floor yes, goal {self.goal:g} NO"


def targets(stages: Json) -> list[Target]:
    """All that figures are there for."""
    kernels, whole = stages.get("kernels", {}), stages.get("endtoend", {})
    return [*_linears(kernels), *_attention(kernels), *_rivals(kernels), *_endtoend(whole)]


def linears(kernels: Json) -> dict[str, Json]:
    """The linears that were timed; one that failed has no figures."""
    found = {name.removeprefix("linear "): one for name, one in kernels.items() if name.startswith("linear ")}
    return {name: one for name, one in found.items() if "ours" in one}


def times(kernels: Json, name: str, rival: str) -> float | None:
    """How many times our time a rival took for a linear; None where it did not run."""
    seconds = kernels.get(f"{rival} linear {name}", {}).get("seconds")
    return None if seconds is None else seconds / linears(kernels)[name]["ours"]


def mean_times(kernels: Json, rival: str) -> tuple[float, float, str] | None:
    """The geometric mean of `times` over shapes, the least, and whose it is; None where the rival never ran."""
    known = {name: one for name in linears(kernels) if (one := times(kernels, name, rival)) is not None}
    if not known:
        return None
    worst = min(known, key=lambda name: known[name])
    return math.exp(statistics.fmean(map(math.log, known.values()))), known[worst], worst


def rows_of(name: str) -> int:
    """The rows in a linear's name."""
    return int(name.rpartition(" rows ")[2])


def _linears(kernels: Json) -> Iterator[Target]:
    for shape, part in GEMV.items():
        of_shape = {name: found for name, found in linears(kernels).items() if name.startswith(f"{shape} ")}
        one = [found["of_copy"] for name, found in of_shape.items() if rows_of(name) == 1]
        few = [found["of_copy"] for name, found in of_shape.items() if rows_of(name) in GEMM_ROWS]
        if one:
            yield Target(f"linear {shape}, 1 row: of the copy's bandwidth", min(one), part)
        if few:
            yield Target(f"linear {shape}, 2 to 16 rows: of the copy's bandwidth, at worst", min(few), GEMM)
    wide = [
        one
        for name in linears(kernels)
        if rows_of(name) >= PREFILL_FROM and (one := times(kernels, name, "float16")) is not None
    ]
    if wide:
        yield Target(f"linears from {PREFILL_FROM} rows on: times float16's speed, at worst", min(wide), PREFILL)


def _attention(kernels: Json) -> Iterator[Target]:
    copied = kernels.get("copy", {}).get("bytes_per_second")
    far = [
        found["bytes_per_second"] / copied
        for name, found in kernels.items()
        if copied and name.startswith("attention ") and "ours" in found and _length(name) >= ATTENTION_FROM
    ]
    if far:
        yield Target(f"attention from {ATTENTION_FROM} keys on: of the copy's bandwidth, at worst", min(far), ATTENTION)


def _length(name: str) -> int:
    return int(name.split(" length ")[1].split()[0])


def _rivals(kernels: Json) -> Iterator[Target]:
    for rival in kernels.get("rivals", {}):
        if (found := mean_times(kernels, rival)) is not None:
            mean, least, worst = found
            yield Target(f"geometric mean over the shapes: times {rival}'s speed", mean, AHEAD)
            yield Target(f"no shape far behind {rival}: times its speed, at worst ({worst})", least, BEHIND)


def _endtoend(whole: Json) -> Iterator[Target]:
    ours = whole.get(f"{MODEL}, int8 head", {}).get("decode")
    if not ours:
        return
    yield Target(f"{MODEL}, decoding: of the byte roofline", ours[0]["of_roofline"], ROOFLINE, ROOFLINE_GOAL)
    for kind in ("transformers float16", "transformers float16 compiled"):
        if theirs := whole.get(f"{MODEL}, {kind}", {}).get("decode"):
            found = theirs[0]["seconds"] / ours[0]["seconds"]
            yield Target(f"{MODEL}, decoding: times the speed of {kind}", found, TIMES, TIMES_GOAL)
