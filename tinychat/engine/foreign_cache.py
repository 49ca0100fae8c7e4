"""The KV cache of a model of transformers, a row at a time: a forward gets its rows as one cache, padded on the left.

Rows lie in blocks: what one forward left behind, `[rows, H, S, D]` a layer. To select or join rows copies nothing;
the next forward brings them into one block, layer by layer, and lets go of what they were taken from.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinychat.errors import CapacityError, UsageError
from tinychat.layers.kv_cache import start_positions

KV = tuple[Tensor, Tensor]  # keys and values `[rows, H, S, D]`
Block = list[KV]  # a layer each


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How keys and values lie in memory: `[B, H, S, D]`, or with keys_head_dim_last=False keys are `[B, H, D, S]`.

    Where rows and heads are `merged` they are one dimension, `[B * H, ...]`: with both it is BLOOM's of old.
    """

    keys_head_dim_last: bool = True
    merged: bool = False

    def read(self, keys: Tensor, values: Tensor, rows: int) -> KV:
        """Views `[B, H, S, D]` of a layer in this layout, merged or not."""
        keys, values = (part.view(rows, -1, *part.shape[-2:]) if part.dim() == 3 else part for part in (keys, values))
        return (keys if self.keys_head_dim_last else keys.transpose(-1, -2)), values

    def write(self, keys: Tensor, values: Tensor) -> KV:
        """A layer `[B, H, S, D]` in this layout."""
        keys = keys if self.keys_head_dim_last else keys.transpose(-1, -2)
        return (keys.flatten(0, 1), values.flatten(0, 1)) if self.merged else (keys, values)


class Place(NamedTuple):
    """Where a row's keys and values begin; they end after its length. A row without tokens is nowhere (block -1)."""

    block: int
    row: int
    start: int

    def moved(self, blocks: Sequence[int]) -> Place:
        """The same place where only these blocks are kept, in this order."""
        return self if self.block < 0 else self._replace(block=blocks.index(self.block))


NOWHERE = Place(-1, 0, 0)


