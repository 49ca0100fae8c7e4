"""Questions by task, and whether an answer is right."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from PIL import Image

from tinychat.eval.demo.dialogues import TASKS
from tinychat.eval.demo.samples import Sample, Split, dialogue_at, sample_at

SEARCHED = 60


def task_questions(split: Split, task: str, n: int, seed: int = 0) -> list[tuple[Sample, int]]:
    """`n` samples with one question of the task each, and the index of its turn.

    The question opens a fresh dialogue (index 0); only a follow-up has the turn before it (index 1).
    """
    return [alone(sample_at(split, index, seed), at) for index, at in located(split, task, n, seed)]


def located(split: Split, task: str, n: int, seed: int = 0) -> list[tuple[int, int]]:
    """The first `n` samples with a question of the task: index of the sample, index of its turn."""
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; the tasks are {', '.join(TASKS)}")
    found: list[tuple[int, int]] = []
    for index in range(n * SEARCHED):
        if len(found) == n:
            break
        turns = dialogue_at(split, index, seed).turns
        if any(turn.pictures for turn in turns[1:]):
            continue  # a picture that comes later makes a question mean that picture
        found += [(index, at) for at, turn in enumerate(turns) if turn.task == task][:1]
    return found


def alone(drawn: Sample, at: int) -> tuple[Sample, int]:
    """The sample with the turn at `at` only, or with the one before it where it is a follow-up."""
    first = at - 1 if drawn.turns[at].task == "follow_up" else at
    turns = tuple(replace(turn, pictures=0) for turn in drawn.turns[first : at + 1])
    turns = (replace(turns[0], pictures=len(drawn.pictures)), *turns[1:])
    return replace(drawn, turns=turns, system=None), at - first


def export_task_set(folder: Path, split: Split, per_task: int, seed: int = 0) -> Path:
    """Write the questions of all tasks as JSON lines, and their pictures as PNG files; return the JSON lines' path.

    A line has `task`, `pictures` (file names), `history` (turns before, mostly none), `question` and `answer`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for task in TASKS:
        for index, at in located(split, task, per_task, seed):
            drawn, last = alone(sample_at(split, index, seed), at)
            names = [f"{index:06d}-{number}.png" for number in range(len(drawn.pictures))]
            for name, pixels in zip(names, drawn.pictures, strict=True):
                Image.fromarray(pixels).save(folder / name, optimize=True)
            history = [{"question": turn.question, "answer": turn.answer} for turn in drawn.turns[:last]]
            asked = {"question": drawn.turns[last].question, "answer": drawn.turns[last].answer}
            lines.append(json.dumps({"task": task, "pictures": names, "history": history, **asked}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def normal(answer: str) -> str:
    """Small letters, single spaces, no final mark, one spelling."""
    text = re.sub(r"\s+", " ", answer).strip().lower().rstrip(".!").strip()
    return text.replace("grey", "gray").replace("color", "colour")


def correct(answer: str, expected: str, task: str) -> bool:
    """Whether an answer is the expected one but for case, spaces and the final mark."""
    if task == "read":
        return normal(answer).replace(" ", "") == normal(expected)
    return normal(answer) == normal(expected)
