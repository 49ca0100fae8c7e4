"""What a quantization shows: a line a layer that stays, and on a terminal a bar with the time left under it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TextIO

from tinychat.terminal.clean import clean_line, put

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Board(Protocol):
    """Where a long work is shown."""

    def say(self, line: str) -> None:
        """A line that stays."""
        ...

    def stage(self, words: str, done: int, total: int, left: float | None = None) -> None:
        """What is being done, how far it is, and the seconds that are left where they are known."""
        ...

    def stop(self) -> None:
        """Take the bar away."""
        ...


class LineBoard:
    """Lines alone, each stage named once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: set[str] = set()

    def say(self, line: str) -> None:
        put(self._stream, f"{clean_line(line)}\n")

    def stage(self, words: str, done: int, total: int, left: float | None = None) -> None:
        if words not in self._told:
            self._told.add(words)
            put(self._stream, f"{words}\n")

    def stop(self) -> None:
        pass


class BarBoard:
    """A bar under the lines, gone when it stops."""

    def __init__(self, stream: TextIO) -> None:
        self._progress = _bar(stream)
        self._task: TaskID | None = None

    def say(self, line: str) -> None:
        self._progress.console.print(clean_line(line), markup=False, highlight=False, soft_wrap=True)

    def stage(self, words: str, done: int, total: int, left: float | None = None) -> None:
        if self._task is None:
            self._task = self._progress.add_task(words, total=total, left="")
            self._progress.start()
        remaining = "" if left is None else f"{duration(left)} left"
        self._progress.update(self._task, description=words, completed=done, total=total, left=remaining)
        self._progress.refresh()

    def stop(self) -> None:
        self._progress.stop()


def make_board(stream: TextIO, plain: bool) -> Board:
    """What suits the stream."""
    return BarBoard(stream) if stream.isatty() and not plain else LineBoard(stream)


def duration(seconds: float) -> str:
    """Seconds in words: 2 h 5 min, 7 min, 40 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def _bar(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn())
    rest = TextColumn("{task.fields[left]}", markup=False)
    console = Console(file=stream, force_terminal=True)
    return Progress(*columns, rest, console=console, transient=True, refresh_per_second=4)
