"""What a quantization shows: lines that stay, and a bar that goes."""

from __future__ import annotations

import io

import pytest
from terminal.emulator import Emulator

from tinychat.terminal.quantizing import BarBoard, LineBoard, duration, make_board


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (119, "119 s"), (120, "2 min"), (3599, "59 min"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_lines_name_a_stage_once() -> None:
    out = io.StringIO()
    board = make_board(out, plain=False)
    assert isinstance(board, LineBoard)
    for done in range(3):
        board.stage("quantizing", done, 3)
        board.say(f"layer {done}\x1b[31m\nof 3")
    board.stop()
    assert out.getvalue() == "quantizing\nlayer 0[31m of 3\nlayer 1[31m of 3\nlayer 2[31m of 3\n"


def test_the_bar_goes_and_the_lines_stay() -> None:
    terminal = Emulator()
    board = make_board(terminal, plain=False)
    assert isinstance(board, BarBoard) and isinstance(make_board(terminal, plain=True), LineBoard)
    board.stage("quantizing", 1, 32, 7500)
    assert (
        "quantizing" in "\n".join(terminal.lines())
        and "1/32" in "\n".join(terminal.lines())
        and "2 h 5 min left" in "\n".join(terminal.lines())
    )
    board.say("layer 1 of 32 [bold]")
    board.stop()
    assert "layer 1 of 32 [bold]" in "\n".join(terminal.lines()) and "1/32" not in "\n".join(terminal.lines())
