"""The KV cache: a static pool of rows, and caches that hold some of its rows.

A row keeps the keys and values of one sequence at positions 0..length-1, without padding. Nothing wraps: a write past
the capacity raises. `write` stores one layer's chunk, `advance` moves the lengths once a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tinychat.errors import CapacityError, UsageError


class CacheShape(Protocol):
    """The sizes that a pool is made from (tinychat.config.TextConfig has them)."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class LayerView(NamedTuple):
    """One layer's storage: k and v `[slots, Hkv, capacity, D]`, and the slots that the cache's rows use."""

    k: Tensor
    v: Tensor
    rows: list[int]


class KVPool:
    """Storage for `slots` sequences of up to `capacity` tokens; hands out rows as KVCache objects."""

    def __init__(
        self,
        config: CacheShape,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (slots, config.num_key_value_heads, capacity, config.head_dim)
        self.capacity = capacity
        with torch.inference_mode(False):  # else a pool made there could be written to nowhere else
            self.layers = [
                (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
                for _ in range(config.num_hidden_layers)
            ]
        self._free = list(range(slots))

    def take(self, rows: int) -> KVCache:
        """Empty rows. Raises CapacityError where fewer are free."""
        if rows > len(self._free):
            raise CapacityError(
                f"{rows} cache rows are needed, {len(self._free)} are free", "run fewer requests at once"
            )
        taken, self._free = self._free[:rows], self._free[rows:]
        return KVCache(self, taken, [0] * rows)

    def release(self, cache: KVCache) -> None:
        """Give the rows of a cache back; the cache is empty afterwards."""
        self._free = sorted({*self._free, *cache.rows})
        cache.rows, cache.lengths = [], []


class KVCache:
    """Some rows of a pool. `lengths[i]` tokens of row i are filled."""

    def __init__(self, pool: KVPool, rows: list[int], lengths: list[int]) -> None:
        self.pool = pool
        self.rows = rows
        self.lengths = lengths

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.pool.capacity

    def __len__(self) -> int:
        return len(self.rows)

    def layer(self, index: int) -> LayerView:
        """The storage of one layer, shared by all rows of the pool."""
        k, v = self.pool.layers[index]
        return LayerView(k, v, self.rows)

    def starts(self, start: int | Tensor | Sequence[int]) -> list[int]:
        """A start position a row, from one for all, a tensor `[B]` or a list."""
        return start_positions(start, len(self.rows))

    def check_room(self, starts: Sequence[int], count: int) -> None:
        """Raise CapacityError where `count` tokens from these positions would not fit."""
        last = max(starts) + count
        if last > self.capacity:
            raise CapacityError(
                f"{last} tokens of context are needed, the cache holds {self.capacity}",
                "start with a larger --context, or clear the conversation",
            )

    @torch.no_grad()
    def write(self, index: int, k: Tensor, v: Tensor, start: int | Tensor | Sequence[int]) -> None:
        """Store k and v `[B, Hkv, T, D]` of layer `index` from position `start` (one, or `[B]`); lengths stay.

        What is stored carries no gradient. Raises CapacityError, UsageError for another number of rows.
        """
        if not len(k) == len(v) == len(self.rows):
            raise UsageError(f"keys of {len(k)} rows came for a cache of {len(self.rows)}", "give one row each")
        count, starts = k.shape[2], self.starts(start)
        self.check_room(starts, count)
        keys, values = self.pool.layers[index]
        for i, (row, at) in enumerate(zip(self.rows, starts, strict=True)):
            keys[row, :, at : at + count] = k[i]
            values[row, :, at : at + count] = v[i]

    def view(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, length, D]` of layer `index`; no copy where the rows lie side by side."""
        keys, values = self.pool.layers[index]
        first = self.rows[0]
        if self.rows == list(range(first, first + len(self.rows))):
            span = slice(first, first + len(self.rows))
            return keys[span, :, :length], values[span, :, :length]
        return keys[self.rows, :, :length], values[self.rows, :, :length]

    def advance(self, counts: int | Sequence[int]) -> None:
        """Count the tokens just written: once a forward, after all layers have written."""
        counts = [counts] * len(self.rows) if isinstance(counts, int) else counts
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forget what lies beyond these lengths. Raises UsageError where a row is shorter."""
        wanted = [lengths] * len(self.rows) if isinstance(lengths, int) else list(lengths)
        for new, old in zip(wanted, self.lengths, strict=True):
            if not 0 <= new <= old:
                raise UsageError(f"a cache row of {old} tokens cannot be cut to {new}", f"give a length of 0 to {old}")
        self.lengths = wanted

    def select(self, rows: Sequence[int]) -> KVCache:
        """The rows at these indices, in this order; nothing is copied."""
        return KVCache(self.pool, [self.rows[i] for i in rows], [self.lengths[i] for i in rows])

    @staticmethod
    def cat(caches: Sequence[KVCache]) -> KVCache:
        """All rows of caches of one pool, in order; nothing is copied."""
        pool = caches[0].pool
        if any(cache.pool is not pool for cache in caches):
            raise UsageError("caches of different pools cannot be joined", "take the rows from one pool")
        return KVCache(pool, [r for c in caches for r in c.rows], [n for c in caches for n in c.lengths])

    def export(self, row: int, start: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of k and v `[Hkv, end - start, D]` of every layer of a row: for a prefix cache or a disk."""
        slot, length = self.rows[row], self.lengths[row]
        if not 0 <= start <= end <= length:
            raise UsageError(f"tokens {start} to {end} of a cache row of {length} are wanted", "stay within its length")
        return [(k[slot, :, start:end].clone(), v[slot, :, start:end].clone()) for k, v in self.pool.layers]

    def load(self, row: int, start: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write back what `export` gave, from position `start`, and set the row's length to its end."""
        count = layers[0][0].shape[1]
        if not 0 <= start <= self.lengths[row]:
            raise UsageError(f"a cache row of {self.lengths[row]} tokens cannot go on at {start}", "leave no gap")
        self.check_room([start], count)
        slot = self.rows[row]
        for (keys, values), (k, v) in zip(self.pool.layers, layers, strict=True):
            keys[slot, :, start : start + count] = k
            values[slot, :, start : start + count] = v
        self.lengths[row] = start + count


def start_positions(start: int | Tensor | Sequence[int], rows: int) -> list[int]:
    """A first position a row, from one for all or one each. Raises UsageError for another number of them."""
    if isinstance(start, Tensor):
        start = start.tolist()
    starts = [start] * rows if isinstance(start, int) else list(start)
    if len(starts) != rows:
        raise UsageError(f"{len(starts)} start positions came for {rows} rows", "give one, or one a row")
    return starts
