"""From a prompt to its first logits: encode the pictures that are not cached, then read the tokens, chunk by chunk."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tinychat.engine.logprobs import PromptLogprobs
from tinychat.errors import CapacityError, UsageError
from tinychat.inputs.processor import Prompt, Slot


class Cache(Protocol):
    """Keys and values of some rows; layers/kv_cache.KVCache says what each method does."""

    lengths: list[int]

    def __len__(self) -> int: ...
    def select(self, rows: Sequence[int], /) -> Any: ...
    def truncate(self, lengths: int | Sequence[int], /) -> None: ...
    def compact(self) -> None: ...
    @staticmethod
    def cat(caches: Sequence[Any], /) -> Any: ...


class Model(Protocol):
    """What the engine needs of a model; VilaLlamaForCausalLM says what each method takes and gives."""

    @property
    def device(self) -> torch.device: ...
    def embed(self, ids: Tensor, slots: Sequence[tuple[int, int]], features: Sequence[Tensor]) -> Tensor: ...
    def encode_images(self, images: Tensor) -> Tensor | list[Tensor]: ...
    def prefill(self, embeds: Tensor, cache: Any, start: int) -> Tensor: ...
    def decode(self, ids: Tensor, cache: Any) -> Tensor: ...
    def verify(self, ids: Tensor, cache: Any) -> Tensor: ...
    def make_cache(self, rows: int, capacity: int) -> Any: ...


@runtime_checkable
class Draws(Protocol):
    """A model that may draw the next token where it computes, so that no logits come back."""

    @property
    def can_draw(self) -> bool: ...
    def draw(
        self, tokens: Sequence[int], cache: Any, temperatures: Sequence[float], numbers: Sequence[float]
    ) -> tuple[list[int], list[float]]:
        """The newest token of each row, appended to the cache -> the next one and its log-probability."""
        ...


class Filling:
    """A prompt on its way into the one row of `cache`, which may hold the beginning of it.

    First `look` at each picture of `unseen`, then `read` until it gives logits. `logprobs` collects the
    prompt's where they are wanted: nothing may be cached then. The first `whole` tokens (None: all) are the prompt
    proper, what follows them has been answered.
    """

    def __init__(
        self, model: Model, prompt: Prompt, cache: Cache, wants_logprobs: bool = False, whole: int | None = None
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.cache = cache
        self.whole = len(prompt.ids) if whole is None else whole
        self.logprobs = PromptLogprobs() if wants_logprobs else None
        self.unseen = open_slots(prompt, self.computed)
        self._features: list[Tensor] = []
        self._cached = self.computed
        self._embeds: Tensor | None = None

    @property
    def computed(self) -> int:
        """Tokens of the prompt in the cache."""
        return self.cache.lengths[0]

    def look(self, pixels: Tensor) -> None:
        """Encode the first picture of `unseen`, whose pixels are given."""
        with running():
            self._features += list(self.model.encode_images(pixels.to(self.model.device)))
        self.unseen = self.unseen[1:]

    def read(self, most: int) -> Tensor | None:
        """Read up to so many tokens; the last one's logits `[V]` once the prompt is in the cache, else None."""
        with running():
            if self._embeds is None:
                self._embeds = embed_rest(self.model, self.prompt, self._cached, self._features)
                self._features.clear()
            start = self.computed
            if reads_whole(self.model) and start < self.whole:
                most = self.whole - start
            piece = self._embeds[:, start - self._cached : start - self._cached + most]
            if self.logprobs is None:
                logits = self.model.prefill(piece, self.cache, start)[0]
            else:
                logits = self.model.verify(piece, self.cache)[0]
                self.logprobs.add(logits, self.prompt.ids[start : self.computed])
        return logits[-1] if self.computed == len(self.prompt.ids) else None


def reads_whole(model: Model) -> bool:
    """Whether its prompts are read in one piece, none of it cached: their tokens see each other in both directions."""
    return bool(getattr(model, "reads_whole", False))


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


def last_tokens(prompt: Prompt, count: int) -> Prompt:
    """The prompt without its beginning, `count` tokens or fewer: pictures are kept whole, or left out whole.

    Raises UsageError where the border lies inside the place of a picture.
    """
    first = len(prompt.ids) - count
    if first <= 0:
        return prompt
    if cut := next((slot for slot in prompt.slots if slot.start < first < slot.end), None):
        raise UsageError(
            f"the last {count} tokens begin inside a picture's {cut.end - cut.start}",
            f"take {len(prompt.ids) - cut.start} tokens with it, or {len(prompt.ids) - cut.end} without it",
        )
    slots = tuple(
        Slot(slot.start - first, slot.end - first, slot.image) for slot in prompt.slots if slot.start >= first
    )
    return Prompt(prompt.ids[first:], slots, prompt.digests, prompt.sizes, prompt.images)


@contextmanager
def running() -> Generator[None, None, None]:
    """Run the model: no gradients, and a lack of memory becomes a sentence."""
    try:
        with torch.inference_mode():
            yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise CapacityError(
            "the memory ran out while the model was running", "try a smaller --context or --chunk, or a 4-bit model"
        ) from error
