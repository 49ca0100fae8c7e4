"""The chat in a real terminal: a pseudo-terminal whose screen pyte keeps, with keys pressed as a user presses them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image as pillow
from terminal.pseudo import CTRL_C, CTRL_D, ENTER, TAB, Terminal

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SCRIPT = Path(__file__).with_name("chat_script.py")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        started.append(Terminal(tmp_path, sys.executable, str(SCRIPT), *arguments))
        started[-1].ready()
        return started[-1]

    yield open_terminal
    for terminal in started:
        terminal.child.close(force=True)


def test_a_dragged_picture_an_answer_in_markdown_and_undo(start: Callable[..., Terminal], tmp_path: Path) -> None:
    pillow.new("RGB", (64, 48)).save(tmp_path / "my cat.png")
    terminal = start("0", "It is **bold**\n\n- one\n- two\n\nend")
    terminal.type(f"\x1b[200~'{tmp_path}/my cat.png' \x1b[201~")
    shown = terminal.see("[1 picture] >")
    assert "[image 1: my cat.png, 64x48]" in shown
    terminal.type(f"what is this?{ENTER}")
    shown = terminal.wait(lambda text: text.endswith("\n>"))
    assert "It is bold\n\n • one\n • two\n\nend" in shown
    assert "**" not in shown
    terminal.type(f"/undo{ENTER}")
    assert "took back: what is this?" in terminal.see("waiting again")
    terminal.type(CTRL_D)
    assert terminal.ends_with() == 0


def test_ctrl_c_stops_an_answer_keeps_the_chat_and_then_leaves(start: Callable[..., Terminal]) -> None:
    terminal = start("0.05", "word " * 400, "Fine.")
    terminal.type(f"talk{ENTER}")
    terminal.see("word word word")
    terminal.type(CTRL_C)
    terminal.see("stopped; what was said is kept")
    terminal.ready()
    terminal.type(f"go on{ENTER}")
    terminal.see("Fine.")
    terminal.ready()
    terminal.type(f"half a line{CTRL_C}")
    terminal.ready()
    terminal.type(CTRL_C)
    terminal.see("Ctrl-C once more leaves")
    terminal.ready()
    terminal.type(CTRL_C)
    assert terminal.ends_with() == 130


def test_a_resize_while_it_answers_does_not_break_it(start: Callable[..., Terminal]) -> None:
    terminal = start("0.01", "word " * 60 + "\n\n```\n" + "code\n" * 30 + "```\n\nlast")
    terminal.type(f"talk{ENTER}")
    terminal.see("word")
    for lines, columns in ((10, 20), (40, 120), (5, 9), (24, 70)):
        terminal.child.setwinsize(lines, columns)
        terminal.screen.resize(lines, columns)
        time.sleep(0.05)
    terminal.see("last")
    terminal.ready()
    terminal.type(f"/quit{ENTER}")
    assert terminal.ends_with() == 0


def test_commands_complete_and_history_comes_back_in_the_next_chat(start: Callable[..., Terminal]) -> None:
    terminal = start("0", "Yes.")
    terminal.type("/sys" + TAB)
    terminal.see("> /system")
    terminal.type(ENTER)
    terminal.see("system message: Be brief.")
    terminal.ready()
    terminal.type(f"/stats on{ENTER}")
    terminal.ready()
    terminal.type(f"is it?{ENTER}")
    terminal.see("2 tokens at 20.0/s")
    terminal.ready()
    terminal.type(CTRL_D)
    assert terminal.ends_with() == 0
    again = start("0", "Yes.")
    again.type("\x1b[A")
    again.see("> is it?")


def test_escapes_in_an_answer_leave_the_terminal_alone(start: Callable[..., Terminal]) -> None:
    terminal = start("0", "a\x1b]0;owned\x07b\x1b[2J\x1b[?1049hc &#8238;d")
    terminal.type(f"go{ENTER}")
    shown = terminal.see("a]0;ownedb[2J[?1049hc d")
    assert "a test" in shown
    assert terminal.screen.title == ""


def test_plain_shows_raw_text_without_colours(start: Callable[..., Terminal]) -> None:
    terminal = start("--plain", "0", "It is **bold**.")
    terminal.type(f"what?{ENTER}")
    terminal.see("It is **bold**.")
    colours = {cell.fg for row in terminal.screen.buffer.values() for cell in row.values()}
    assert colours <= {"default"}
