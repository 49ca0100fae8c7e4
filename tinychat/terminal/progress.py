"""What goes on before the first word: one line that comes and goes, or one line a stage where nothing is redrawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TextIO

from tinychat.core import Progress, Stage
from tinychat.terminal.clean import put

if TYPE_CHECKING:
    from rich.live import Live
    from rich.spinner import Spinner

_WORDS: dict[Stage, tuple[str, str]] = {
    "compile": ("compiling the CPU kernels, this once", "compiling the CPU kernels, this once"),
    "load": ("loading 1 tensor", "loading {total:,} tensors"),
    "images": ("looking at 1 picture", "looking at {total:,} pictures"),
    "vision": ("looking at 1 picture", "looking at {total:,} pictures"),
    "convert": ("converting 1 tensor", "converting {total:,} tensors"),
    "prefill": ("reading 1 token", "reading {total:,} tokens"),
}


def words(progress: Progress) -> str:
    """A progress event in words: `reading 1,234 tokens`, with a percentage while it is under way."""
    under_way = 0 < progress.done < progress.total
    return _task(progress) + (f", {100 * progress.done // progress.total} %" if under_way else "")


def _task(progress: Progress) -> str:
    """What is being done: the same for the two halves of looking at a picture."""
    one, many = _WORDS[progress.stage]
    return one if progress.total == 1 else many.format(total=progress.total)


class Indicator(Protocol):
    """Where progress is shown."""

    def show(self, progress: Progress) -> None:
        """Show the latest."""
        ...

    def stop(self) -> None:
        """Take it away; the next show brings it back."""
        ...


class NoIndicator:
    """Shows nothing: what is read by programs stays clean."""

    def show(self, progress: Progress) -> None:
        pass

    def stop(self) -> None:
        pass


class LineIndicator:
    """One line a task, once an answer, never redrawn: for screen readers and terminals without cursor movement."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: set[str] = set()

    def show(self, progress: Progress) -> None:
        task = _task(progress)
        if task not in self._told:
            self._told.add(task)
            put(self._stream, f"{task}\n")

    def stop(self) -> None:
        self._told.clear()


class SpinnerIndicator:
    """One line with a spinner, gone when it stops."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live: Live | None = None

    def show(self, progress: Progress) -> None:
        from rich.spinner import Spinner

        spinner = Spinner("dots", text=words(progress))
        if self._live is None:
            self._live = _start(self._stream, spinner)
        else:
            self._live.update(spinner, refresh=True)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def make_indicator(stream: TextIO, plain: bool) -> Indicator:
    """What suits the stream: nothing where it is no terminal."""
    if not stream.isatty():
        return NoIndicator()
    return LineIndicator(stream) if plain else SpinnerIndicator(stream)


def _start(stream: TextIO, spinner: Spinner) -> Live:
    from rich.console import Console
    from rich.live import Live

    live = Live(spinner, console=Console(file=stream, force_terminal=True), transient=True, refresh_per_second=8)
    live.start(refresh=True)
    return live
