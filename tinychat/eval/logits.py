"""What a model predicts, a few positions at a time: all logits `[T, V]` at once may be more than memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinychat.engine.prefill import running

NUMBERS = 2**22  # logits at once
BYTES = 48  # of each, while it is compared: twice in float32, twice in float64, and what the allocator keeps of it


@dataclass(frozen=True, eq=False, slots=True)
class Predictions:
    """Of the states `[P, D]` that a head is given: iterated, fp32 logits `[n, V]` on the CPU, in order."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int

    def __iter__(self) -> Iterator[Tensor]:
        for hidden in self.hidden.split(rows(self.vocabulary)):
            with running():
                logits = self.head(hidden).float().cpu()
            yield logits


def rows(vocabulary: int) -> int:
    """Positions at once."""
    return max(1, NUMBERS // vocabulary)


def memory(vocabulary: int, positions: int) -> int:
    """Bytes that the logits of so many positions take, some of them at once, with what they are compared by."""
    return BYTES * min(positions, rows(vocabulary)) * vocabulary


@contextmanager
def without_logits(model: Any) -> Iterator[list[Tensor]]:
    """Calls of a model give the logits of their last position alone; the list gets what the head would be given."""
    seen: list[Tensor] = []

    def keep(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0][:, -1:],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
