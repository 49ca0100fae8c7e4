"""What `tinychat eval` reports: how many questions with known answers a model answers rightly."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinychat.errors import UsageError

if TYPE_CHECKING:
    from tinychat.engine.engine import Engine
    from tinychat.eval.tasks import TaskScore

SCHEMA = "tinychat.eval/1"


@dataclass(frozen=True, slots=True)
class Plan:
    """Which model, how many questions of each task and split, and which tasks (all where none is named)."""

    model: str
    per_task: int
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from tinychat.eval.demo import TASKS

        for task in self.only:
            if task not in TASKS:
                raise UsageError(f"there is no task {task!r}", f"the tasks are {', '.join(TASKS)}")


def measure(plan: Plan, engine: Engine, report: Callable[[str], None]) -> dict[str, Any]:
    """The scores as a JSON object; `report` gets a line a task as it comes."""
    from tinychat.eval.demo import TASKS
    from tinychat.eval.tasks import score_tasks

    started = time.perf_counter()
    scores: list[dict[str, Any]] = []
    for score in score_tasks(engine, plan.per_task, plan.only or TASKS):
        scores.append(_as_json(score))
        report(f"{score.split} {score.task}: {score.right} of {score.asked}")
    return {
        "schema": SCHEMA,
        "model": plan.model,
        "tasks": "demo",
        "scores": scores,
        "seconds": round(time.perf_counter() - started, 3),
    }


def rows(found: dict[str, Any]) -> list[list[str]]:
    """A head and a row a task: the share of right answers and its 95 % interval, validation beside held-out."""
    splits = list(dict.fromkeys(score["split"] for score in found["scores"]))
    cells = {(score["task"], score["split"]): _cell(score) for score in found["scores"]}
    tasks = dict.fromkeys(score["task"] for score in found["scores"])
    return [["task", *splits], *([task, *(cells[task, split] for split in splits)] for task in tasks)]


def _cell(score: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in score["interval"])
    return f"{100 * score['share']:.1f} % ({low:.0f}-{high:.0f})"


def _as_json(score: TaskScore) -> dict[str, Any]:
    low, high = score.interval
    return {
        "split": score.split,
        "task": score.task,
        "right": score.right,
        "asked": score.asked,
        "share": round(score.share, 4),
        "interval": [round(low, 4), round(high, 4)],
    }
