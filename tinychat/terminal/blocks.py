"""Cutting a stream of Markdown lines into blocks that are final, so that each is parsed and drawn once."""

from __future__ import annotations

import re

_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_HEADING = re.compile(r" {0,3}#{1,6}(?:\s|$)")
_LIST_ITEM = re.compile(r"\s*(?:[-*+]|\d{1,9}[.)])(?:\s|$)")
_CONTINUED = re.compile(r"\s+\S")


class Blocks:
    """Takes whole lines; gives back the blocks that a line makes final. `open` is what is not final yet."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self._fence = ""
        self._is_list = False

    def push(self, line: str) -> list[str]:
        """Add one line with its line break; the blocks that are now final, in order."""
        if self._fence:
            return self._in_fence(line)
        if not line.strip():
            return self._blank(line)
        fence = _FENCE.match(line)
        if fence:
            return self._open_fence(line, fence[1])
        if _HEADING.match(line):
            return [*self.close(), line]
        return self._text(line)

    def close(self) -> list[str]:
        """Make final what is open."""
        finished = ["".join(self.open)] if self.open else []
        self.open, self._fence, self._is_list = [], "", False
        return finished

    def cut(self) -> str | None:
        """What an open block can give up as a block of its own: code so far, a list's items before the last."""
        if self._is_list:
            return self._cut_list()
        if not self._fence or len(self.open) < 2:
            return None
        head, *code = self.open
        self.open = [head]
        return "".join([head, *code, f"{self._fence}\n"])

    def _cut_list(self) -> str | None:
        items = [i for i, line in enumerate(self.open) if not line[0].isspace() and _LIST_ITEM.match(line)]
        last = items[-1] if items else 0
        if not last:
            return None
        finished, self.open = self.open[:last], self.open[last:]
        return "".join(finished)

    def _open_fence(self, line: str, fence: str) -> list[str]:
        """A fence begins a block, but for an indented one in a list, which belongs to its item."""
        finished = [] if self._is_list and line[0].isspace() else self.close()
        self.open.append(line)
        self._fence = fence
        return finished

    def _in_fence(self, line: str) -> list[str]:
        self.open.append(line)
        mark = line.strip()
        if len(mark) < len(self._fence) or set(mark) != {self._fence[0]}:
            return []
        self._fence = ""
        return [] if self._is_list else self.close()

    def _blank(self, line: str) -> list[str]:
        if not self._is_list:
            return self.close()
        self.open.append(line)
        return []

    def _text(self, line: str) -> list[str]:
        """A line of a paragraph, a list, a table or a quote."""
        after_gap = bool(self.open) and not self.open[-1].strip()
        ends_list = after_gap and not _LIST_ITEM.match(line) and not _CONTINUED.match(line)
        finished = self.close() if ends_list else []
        if not self.open:
            self._is_list = _LIST_ITEM.match(line) is not None
        self.open.append(line)
        return finished
