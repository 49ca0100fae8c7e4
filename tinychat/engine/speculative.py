"""Guessing several tokens, reading them in one forward, and keeping those that would have been drawn anyway.

The guess is prompt lookup: what followed the last time that the answer's newest words occurred. What is emitted is
exactly what plain decoding draws, by the same numbers, so an answer and its seed do not depend on the guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from torch import Tensor

from tinychat.engine.sampler import Draw, Sampler

LONGEST = 3


def propose(ids: Sequence[int], count: int, longest: int = LONGEST) -> list[int]:
    """The `count` tokens that followed the last earlier occurrence of the longest suffix of ids, or none.

    The suffix has `longest` tokens at most. Where what followed reaches the end of ids, it is repeated.
    """
    start = _after_match(ids, longest)
    period = len(ids) - start
    return [ids[start + i % period] for i in range(count)] if period else []


def _after_match(ids: Sequence[int], longest: int) -> int:
    """Where the text after the best earlier occurrence begins; len(ids) where there is none."""
    best, start = 0, len(ids)
    newest = ids[-1] if ids else None
    for end in range(len(ids) - 1, 0, -1):
        if ids[end - 1] != newest:
            continue
        length = _common_suffix(ids, end, longest)
        if length > best:
            best, start = length, end
            if best == longest:
                break
    return start


def _common_suffix(ids: Sequence[int], end: int, longest: int) -> int:
    """How many tokens, `longest` at most, ids[:end] and ids have in common at their ends."""
    bound = min(longest, end)
    return next((n for n in range(bound) if ids[end - 1 - n] != ids[-1 - n]), bound)


def accept(sampler: Sampler, logits: Tensor, proposed: Sequence[int], generated: Sequence[int]) -> list[Draw]:
    """Logits `[K + 1, V]` after the newest token and after each of K proposed ones -> the tokens that come of them.

    One a proposal that was right, and one more: the first that was not proposed. One random number is taken for each.
    """
    answer, draws = list(generated), list[Draw]()
    for row, guess in zip_longest(logits, proposed):
        draw = sampler(row, answer)
        draws.append(draw)
        if draw.token != guess:
            break
        answer.append(draw.token)
    return draws
