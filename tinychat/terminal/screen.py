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
    """The place where the chat writes, plain where that is asked for or the stream cannot more.

    Problems go to `errors` where that is given: what reads the answers is a program then.
    """

    def __init__(self, stream: TextIO, plain: bool = False, errors: TextIO | None = None) -> None:
        self.stream = stream
        self.errors = stream if errors is None else errors
        self.plain = is_plain(stream, plain)
        self._plain_errors = is_plain(self.errors, plain)

    def text(self, text: str) -> None:
        """Write lines as they are."""
        put(self.stream, f"{clean(text)}\n")

    def note(self, text: str) -> None:
        """Write what is worth knowing, dimmed."""
        put(self.stream, _line(text, "" if self.plain else _DIM))

    def problem(self, text: str) -> None:
        """Write what went wrong."""
        put(self.errors, _line(text, "" if self._plain_errors else _RED))

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


def _line(text: str, colour: str) -> str:
    return f"{colour}{clean(text)}{_RESET if colour else ''}\n"
