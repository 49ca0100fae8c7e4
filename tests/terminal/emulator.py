"""A terminal in memory: what a painter writes is obeyed by pyte, and read back as lines."""

from __future__ import annotations

import io

import pyte


class Emulator(io.StringIO):
    """A stream that is a terminal of `columns` x `lines`, with its scrollback."""

    encoding = "utf-8"

    def __init__(self, columns: int = 60, lines: int = 14) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(columns, lines, history=5000)
        self.screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self.screen)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.feed(text)
        return super().write(text)

    def size(self) -> tuple[int, int]:
        return self.screen.columns, self.screen.lines

    def lines(self) -> list[str]:
        """All rows, those scrolled away too, without blanks at their ends and empty rows at the end."""
        above = ["".join(row[i].data for i in range(self.screen.columns)) for row in self.screen.history.top]
        rows = [row.rstrip() for row in (*above, *self.screen.display)]
        while rows and not rows[-1]:
            rows.pop()
        return rows
