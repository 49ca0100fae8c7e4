"""The demo tasks: generated pictures and questions with known answers, asked through the engine as a user would."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image as Pictures

from tinychat.core import Event, Failed, Finished, Image, Message, Request, StoppingParams, Text
from tinychat.errors import ModelError
from tinychat.eval.demo import TASKS, Sample, Split, correct, task_questions

SPLITS: tuple[Split, ...] = ("validation", "heldout")
ANSWER_TOKENS = 48


class Answering(Protocol):
    """What is needed of an engine."""

    def run(self, requests: list[Request]) -> Iterator[Event]: ...


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How many of a task's questions were answered rightly."""

    split: str
    task: str
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share (Wilson 1927)."""
        n, z, p = self.asked, 1.96, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return middle - half, middle + half


def score_tasks(
    engine: Answering, per_task: int = 200, tasks: tuple[str, ...] = TASKS, splits: tuple[Split, ...] = SPLITS
) -> Iterator[TaskScore]:
    """Greedy answers to `per_task` questions of each task and split, one score at a time.

    Raises ModelError where the engine cannot answer (a text-only model).
    """
    for split in splits:
        for task in tasks:
            asked = task_questions(split, task, per_task)
            right = sum(correct(answer(engine, sample, at), sample.turns[at].answer, task) for sample, at in asked)
            yield TaskScore(split, task, right, len(asked))


def answer(engine: Answering, sample: Sample, at: int) -> str:
    """The answer to turn `at` of a sample, the turns before it given as they should have been."""
    return ask(engine, question(sample, at))


def question(sample: Sample, at: int) -> Request:
    """Turn `at` of a sample as a request."""
    return Request("eval", messages(sample, at), stopping=StoppingParams(max_new_tokens=ANSWER_TOKENS))


def ask(engine: Answering, request: Request) -> str:
    """The answer's text. Raises ModelError where the engine cannot answer."""
    for event in engine.run([request]):
        if isinstance(event, Failed):
            raise ModelError(f"the model cannot be evaluated: {event.message}", event.remedy)
        if isinstance(event, Finished):
            return event.text
    raise ModelError("the engine ended without an answer", "report this as a bug")


def messages(sample: Sample, at: int) -> tuple[Message, ...]:
    """The dialogue up to and with the question of turn `at`."""
    pictures = iter([png(picture) for picture in sample.pictures])
    out = [Message("system", (Text(sample.system),))] if sample.system else []
    for i, turn in enumerate(sample.turns[: at + 1]):
        shown = tuple(Image(data=next(pictures)) for _ in range(turn.pictures))
        out.append(Message("user", (*shown, Text(turn.question))))
        if i < at:
            out.append(Message("assistant", (Text(turn.answer),)))
    return tuple(out)


def png(picture: np.ndarray) -> bytes:
    """A uint8 array `[H, W, 3]` as the bytes of a PNG."""
    file = io.BytesIO()
    Pictures.fromarray(picture).save(file, "PNG")
    return file.getvalue()
