from __future__ import annotations

import io

import pytest
from terminal.emulator import Emulator

from tinychat.core import Progress
from tinychat.terminal.progress import LineIndicator, NoIndicator, SpinnerIndicator, make_indicator, words


@pytest.mark.parametrize(
    ("stage", "done", "total", "text"),
    [
        ("prefill", 0, 1234, "reading 1,234 tokens"),
        ("prefill", 512, 1024, "reading 1,024 tokens, 50 %"),
        ("prefill", 1, 1, "reading 1 token"),
        ("vision", 0, 2, "looking at 2 pictures"),
        ("vision", 1, 1, "looking at 1 picture"),
        ("images", 0, 1, "looking at 1 picture"),
        ("load", 3, 300, "loading 300 tensors, 1 %"),
    ],
)
def test_progress_in_words(stage: str, done: int, total: int, text: str) -> None:
    assert words(Progress("r", stage, done, total)) == text  # type: ignore[arg-type]


def test_the_kind_suits_the_stream() -> None:
    terminal = Emulator()
    assert isinstance(make_indicator(io.StringIO(), plain=False), NoIndicator)
    assert isinstance(make_indicator(terminal, plain=True), LineIndicator)
    assert isinstance(make_indicator(terminal, plain=False), SpinnerIndicator)


def test_lines_tell_each_task_once() -> None:
    terminal = Emulator()
    indicator = LineIndicator(terminal)
    stages = (
        ("prefill", 0),
        ("images", 0),
        ("vision", 1),
        ("images", 1),
        ("vision", 2),
        ("prefill", 0),
        ("prefill", 5),
    )
    for stage, done in stages:
        indicator.show(Progress("r", stage, done, 9))  # type: ignore[arg-type]
    indicator.stop()
    assert terminal.getvalue() == "reading 9 tokens\nlooking at 9 pictures\n"


def test_a_spinner_is_gone_when_it_stops() -> None:
    terminal = Emulator()
    indicator = SpinnerIndicator(terminal)
    indicator.show(Progress("r", "vision", 0, 2))
    indicator.show(Progress("r", "prefill", 0, 7))
    indicator.stop()
    indicator.stop()
    assert "looking at 2 pictures" in terminal.getvalue()
    assert terminal.lines() == []
