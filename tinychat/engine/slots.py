"""The rows of the KV pool while nobody uses them: what each still holds, and which of them the next prompt gets."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from tinychat.engine.prefill import Cache, shared_prefix


@dataclass
class Slot:
    """A row of the pool. `keys` name what it holds, one a token; `left` is when it was last given back."""

    cache: Cache
    keys: list[Hashable] = field(default_factory=list[Hashable])
    left: int = 0

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.cache.truncate([length])
        del self.keys[length:]


class Slots:
    """The free ones of `count` rows; `pool` makes them all when the first one is needed."""

    def __init__(self, count: int, pool: Callable[[], Cache]) -> None:
        self.count = count
        self.free: list[Slot] = []
        self._pool: Callable[[], Cache] | None = pool
        self._returns = 0

    def __len__(self) -> int:
        return len(self.free) if self._pool is None else self.count

    @property
    def tokens(self) -> int:
        """Tokens that the free rows hold."""
        return sum(len(slot.keys) for slot in self.free)

    def take(self, keys: Sequence[Hashable]) -> Slot:
        """The free row that holds most of the beginning of these keys, and nothing else; of equals the oldest."""
        if self._pool is not None:
            pool, self._pool = self._pool(), None
            self.free = [Slot(pool.select([row])) for row in range(self.count)]
        slot = max(self.free, key=lambda slot: (shared_prefix(slot.keys, keys), -slot.left))
        self.free.remove(slot)
        slot.truncate(shared_prefix(slot.keys, keys))
        return slot

    def give_back(self, slot: Slot, cache: Cache, keys: Sequence[Hashable]) -> None:
        """A row is free again. Its cache may hold fewer tokens than there are keys, or more."""
        self._returns += 1
        cache.compact()
        slot.cache, slot.keys, slot.left = cache, list(keys), self._returns
        slot.truncate(min(cache.lengths[0], len(slot.keys)))
        self.free.append(slot)

    def forget(self, count: int) -> int:
        """Forget so many tokens of the free rows, the oldest rows' first; how many they did not have."""
        for slot in sorted(self.free, key=lambda slot: slot.left):
            kept = max(len(slot.keys) - count, 0)
            count -= len(slot.keys) - kept
            slot.truncate(kept)
        return count
