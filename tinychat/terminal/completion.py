"""Completion of commands, of what follows them, and of paths anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from tinychat.terminal.clean import clean_line
from tinychat.terminal.commands import BY_NAME, COMMANDS, Command, usage
from tinychat.terminal.paths import escape, resolve
from tinychat.terminal.settings import SETTINGS

_MOST = 200


class ChatCompleter(Completer):
    """Completes the text before the cursor; `saved` gives the names of saved conversations."""

    def __init__(self, saved: Callable[[], Iterable[str]]) -> None:
        self._saved = saved

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        name, space, argument = before.removeprefix("/").partition(" ")
        command = BY_NAME.get(name) if before.startswith("/") else None
        if command is not None and space:
            yield from self._argument(command, argument)
            return
        if before.startswith("/") and not space and "/" not in name:
            yield from _commands(name)
            return
        word = _last_word(before)
        if word.startswith(("/", "./", "../", "~/")):
            yield from _paths(word)

    def _argument(self, command: Command, argument: str) -> Iterator[Completion]:
        words = {"setting": tuple(SETTINGS), "conversation": self._names(command)}.get(command.kind, command.choices)
        yield from (Completion(word, -len(argument)) for word in words if word.startswith(argument))
        if command.kind in ("path", "conversation") and command.name != "delete":
            yield from _paths(_last_word(argument))

    def _names(self, command: Command) -> tuple[str, ...]:
        return tuple(self._saved()) if command.kind == "conversation" else ()


def _commands(start: str) -> Iterator[Completion]:
    for command in COMMANDS:
        if command.name.startswith(start):
            yield Completion(f"/{command.name}", -len(start) - 1, usage(command), display_meta=command.help)


def _paths(word: str) -> Iterator[Completion]:
    """Names in the folder that the word has reached, escaped; names that would have to be cleaned are left out."""
    folder, slash, start = word.rpartition("/")
    for path in _entries(resolve(folder + slash) if folder + slash else Path()):
        if path.name.startswith(_unescaped(start)) and (start or not path.name.startswith(".")):
            shown = path.name + "/" * path.is_dir()
            yield Completion(escape(shown), -len(start), shown)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if clean_line(path.name) == path.name)[:_MOST]
    except (OSError, ValueError):
        return []


def _unescaped(start: str) -> str:
    return start.replace("\\", "").lstrip("'\"")


def _last_word(text: str) -> str:
    """The word at the end, where an escaped space does not divide."""
    position = len(text)
    while position and not (text[position - 1].isspace() and text[position - 2 : position - 1] != "\\"):
        position -= 1
    return text[position:]
