"""What the chat writes beside the answers: notes, problems, tables. Everything printed passes through `clean`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from tinychat.terminal.answers import is_plain, make_painter
from tinychat.terminal.clean import clean, put
from tinychat.terminal.painting import Painter
from tinychat.terminal.progress import Indicator, make_indicator

_DIM, _RED, _RESET = "\x1b[2m", "\x1b[31m", "\x1b[0m"


class Screen:
    """The place where the chat writes; plain where that is asked for or the stream cannot more."""

    def __init__(self, stream: TextIO, plain: bool = False) -> None:
        self.stream = stream
        self.plain = is_plain(stream, plain)

    def text(self, text: str) -> None:
        """Write lines as they are."""
        put(self.stream, f"{clean(text)}\n")

    def note(self, text: str) -> None:
        """Write what is worth knowing, dimmed."""
        self._coloured(_DIM, text)

    def problem(self, text: str) -> None:
        """Write what went wrong."""
        self._coloured(_RED, text)

    def columns(self, rows: Sequence[Sequence[str]]) -> None:
        """Write rows with their first columns aligned."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        for *cells, last in rows:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            self.text("  ".join(("", *padded, last)).rstrip())

    def painter(self) -> Painter:
        """What draws the next answer."""
        return make_painter(self.stream, plain=self.plain)

    def indicator(self) -> Indicator:
        """What shows progress until the next answer begins."""
        return make_indicator(self.stream, self.plain)

    def _coloured(self, colour: str, text: str) -> None:
        text = clean(text)
        put(self.stream, f"{text}\n" if self.plain else f"{colour}{text}{_RESET}\n")
