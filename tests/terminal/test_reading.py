from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from tinychat.terminal import reading
from tinychat.terminal.completion import ChatCompleter
from tinychat.terminal.reading import Editor, LineReader, open_history

ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A"


@dataclass
class Keyboard:
    """An editor whose keys are pressed by a test."""

    pipe: PipeInput
    taken: list[str] = field(default_factory=list)
    edits: int = 0

    def __post_init__(self) -> None:
        self.editor = Editor(
            InMemoryHistory(),
            ChatCompleter(lambda: ["pets"]),
            paste=self._paste,
            edited=self._edited,
            input=self.pipe,
            output=DummyOutput(),
        )

    def press(self, keys: str) -> str:
        self.pipe.send_text(keys)
        return self.editor.read(lambda: "> ")

    def _paste(self, text: str) -> Callable[[], None] | None:
        return (lambda: self.taken.append(text)) if text.endswith(".png") else None

    def _edited(self) -> None:
        self.edits += 1


@pytest.fixture
def keyboard() -> Iterator[Keyboard]:
    with create_pipe_input() as pipe:
        yield Keyboard(pipe)


def pasted(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


def test_enter_sends(keyboard: Keyboard) -> None:
    assert keyboard.press(f"hello{ENTER}") == "hello"


def test_alt_enter_a_backslash_and_three_quotes_go_on(keyboard: Keyboard) -> None:
    assert keyboard.press(f"a{ALT_ENTER}b{ENTER}") == "a\nb"
    assert keyboard.press(f"a\\{ENTER}b{ENTER}") == "a\\\nb"
    assert keyboard.press(f'"""a{ENTER}{ENTER}b"""{ENTER}') == '"""a\n\nb"""'


def test_pasted_lines_are_not_sent_before_enter(keyboard: Keyboard) -> None:
    assert keyboard.press(pasted("a\r\nb\r") + ENTER) == "a\nb\n"


def test_pasted_pictures_are_taken_only_in_an_empty_line(keyboard: Keyboard) -> None:
    assert keyboard.press(pasted("/x/cat.png") + f"what?{ENTER}") == "what?"
    assert keyboard.press("/image " + pasted("/x/cat.png") + ENTER) == "/image /x/cat.png"
    assert keyboard.taken == ["/x/cat.png"]


def test_ctrl_c_throws_a_line_away_and_interrupts_an_empty_one(keyboard: Keyboard) -> None:
    assert keyboard.press(f"oops{CTRL_C}hello{ENTER}") == "hello"
    assert keyboard.edits == 1
    with pytest.raises(KeyboardInterrupt):
        keyboard.press(CTRL_C)


def test_ctrl_d_ends_the_input(keyboard: Keyboard) -> None:
    with pytest.raises(EOFError):
        keyboard.press(CTRL_D)


def test_up_brings_back_a_whole_question(keyboard: Keyboard) -> None:
    keyboard.press(f"a{ALT_ENTER}b{ENTER}")
    assert keyboard.press(UP + ENTER) == "a\nb"


def test_a_pipe_gives_lines_that_belong_together() -> None:
    reader = LineReader(io.StringIO('a\nb\\\nc\n"""\nd\n\n"""\ne\\'))
    assert [reader.read(lambda: "") for _ in range(4)] == ["a", "b\\\nc", '"""\nd\n\n"""', "e\\"]
    with pytest.raises(EOFError):
        reader.read(lambda: "")


def test_history_is_a_file_for_the_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "history"
    history = open_history(path)
    history.store_string("what is this?")
    assert path.stat().st_mode & 0o077 == 0
    assert list(open_history(path).load_history_strings()) == ["what is this?"]


def test_a_large_history_keeps_its_newer_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history"
    history = FileHistory(path)
    for number in range(100):
        history.store_string(f"question {number}")
    monkeypatch.setattr(reading, "LARGEST_HISTORY", 2000)
    kept = list(open_history(path).load_history_strings())
    assert kept == [f"question {number}" for number in range(99, 99 - len(kept), -1)]
    assert 10 < len(kept) < 50


def test_a_history_that_cannot_be_written_is_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert isinstance(open_history(tmp_path / "file" / "history"), InMemoryHistory)
