"""Questions by task, and whether an answer is right."""

from __future__ import annotations

import re
from dataclasses import replace

from demo_data.dialogues import TASKS
from demo_data.samples import Sample, Split, sample_at

SEARCHED = 60


def task_questions(split: Split, task: str, n: int, seed: int = 0) -> list[tuple[Sample, int]]:
    """`n` samples with one question of the task each, and the index of its turn.

    The question opens a fresh dialogue (index 0); only a follow-up has the turn before it (index 1).
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; the tasks are {', '.join(TASKS)}")
    found: list[tuple[Sample, int]] = []
    for index in range(n * SEARCHED):
        if len(found) == n:
            break
        drawn = sample_at(split, index, seed)
        for at, turn in enumerate(drawn.turns):
            if turn.task == task:
                found.append(alone(drawn, at))
                break
    return found


def alone(drawn: Sample, at: int) -> tuple[Sample, int]:
    """The sample with the turn at `at` only, or with the one before it where it is a follow-up."""
    first = at - 1 if drawn.turns[at].task == "follow_up" else at
    turns = tuple(replace(turn, pictures=0) for turn in drawn.turns[first : at + 1])
    turns = (replace(turns[0], pictures=len(drawn.pictures)), *turns[1:])
    return replace(drawn, turns=turns, system=None), at - first


def normal(answer: str) -> str:
    """Small letters, single spaces, no final mark, one spelling."""
    text = re.sub(r"\s+", " ", answer).strip().lower().rstrip(".!").strip()
    return text.replace("grey", "gray").replace("color", "colour")


def correct(answer: str, expected: str, task: str) -> bool:
    """Whether an answer is the expected one but for case, spaces and the final mark."""
    if task == "read":
        return normal(answer).replace(" ", "") == normal(expected)
    return normal(answer) == normal(expected)
