"""From a prompt to the first logits: encode the pictures that are not cached, then the tokens, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tinychat.inputs.processor import Prompt, Slot
from tinychat.layers.kv_cache import KVCache


class Model(Protocol):
    """What the engine needs of a model; VilaLlamaForCausalLM says what each method takes and gives."""

    @property
    def device(self) -> torch.device: ...
    def embed(self, ids: Tensor, slots: Sequence[tuple[int, int]], features: Sequence[Tensor]) -> Tensor: ...
    def encode_images(self, images: Tensor) -> Tensor | list[Tensor]: ...
    def prefill(self, embeds: Tensor, cache: KVCache, start: int) -> Tensor: ...
    def decode(self, ids: Tensor, cache: KVCache) -> Tensor: ...
    def make_cache(self, rows: int, capacity: int) -> KVCache: ...


@runtime_checkable
class Draws(Protocol):
    """A model that may draw the next token where it computes, so that no logits come back."""

    @property
    def can_draw(self) -> bool: ...
    def draw(
        self, tokens: Sequence[int], cache: KVCache, temperatures: Sequence[float], numbers: Sequence[float]
    ) -> tuple[list[int], list[float]]:
        """The newest token of each row, appended to the cache -> the next one and its log-probability."""
        ...


def shared_prefix(cached: Sequence[object], wanted: Sequence[object]) -> int:
    """How many leading keys are equal."""
    pairs = zip(cached, wanted, strict=False)
    return next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(cached), len(wanted)))


def open_slots(prompt: Prompt, cached: int) -> list[Slot]:
    """The image slots that reach past the first `cached` tokens."""
    return [slot for slot in prompt.slots if slot.end > cached]


def embed_rest(model: Model, prompt: Prompt, cached: int, features: Sequence[Tensor]) -> Tensor:
    """Embeddings `[1, T - cached, D]` of what is not cached; one `[n, D]` of `features` an open slot."""
    slots = open_slots(prompt, cached)
    ranges = [(max(slot.start - cached, 0), slot.end - cached) for slot in slots]
    rows = [rows[max(cached - slot.start, 0) :] for slot, rows in zip(slots, features, strict=True)]
    ids = torch.tensor(prompt.ids[cached:], device=model.device)
    return model.embed(ids, ranges, rows)
