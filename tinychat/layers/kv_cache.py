"""The KV cache: a static pool of rows, and caches that hold some of its rows.

A row keeps the keys and values of one sequence at positions 0..length-1, without padding. Nothing wraps: a write past
the capacity raises. `write` stores one layer's chunk, `advance` moves the lengths once a forward.

A pool of int8 rounds what is written, with a scale for each token and head; what is viewed is float32 then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tinychat.errors import CapacityError, UsageError
from tinychat_kernels.int8 import quantize_tokens

Device = torch.device | str
Parts = tuple[Tensor, ...]  # keys and values `[..., D]`, and of int8 their scales, float32 `[...]`


class CacheShape(Protocol):
    """The sizes that a pool is made from (tinychat.config.TextConfig has them)."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class LayerView(NamedTuple):
    """One layer's storage: k and v `[slots, Hkv, capacity, D]`, and the slots that the cache's rows use.

    Those of int8 have scales, float32 `[slots, Hkv, capacity]`.
    """

    k: Tensor
    v: Tensor
    rows: list[int]
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class KVPool:
    """Storage for `slots` sequences of up to `capacity` tokens; hands out rows as KVCache objects.

    Floats of a dtype, or int8 with scales. Each layer lies on its own of several `device`s, else all on one.
    """

    def __init__(
        self,
        config: CacheShape,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: Device | Sequence[Device] = "cpu",
    ) -> None:
        self.config, self.dtype = config, dtype
        self.devices = _of_each(device, config.num_hidden_layers)
        shape = (slots, config.num_key_value_heads, capacity, config.head_dim)
        parts = [(shape, dtype)] * 2 + ([(shape[:3], torch.float32)] * 2 if dtype == torch.int8 else [])
        self.capacity = capacity
        with torch.inference_mode(False):  # else a pool made there could be written to nowhere else
            self.layers: list[Parts] = [
                tuple(torch.zeros(size, dtype=kind, device=where) for size, kind in parts) for where in self.devices
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
        k, v, *scales = self.pool.layers[index]
        return LayerView(k, v, self.rows, *scales)

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
        held = self.pool.layers[index]
        given = _as(held, (k, v))
        for i, (row, at) in enumerate(zip(self.rows, starts, strict=True)):
            for to, part in zip(held, given, strict=True):
                to[row, :, at : at + count] = part[i]

    def view(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, length, D]` of layer `index`; no copy where the rows lie side by side.

        Those of int8 come as float32, and are a copy.
        """
        first = self.rows[0]
        together = self.rows == list(range(first, first + len(self.rows)))
        rows = slice(first, first + len(self.rows)) if together else self.rows
        return _floats(tuple(part[rows, :, :length] for part in self.pool.layers[index]))

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

    def compact(self) -> None:
        """Keep no more memory than the rows need: theirs is the pool's."""

    def select(self, rows: Sequence[int]) -> KVCache:
        """The rows at these indices, in this order; nothing is copied."""
        return KVCache(self.pool, [self.rows[i] for i in rows], [self.lengths[i] for i in rows])

    @staticmethod
    def cat(caches: Sequence[KVCache]) -> KVCache:
        """All rows of caches, in order: of one pool nothing is copied, of several they come into a new one."""
        pool = caches[0].pool
        if any(cache.pool is not pool for cache in caches):
            return _joined(caches)
        return KVCache(pool, [r for c in caches for r in c.rows], [n for c in caches for n in c.lengths])

    def export(self, row: int, start: int, end: int) -> list[Parts]:
        """Copies of k and v `[Hkv, end - start, D]` of every layer of a row: for a prefix cache or a disk.

        Those of int8 are followed by their scales, float32 `[Hkv, end - start]` each.
        """
        slot, length = self.rows[row], self.lengths[row]
        if not 0 <= start <= end <= length:
            raise UsageError(f"tokens {start} to {end} of a cache row of {length} are wanted", "stay within its length")
        return [tuple(part[slot, :, start:end].clone() for part in layer) for layer in self.pool.layers]

    def load(self, row: int, start: int, layers: Sequence[Parts]) -> None:
        """Write back what `export` gave, from position `start`, and set the row's length to its end.

        What another kind of pool gave is rounded, or becomes floats.
        """
        count = layers[0][0].shape[1]
        if not 0 <= start <= self.lengths[row]:
            raise UsageError(f"a cache row of {self.lengths[row]} tokens cannot go on at {start}", "leave no gap")
        self.check_room([start], count)
        slot = self.rows[row]
        for held, given in zip(self.pool.layers, layers, strict=True):
            for to, part in zip(held, _as(held, given), strict=True):
                to[slot, :, start : start + count] = part
        self.lengths[row] = start + count


def _joined(caches: Sequence[KVCache]) -> KVCache:
    """Copies of all rows, in a pool like the first one that has room for the longest."""
    first, rows = caches[0].pool, [(cache, i) for cache in caches for i in range(len(cache))]
    capacity = max(cache.capacity for cache in caches)
    joined = KVPool(first.config, len(rows), capacity, first.dtype, first.devices).take(len(rows))
    for to, (cache, row) in enumerate(rows):
        if length := cache.lengths[row]:
            joined.load(to, 0, cache.export(row, 0, length))
    return joined


def _of_each(device: Device | Sequence[Device], layers: int) -> list[torch.device]:
    """A device a layer, from one for all or one each. Raises UsageError for another number of them."""
    devices = [device] * layers if isinstance(device, torch.device | str) else list(device)
    if len(devices) != layers:
        raise UsageError(f"{len(devices)} devices came for the caches of {layers} layers", "give one, or one a layer")
    return [torch.device(one) for one in devices]


def _as(held: Parts, given: Parts) -> Parts:
    """Keys and values of any kind, in as many parts as those that are held."""
    if len(given) == len(held):
        return given
    if len(held) == 2:
        return _floats(given)
    rounded = [quantize_tokens(part.flatten(0, -2)) for part in given]
    shape = given[0].shape
    return (*(one.weight.view(shape) for one in rounded), *(one.scale.view(shape[:-1]) for one in rounded))


def _floats(parts: Parts) -> tuple[Tensor, Tensor]:
    """Keys and values in floats: themselves, or int8 times its scale."""
    if len(parts) == 2:
        return parts[0], parts[1]
    k, v, k_scale, v_scale = parts
    return k * k_scale[..., None], v * v_scale[..., None]


def start_positions(start: int | Tensor | Sequence[int], rows: int) -> list[int]:
    """A first position a row, from one for all or one each. Raises UsageError for another number of them."""
    if isinstance(start, Tensor):
        start = start.tolist()
    starts = [start] * rows if isinstance(start, int) else list(start)
    if len(starts) != rows:
        raise UsageError(f"{len(starts)} start positions came for {rows} rows", "give one, or one a row")
    return starts
