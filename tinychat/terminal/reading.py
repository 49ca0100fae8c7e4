"""Reading what the user types: an editor on a terminal, plain lines from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output
from prompt_toolkit.shortcuts import CompleteStyle

from tinychat.terminal.completion import ChatCompleter
from tinychat.terminal.lines import is_block_start, is_open

LARGEST_HISTORY = 2**20


class Reader(Protocol):
    """Where questions come from."""

    def read(self, prompt: Callable[[], str]) -> str:
        """One question, of several lines where they belong together. Raises EOFError, KeyboardInterrupt."""
        ...


class LineReader:
    """Reads a pipe or a file; shows no prompt."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self, prompt: Callable[[], str]) -> str:
        text = line = self._stream.readline()
        if not line:
            raise EOFError
        while line and is_open(text.removesuffix("\n")):
            line = self._stream.readline()
            text += line
        return text.removesuffix("\n")


class Editor:
    """A line editor with history, completion and pasting.

    `paste` gets what was pasted into an empty line, and says whether it took it; `edited` hears of a line thrown away.
    """

    def __init__(
        self,
        history: History,
        completer: ChatCompleter,
        *,
        paste: Callable[[str], Callable[[], None] | None],
        edited: Callable[[], None],
        plain: bool = False,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=history,
            completer=completer,
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE if plain else CompleteStyle.COLUMN,
            key_bindings=_bindings(paste, edited),
            multiline=True,
            prompt_continuation=lambda width, line, wrap: "." * (width - 1) + " ",
            enable_open_in_editor=True,
            reserve_space_for_menu=0 if plain else 4,
            input=input,
            output=output,
        )

    def read(self, prompt: Callable[[], str]) -> str:
        return self._session.prompt(prompt)


def open_history(path: Path) -> History:
    """The history file, for the user alone, cut to its newer half where it is large; in memory if it cannot be."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if path.stat().st_size > LARGEST_HISTORY:
            _shorten(path)
        with path.open("ab"):
            return FileHistory(path)
    except OSError:
        return InMemoryHistory()


def _shorten(path: Path) -> None:
    kept = path.read_bytes()[-LARGEST_HISTORY // 2 :]
    shorter = path.with_suffix(".new")
    shorter.touch(mode=0o600)
    shorter.write_bytes(kept[kept.find(b"\n# ") + 1 :])
    shorter.replace(path)


def _bindings(paste: Callable[[str], Callable[[], None] | None], edited: Callable[[], None]) -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        _enter_pressed(event)

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
            edited()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    @bindings.add(Keys.BracketedPaste)
    def _pasted(event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        take = None if event.current_buffer.text else paste(text)
        if take is None:
            event.current_buffer.insert_text(text)
        else:
            run_in_terminal(take)

    return bindings


def _enter_pressed(event: KeyPressEvent) -> None:
    """Take the chosen completion, go on where the text is open, else send it."""
    buffer = event.current_buffer
    if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
        buffer.complete_state = None
    elif is_open(buffer.text) and (buffer.document.is_cursor_at_the_end or is_block_start(buffer.text)):
        buffer.insert_text("\n")
    else:
        buffer.validate_and_handle()


def is_interactive(out: TextIO) -> bool:
    """Whether a person types: both ends are a terminal."""
    stdin: Any = sys.stdin
    return stdin is not None and stdin.isatty() and out.isatty()