class ForeignCache:
    """Rows of up to `capacity` tokens; `lengths[i]` of row i are filled. It begins empty, or `of` what a model left.

    No tensor is ever written to, so that caches may share them.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.lengths = [0] * rows
        self._blocks: list[Block] = []
        self._places = [NOWHERE] * rows

    @classmethod
    def of(
        cls, layers: Sequence[KV], lengths: Sequence[int], capacity: int, layout: KVLayout | None = None
    ) -> ForeignCache:
        """Of keys and values padded on the left, S long; the last `lengths[i]` are the tokens of row i."""
        cache, layout = cls(len(lengths), capacity), layout or KVLayout()
        block = [layout.read(keys, values, len(lengths)) for keys, values in layers]
        width = block[0][1].shape[2]
        if max(lengths) > width:
            raise UsageError(f"{max(lengths)} tokens are said to lie in a cache of {width}", "give the true lengths")
        cache._put(block, list(lengths), width)
        return cache

    def __len__(self) -> int:
        return len(self.lengths)

    def layers(self, layout: KVLayout | None = None) -> list[KV]:
        """Keys and values of all rows, padded on the left to the longest one; none before the first forward."""
        layout = layout or KVLayout()
        return [layout.write(*layer) for layer in self.select(range(len(self)))._gathered()]

    def check_room(self, count: int) -> None:
        """Raise CapacityError where `count` tokens more would not fit."""
        last = max(self.lengths, default=0) + count
        if last > self.capacity:
            raise CapacityError(
                f"{last} tokens of context are needed, the cache holds {self.capacity}",
                "start with a larger --context, or clear the conversation",
            )

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forget what lies beyond these lengths. Raises UsageError where a row is shorter."""
        wanted = start_positions(list(lengths) if not isinstance(lengths, int) else lengths, len(self))
        for new, old in zip(wanted, self.lengths, strict=True):
            if not 0 <= new <= old:
                raise UsageError(f"a cache row of {old} tokens cannot be cut to {new}", f"give a length of 0 to {old}")
        self.lengths = wanted

    def select(self, rows: Sequence[int]) -> ForeignCache:
        """The rows at these indices, in this order; nothing is copied."""
        chosen = ForeignCache(len(rows), self.capacity)
        chosen.lengths = [self.lengths[i] for i in rows]
        used = sorted({self._places[i].block for i in rows if self.lengths[i]})
        chosen._blocks = [list(self._blocks[block]) for block in used]
        chosen._places = [self._places[i].moved(used) if self.lengths[i] else NOWHERE for i in rows]
        return chosen

    @staticmethod
    def cat(caches: Sequence[ForeignCache]) -> ForeignCache:
        """All rows of caches, in order; nothing is copied."""
        joined = ForeignCache(0, max(cache.capacity for cache in caches))
        for cache in caches:
            own = cache.select(range(len(cache)))
            first = len(joined._blocks)
            blocks = [*[-1] * first, *range(len(own._blocks))]
            joined._blocks += own._blocks
            joined._places += [place.moved(blocks) for place in own._places]
            joined.lengths += own.lengths
        return joined

    def compact(self) -> None:
        """Copy what the rows hold, so that they keep no other row's keys and values in memory."""
        layers = [(keys.clone(), values.clone()) for keys, values in self._gathered()]
        self._put(layers, self.lengths, max(self.lengths, default=0))

    @contextmanager
    def lent(self, count: int) -> Generator[Any, None, None]:
        """A DynamicCache of all rows, as long as the longest, for a forward that adds `count` tokens to each.

        Where the forward fails the rows stay as they were. Where memory fails before it, they are empty afterwards.
        """
        from transformers.cache_utils import DynamicCache

        past: Any = DynamicCache()
        try:
            past.layers.extend(_layer(*layer) for layer in self._gathered())
        except BaseException:
            self._put([], [0] * len(self), 0)  # part of them has been let go
            raise
        lengths, end = self.lengths, max(self.lengths, default=0)
        try:
            yield past
            lengths, end = [length + count for length in lengths], end + count
        finally:
            self._put([(layer.keys, layer.values) for layer in past.layers], lengths, end)

    def _put(self, block: Block, lengths: list[int], end: int) -> None:
        """Rows in one block, all of which end there."""
        self.lengths = lengths
        self._blocks = [block] if any(lengths) else []
        self._places = [Place(0, i, end - length) if length else NOWHERE for i, length in enumerate(lengths)]

    def _gathered(self) -> Iterator[KV]:
        """All rows as one block, a layer at a time; the blocks lose each layer before the next one comes."""
        blocks, self._blocks = self._blocks, []
        while any(self.lengths) and blocks[0]:
            layer = [block.pop(0) for block in blocks]
            keys, values = (self._together([kv[part] for kv in layer]) for part in (0, 1))
            del layer
            yield keys, values

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        """Of a tensor of each block: all rows `[B, H, S, D]`, zeros on the left of the shorter ones."""
        longest, rows = max(self.lengths), [place.row for place in self._places]
        ends = {place.start + length for place, length in zip(self._places, self.lengths, strict=True)}
        if len(parts) == len(ends) == 1 and all(self.lengths):
            end = ends.pop()
            piece = parts[0][:, :, end - longest : end]
            return piece if rows == list(range(len(piece))) else piece[torch.tensor(rows, device=piece.device)]
        _, heads, _, width = parts[0].shape
        out = parts[0].new_zeros(len(rows), heads, longest, width)
        for i, (place, length) in enumerate(zip(self._places, self.lengths, strict=True)):
            if length:
                kept = parts[place.block][place.row, :, place.start : place.start + length]
                out[i, :, longest - length :] = kept
        return out


def _layer(keys: Tensor, values: Tensor) -> Any:
    """A layer of a DynamicCache that holds these; its own update would copy them."""
    from transformers.cache_utils import DynamicLayer

    layer: Any = DynamicLayer()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return layer
