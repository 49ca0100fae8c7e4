"""Painting an answer while it comes: raw text, or Markdown drawn block by block in time linear in its length."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

from tinychat.terminal.blocks import Blocks
from tinychat.terminal.clean import clean, put

if TYPE_CHECKING:
    from rich.console import Console

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_ASCII = re.compile(r"[ -~]*")

Size = Callable[[], tuple[int, int]]


class Painter(Protocol):
    """What draws an answer: pieces as they come, then its end."""

    def feed(self, text: str) -> None:
        """Draw a piece; it may end anywhere, even inside an escape sequence."""
        ...

    def end(self) -> None:
        """Finish what is open; the cursor stands on a new line."""
        ...


class PlainPainter:
    """The text as it is, without what a terminal would obey."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._at_line_start = True

    def feed(self, text: str) -> None:
        text = clean(text)
        if text:
            self._at_line_start = text.endswith("\n")
            put(self._stream, text)

    def end(self) -> None:
        if not self._at_line_start:
            put(self._stream, "\n")
        self._at_line_start = True


class WholePainter:
    """Withholds all pieces until the end, then paints them at once."""

    def __init__(self, painter: Painter) -> None:
        self._painter = painter
        self._pieces: list[str] = []

    def feed(self, text: str) -> None:
        self._pieces.append(text)

    def end(self) -> None:
        self._painter.feed("".join(self._pieces))
        self._painter.end()
        self._pieces = []


class MarkdownPainter:
    """Draws each final block once, by rich, over the plain text in which it was shown while it was open.

    An open block that outgrows the screen cannot be drawn over: code is cut there, anything else stays as plain text.
    """

    def __init__(self, stream: TextIO, size: Size | None = None) -> None:
        self._stream = stream
        self._size = size or _terminal_size
        self._blocks = Blocks()
        self._line: list[str] = []
        self._area = Area(*self._size())
        self._stuck = False
        self._gap = False
        self._console: Console | None = None

    def feed(self, text: str) -> None:
        for part in _LINES.findall(clean(text)):
            self._line.append(part)
            if part[-1] == "\n":
                self._end_line(part)
            else:
                self._show(part)

    def end(self) -> None:
        if self._line:
            self.feed("\n")
        self._replace(self._blocks.close())
        self._stuck = self._gap = False

    def _end_line(self, part: str) -> None:
        line = "".join(self._line)
        self._line = []
        finished = self._blocks.push(line)
        if finished:
            self._replace(finished)
        elif self._blocks.open:
            self._show(part)
            if self._stuck:
                self._area.restart()

    def _show(self, text: str) -> None:
        """Append plain text to the open block."""
        if self._area.size != self._size():
            self._stuck = self._stuck or not self._area.empty
            self._area = Area(*self._size())
        if self._gap:
            self._gap = False
            put(self._stream, "\n")
        put(self._stream, self._area.draw(text))
        if self._area.full and not self._stuck:
            self._overflow()

    def _overflow(self) -> None:
        cut = self._blocks.cut()
        if cut is None:
            self._stuck = True
            self._area.restart()
        else:
            self._replace([cut], gap=False)

    def _replace(self, finished: Sequence[str], gap: bool = True) -> None:
        """Draw final blocks over the open area, then, after a gap, what is open now in plain text again."""
        fresh = finished[1:] if self._stuck else finished
        erased = self._area.erase()
        if self._stuck and finished:
            self._stuck, self._gap = False, True
        put(self._stream, erased + "".join(map(self._render, fresh)))
        self._gap = self._gap and gap
        rest = "".join([*self._blocks.open, *self._line])
        if rest:
            self._show(rest)

    def _render(self, block: str) -> str:
        from tinychat.terminal.markdown import make_console, render

        if self._console is None:
            self._console = make_console(self._stream)
        gap, self._gap = "\n" * self._gap, True
        return gap + render(self._console, block, self._size()[0])


class Area:
    """The rows of the screen that hold the open block: lines are broken here, so that their number is known."""

    def __init__(self, columns: int, lines: int) -> None:
        self.size = (columns, lines)
        self._width = max(columns - 1, 2)
        self._limit = max(lines - 2, 1)
        self.restart()

    def restart(self) -> None:
        """Begin anew at the cursor; what is above stays for good."""
        self._rows = self._column = 0

    @property
    def empty(self) -> bool:
        return self._rows == self._column == 0

    @property
    def full(self) -> bool:
        return self._rows >= self._limit

    def draw(self, text: str) -> str:
        """The text with a break wherever it would leave the width; tabs are four spaces."""
        drawn: list[str] = []
        for part in _LINES.findall(text.replace("\t", "    ")):
            drawn.append(self._draw_line(part.rstrip("\n")))
            if part[-1] == "\n":
                drawn.append(self._break())
        return "".join(drawn)

    def erase(self) -> str:
        """What takes the cursor to the start of the area and clears from there."""
        up = f"\x1b[{self._rows}A" if self._rows else ""
        erased = "" if self.empty else f"\r{up}\x1b[J"
        self.restart()
        return erased

    def _draw_line(self, text: str) -> str:
        if _ASCII.fullmatch(text) and self._column + len(text) <= self._width:
            self._column += len(text)
            return text
        return "".join(map(self._draw_character, text))

    def _draw_character(self, character: str) -> str:
        from rich.cells import cell_len

        cells = cell_len(character)
        broken = self._break() if self._column + cells > self._width else ""
        self._column += cells
        return broken + character

    def _break(self) -> str:
        self._rows, self._column = self._rows + 1, 0
        return "\n"


def _terminal_size() -> tuple[int, int]:
    size = shutil.get_terminal_size()
    return size.columns, size.lines
