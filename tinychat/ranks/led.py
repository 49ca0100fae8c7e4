"""Rank 0's model: every call of the engine is told to the others, who do the same with their parts."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tinychat.errors import CapacityError
from tinychat.layers.kv_cache import KVCache, KVPool

if TYPE_CHECKING:
    from tinychat.models.vila_llama import VilaLlamaForCausalLM
    from tinychat.tiling import Tiles

Tell = Callable[..., None]
Together = Callable[[], AbstractContextManager[None]]


class CacheRows(NamedTuple):
    """Rows of a pool, as they are named to other ranks."""

    pool: int
    rows: list[int]
    lengths: list[int]


class LedModel:
    """What the engine sees of a model that several ranks share (tinychat.engine.prefill.Model says what that is).

    `tell` a word to all others, who then do the same; `together` turns what breaks the ranks' step into an error that
    ends the run.
    """

    def __init__(self, model: VilaLlamaForCausalLM, tell: Tell, together: Together) -> None:
        self.model = model
        self.llm = model.llm
        self._tell = tell
        self._together = together
        self._numbers: weakref.WeakKeyDictionary[KVPool, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count()
        self._gone: list[int] = []  # pools that nobody uses any more

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def embed(self, ids: Tensor, slots: Sequence[tuple[int, int]] = (), features: Sequence[Tensor] = ()) -> Tensor:
        """As VilaLlamaForCausalLM.embed; the others look their words up."""
        with self._all("embed", ids):
            return self.model.embed(ids, slots, features)

    def encode_images(self, images: Tensor | list[Tensor] | Tiles) -> Tensor | list[Tensor]:
        """As VilaLlamaForCausalLM.encode_images."""
        with self._all("encode_images", images):
            return self.model.encode_images(images)

    def prefill(self, embeds: Tensor, cache: KVCache, start: int | Tensor) -> Tensor:
        """As VilaLlamaForCausalLM.prefill."""
        cache.check_room(cache.starts(start), embeds.shape[1])
        with self._all("prefill", embeds, self._rows(cache), start):
            return self.model.prefill(embeds, cache, start)

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """As VilaLlamaForCausalLM.decode."""
        return self.verify(ids, cache)

    def verify(self, ids: Tensor, cache: KVCache) -> Tensor:
        """As VilaLlamaForCausalLM.verify."""
        cache.check_room(cache.lengths, ids.shape[1])
        with self._all("verify", ids, self._rows(cache)):
            return self.model.verify(ids, cache)

    def make_cache(self, rows: int = 1, capacity: int | None = None) -> KVCache:
        """As VilaLlamaForCausalLM.make_cache; every rank makes one for its heads."""
        number = next(self._next)
        with self._all("make_cache", number, rows, capacity):
            cache = self.model.make_cache(rows, capacity)
        self._numbers[cache.pool] = number
        weakref.finalize(cache.pool, self._gone.append, number)
        return cache

    @contextmanager
    def _all(self, name: str, *arguments: Any) -> Generator[None, None, None]:
        """Within it this rank does what the others were told to do."""
        with self._together():
            gone, self._gone[:] = list(self._gone), []
            if gone:
                self._tell("forget", gone)
            self._tell(name, *arguments)
            yield

    def _rows(self, cache: KVCache) -> CacheRows:
        if cache.pool not in self._numbers:
            message = "rows of several KV pools were joined, which ranks that share a model cannot follow"
            raise CapacityError(message, "take all rows from one make_cache")
        return CacheRows(self._numbers[cache.pool], list(cache.rows), list(cache.lengths))


class FollowedModel:
    """Another rank's model: does what it is told, and keeps the pools of its heads by their numbers."""

    def __init__(self, model: VilaLlamaForCausalLM) -> None:
        self.model = model
        self._pools: dict[int, KVPool] = {}

    @torch.inference_mode()
    def do(self, name: str, arguments: tuple[Any, ...]) -> None:
        """One word of rank 0's LedModel."""
        getattr(self, f"_{name}")(*arguments)

    def _embed(self, ids: Tensor) -> None:
        self.model.embed_text(ids.to(self.model.device))

    def _encode_images(self, images: Any) -> None:
        if isinstance(images, list):
            self.model.encode_images([image.to(self.model.device) for image in images])
        else:
            self.model.encode_images(images.to(self.model.device))

    def _prefill(self, embeds: Tensor, rows: CacheRows, start: int | Tensor) -> None:
        self.model.prefill(embeds.to(self.model.device), self._cache(rows), start)

    def _verify(self, ids: Tensor, rows: CacheRows) -> None:
        self.model.verify(ids.to(self.model.device), self._cache(rows))

    def _make_cache(self, number: int, rows: int, capacity: int | None) -> None:
        self._pools[number] = self.model.make_cache(rows, capacity).pool

    def _forget(self, numbers: list[int]) -> None:
        for number in numbers:
            self._pools.pop(number, None)

    def _cache(self, rows: CacheRows) -> KVCache:
        return KVCache(self._pools[rows.pool], rows.rows, rows.lengths)
