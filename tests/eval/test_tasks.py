"""Scores of the demo tasks: who knows all answers gets 1, who knows none 0; a failure is not a wrong answer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator

import json_keys
import numpy as np
import pytest
from PIL import Image as Pictures

from tinychat.core import Event, Failed, Finished, Message, Request, Timings, Usage
from tinychat.errors import ModelError, UsageError
from tinychat.eval import report, tasks
from tinychat.eval.demo import TASKS, task_questions


class Scripted:
    """An engine whose answer is a function of the request's number."""

    def __init__(self, answer: Callable[[int], str | Failed]) -> None:
        self.answer = answer
        self.asked: list[Request] = []

    def run(self, requests: list[Request]) -> Iterator[Event]:
        for request in requests:
            said = self.answer(len(self.asked))
            self.asked.append(request)
            if isinstance(said, Failed):
                yield said
            else:
                yield Finished(request.id, said, "", (), "eos", Usage(1, 0, 0, 0), Timings(), None)


def expected(task: str, n: int) -> list[str]:
    return [sample.turns[at].answer for split in tasks.SPLITS for sample, at in task_questions(split, task, n)]


@pytest.mark.parametrize("task", ["count", "follow_up", "compare"])
def test_right_answers_score_one_and_others_none(task: str) -> None:
    answers = expected(task, 5)
    right = [score.share for score in tasks.score_tasks(Scripted(answers.__getitem__), 5, (task,))]
    wrong = [score.share for score in tasks.score_tasks(Scripted(lambda _: "no idea"), 5, (task,))]
    assert (right, wrong) == ([1.0, 1.0], [0.0, 0.0])


def test_every_task_of_both_splits_is_asked() -> None:
    scores = list(tasks.score_tasks(Scripted(lambda _: "Red."), 2))
    assert [(score.split, score.task) for score in scores] == [(s, t) for s in tasks.SPLITS for t in TASKS]
    assert all(score.asked == 2 for score in scores)


def test_a_question_carries_its_pictures_and_what_came_before() -> None:
    [(sample, at)] = task_questions("validation", "follow_up", 1)
    messages = tasks.messages(sample, at)
    assert [message.role for message in messages] == ["user", "assistant", "user"]
    assert [message.text for message in messages] == [
        sample.turns[0].question, sample.turns[0].answer, sample.turns[1].question
    ]  # fmt: skip
    [picture] = shown(messages)
    assert (np.asarray(Pictures.open(io.BytesIO(picture))) == sample.pictures[0]).all()


def shown(messages: tuple[Message, ...]) -> list[bytes]:
    return [image.data or b"" for message in messages for image in message.images]


def test_a_failure_is_an_error_with_its_remedy() -> None:
    failed = Failed("eval", "the model reads text only", "choose another", 2)
    with pytest.raises(ModelError, match="cannot be evaluated: the model reads text only; choose another"):
        list(tasks.score_tasks(Scripted(lambda _: failed), 1, ("count",)))


@pytest.mark.parametrize(
    ("right", "asked", "interval"), [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (50, 100, (0.4038, 0.5962))]
)
def test_the_interval_is_wilsons(right: int, asked: int, interval: tuple[float, float]) -> None:
    assert tasks.TaskScore("validation", "count", right, asked).interval == pytest.approx(interval, abs=2e-4)


def test_the_report_is_as_documented() -> None:
    lines: list[str] = []
    found = report.measure(report.Plan("embedded", 3, ("count",)), Scripted(lambda _: "1"), lines.append)  # type: ignore[arg-type]
    json_keys.check(json.loads(json.dumps(found)), "tinychat.eval/1")
    assert lines[0].startswith("validation count: ") and lines[0].endswith(" of 3")
    head, row = report.rows(found)
    assert head == ["task", "validation", "heldout"] and row[0] == "count" and "%" in row[1]


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(UsageError, match="there is no task 'smell'; the tasks are colour"):
        report.Plan("embedded", 3, ("smell",))
