"""When an answer ends, and which of its text is certain. One `Stopping` a row: tokens in, text and a reason out.

`StopMatcher` knows text and stop strings only; `Stopping` adds token ids, the length and the row's detokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinychat.core import FinishReason, StoppingParams


class TextSource(Protocol):
    """What turns tokens into text: `Detokenizer`."""

    def push(self, token_id: int, /) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Step:
    """Text that became certain, and why the answer ended (None while it goes on)."""

    text: str
    reason: FinishReason | None = None


def borders(pattern: str) -> tuple[int, ...]:
    """For each prefix of the pattern, how long its longest border is, prefix and suffix at once (Knuth 1977)."""
    lengths = [0]
    for char in pattern[1:]:
        length = lengths[-1]
        while length and pattern[length] != char:
            length = lengths[length - 1]
        lengths.append(length + (pattern[length] == char))
    return tuple(lengths)


class _Scan:
    """How much of one stop string the text ends with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.length = 0
        self._borders = borders(pattern)

    def push(self, char: str) -> bool:
        """True where char completes the stop string; nothing may follow then."""
        while self.length and self.pattern[self.length] != char:
            self.length = self._borders[self.length - 1]
        self.length += self.pattern[self.length] == char
        return self.length == len(self.pattern)


class StopMatcher:
    """Finds the stop string that is complete first, in linear time; of several that end together, the longest.

    Text that may be the beginning of one is held back, unless stop strings are to be shown anyway.
    """

    def __init__(self, stops: Iterable[str], include_stop: bool = False) -> None:
        self.matched = False
        self._include = include_stop
        self._scans = [_Scan(stop) for stop in dict.fromkeys(stops)]
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain now. After a match: all that there is, and later pieces count for nothing."""
        if self.matched:
            return ""
        before, self._held = self._held, ""
        for position, char in enumerate(piece):
            complete = [scan.length for scan in self._scans if scan.push(char)]
            if complete:
                self.matched = True
                text = before + piece[: position + 1]
                return text if self._include else text[: len(text) - max(complete)]
        return self._hold_back(before + piece)

    def flush(self) -> str:
        """The text held back; no stop string came of it."""
        text, self._held = self._held, ""
        return text

    def _hold_back(self, text: str) -> str:
        uncertain = 0 if self._include else max((scan.length for scan in self._scans), default=0)
        certain = len(text) - uncertain
        self._held = text[certain:]
        return text[:certain]


class Stopping:
    """Ends one row: an EOS token, a stop string or the length, whichever is first.

    `token_ids` are the answer, without the EOS. stop_ids and stop_strings are the model's own end marks (generation
    config, tokenizer, template); ignore_eos turns both off and leaves the user's stop strings. `room` is how many
    tokens the context can still take.
    """

    def __init__(
        self,
        params: StoppingParams,
        stop_ids: Collection[int],
        stop_strings: Sequence[str],
        text: TextSource,
        room: int,
    ) -> None:
        self.token_ids: list[int] = []
        self.limit = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        own_strings = () if params.ignore_eos else tuple(stop_strings)
        self._stop_ids = frozenset(() if params.ignore_eos else stop_ids)
        self._matcher = StopMatcher((*params.stop, *own_strings), params.include_stop)
        self._text = text

    def push(self, token_id: int) -> Step:
        """Takes the next token. An EOS has no text and is not kept; on the last allowed token it is still an EOS."""
        if token_id in self._stop_ids:
            return Step("", "eos")
        self.token_ids.append(token_id)
        text = self._matcher.push(self._text.push(token_id))
        if self._matcher.matched:
            return Step(text, "stop")
        return Step(text, "length" if len(self.token_ids) >= self.limit else None)

    def finish(self, reason: FinishReason) -> Step:
        """The tail that was held back, and the final reason: a stop string may be complete only now."""
        tail = self._matcher.push(self._text.flush())
        if self._matcher.matched:
            return Step(tail, "stop")
        return Step(tail + self._matcher.flush(), reason)
