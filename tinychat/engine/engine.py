"""The engine: requests in, events out. `Engine._answer` is the life of one request, step by step.

One sequence at a time. Its KV cache outlives the request: the next prompt re-uses the longest prefix that the two
share, pictures included, so a conversation's turn computes only what is new, and taking turns back costs nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinychat.core import Event, Failed, Finished, FinishReason, Progress, Request, Started, Timings, Token, Usage
from tinychat.engine.detokenizer import Detokenizer
from tinychat.engine.prefill import Draws, Model, embed_rest, open_slots, shared_prefix
from tinychat.engine.sampler import Sampler, make_sampler, no_numbers
from tinychat.engine.stopping import Stopping
from tinychat.errors import CapacityError, TinychatError
from tinychat.inputs.processor import Processor, Prompt
from tinychat.layers.kv_cache import KVCache

CHUNK = 512
CONTEXT = 4096


@dataclass
class Clock:
    """Seconds spent in each stage of a request."""

    started: float = field(default_factory=time.perf_counter)
    spent: dict[str, float] = field(default_factory=dict[str, float])
    first_token: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Generator[None, None, None]:
        """Add the time inside the block to a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begun

    def token(self) -> None:
        """Note when the first token came."""
        self.first_token = self.first_token or time.perf_counter() - self.started

    def timings(self, load_s: float, prefilled: int, decoded: int) -> Timings:
        """The split, with tokens a second; `decoded` counts the tokens after the first."""
        image, vision, prefill, decode = (
            self.spent.get(name, 0.0) for name in ("image", "vision", "prefill", "decode")
        )
        return Timings(
            load_s=load_s,
            image_s=image,
            vision_s=vision,
            prefill_s=prefill,
            decode_s=decode,
            ttft_s=self.first_token,
            prefill_tps=prefilled / prefill if prefill else 0.0,
            decode_tps=decoded / decode if decode else 0.0,
        )


@dataclass
class Answer:
    """What has come of a request so far."""

    stopping: Stopping
    text: list[str] = field(default_factory=list[str])
    tail: str = ""
    reason: FinishReason = "cancelled"


class Engine:
    """Answers requests with a model and its processor; `context` tokens hold a prompt and its answer together."""

    def __init__(
        self, model: Model, processor: Processor, *, context: int | None = None, chunk: int = CHUNK, load_s: float = 0.0
    ) -> None:
        self.model = model
        self.processor = processor
        self.context = context or min(processor.config.text.max_position_embeddings, CONTEXT)
        self.chunk = chunk
        self.load_s = load_s
        self._cache: KVCache | None = None
        self._keys: list[object] = []  # one a token in the cache, as Prompt.keys gives them
        self._cancelled = threading.Event()

    @property
    def cached_tokens(self) -> int:
        """Tokens in the KV cache now."""
        return len(self._keys)

    def reset(self) -> None:
        """Forget the cached conversation."""
        self._keep(0)

    def cancel(self) -> None:
        """End the running answer after its current token; safe from a signal handler or another thread."""
        self._cancelled.set()

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Answer the requests in order. A request that fails yields Failed; the ones after it go on.

        `cancel` counts from this call on, even before the first event is asked for.
        """
        self._cancelled.clear()
        return self._run(requests)

    def _run(self, requests: Iterable[Request]) -> Iterator[Event]:
        for request in requests:
            try:
                yield from self._answer(request)
            except TinychatError as error:
                yield Failed(request.id, error.message, error.remedy, error.exit_code)
            self._cancelled.clear()

    def _answer(self, request: Request) -> Iterator[Event]:
        clock, prompt = Clock(), self.processor(request)
        answer = Answer(self._stopping(request, self._room(prompt)))
        cached = self._reuse(prompt)
        sampler = make_sampler(request.sampling, _text_ids(prompt), self.model.device)
        yield Started(request.id, len(prompt.ids), prompt.image_tokens, cached)
        features = yield from self._look(request, prompt, cached, clock)
        logits = yield from self._read(request, prompt, features, clock)
        if logits is not None:
            yield from self._speak(request, logits, sampler, answer, clock)
        made = answer.stopping.token_ids
        yield Finished(
            request.id,
            text="".join(answer.text),
            tail=answer.tail,
            token_ids=tuple(made),
            finish_reason=answer.reason,
            usage=Usage(len(prompt.ids), prompt.image_tokens, cached, len(made)),
            timings=clock.timings(self.load_s, len(prompt.ids) - cached, max(len(made) - 1, 0)),
            seed=sampler.seed,
        )

    def _stopping(self, request: Request, room: int) -> Stopping:
        processor = self.processor
        text = Detokenizer(processor.tokenizer)
        return Stopping(request.stopping, processor.stop_ids, processor.stop_strings, text, room)

    def _room(self, prompt: Prompt) -> int:
        """Tokens that the answer may have. Raises CapacityError where the prompt leaves none."""
        room = self.context - len(prompt.ids)
        if room < 1:
            raise CapacityError(
                f"the prompt has {len(prompt.ids)} tokens, the context holds {self.context} with an answer",
                "clear or undo some turns, use fewer pictures, or start with a larger --context",
            )
        return room

    def _reuse(self, prompt: Prompt) -> int:
        """Cut the cache to what the prompt shares with it; at least one token is left to compute."""
        return self._keep(min(shared_prefix(self._keys, prompt.keys()), len(prompt.ids) - 1))

    def _keep(self, length: int) -> int:
        if self._cache is None:
            return 0
        self._cache.truncate(length)
        del self._keys[length:]
        return length

    def _look(
        self, request: Request, prompt: Prompt, cached: int, clock: Clock
    ) -> Generator[Event, None, list[Tensor] | None]:
        """Decode and encode the pictures that are not cached, one by one: `[n, D]` each; None if cancelled."""
        features: list[Tensor] = []
        slots = open_slots(prompt, cached)
        for done, slot in enumerate(slots):
            if self._cancelled.is_set():
                return None
            yield Progress(request.id, "images", done, len(slots))
            with clock.stage("image"):
                pixels = self.processor.pixels(prompt, [slot.image]).to(self.model.device)
            with clock.stage("vision"), running():
                features += list(self.model.encode_images(pixels))
            yield Progress(request.id, "vision", done + 1, len(slots))
        return features

    def _read(
        self, request: Request, prompt: Prompt, features: list[Tensor] | None, clock: Clock
    ) -> Generator[Event, None, Tensor | None]:
        """Fill the cache with the rest of the prompt, chunk by chunk -> the last logits `[V]`, None if cancelled."""
        if features is None:
            return None
        keys, logits = prompt.keys(), None
        with clock.stage("prefill"), running():
            cache = self._open_cache()
            embeds = embed_rest(self.model, prompt, cache.lengths[0], features)
        pieces: tuple[Tensor, ...] = torch.split(embeds, self.chunk, dim=1)
        for piece in pieces:
            if self._cancelled.is_set():
                return None
            with clock.stage("prefill"), running():
                logits = self.model.prefill(piece, cache, cache.lengths[0])[0, -1]
            self._keys = list(keys[: cache.lengths[0]])
            yield Progress(request.id, "prefill", cache.lengths[0], len(keys))
        return logits

    def _speak(
        self, request: Request, logits: Tensor, sampler: Sampler, answer: Answer, clock: Clock
    ) -> Iterator[Event]:
        """Draw, show and feed back one token after another, until the answer ends; `answer` collects it."""
        stopping = answer.stopping
        reason: FinishReason = "cancelled"
        token, logprob = sampler(logits, stopping.token_ids)
        while not self._cancelled.is_set():
            clock.token()
            step = stopping.push(token)
            if step.reason != "eos":
                answer.text.append(step.text)
                yield Token(request.id, token, step.text, logprob)
            if step.reason:
                reason = step.reason
                break
            token, logprob = self._next(token, sampler, stopping.token_ids, clock)
        last = stopping.finish(reason)
        answer.tail, answer.reason = last.text, last.reason or reason
        answer.text.append(last.text)

    def _next(self, token: int, sampler: Sampler, generated: Sequence[int], clock: Clock) -> tuple[int, float]:
        """The token after this one and its log-probability, drawn by the model itself where it can."""
        temperature, model = sampler.temperature, self.model
        with clock.stage("decode"), running():
            if temperature is not None and isinstance(model, Draws) and model.can_draw:
                return self._drawn(model, token, temperature, sampler.number())
            logits = self._decode(token)
        return sampler(logits, generated)

    def _drawn(self, model: Draws, token: int, temperature: float, number: float) -> tuple[int, float]:
        (drawn,), (logprob,) = model.draw([token], self._open_cache(), [temperature], [number])
        self._keys.append(token)
        if math.isnan(logprob):
            raise no_numbers()
        return drawn, logprob

    def _decode(self, token: int) -> Tensor:
        cache = self._open_cache()
        logits = self.model.decode(torch.tensor([[token]], device=self.model.device), cache)
        self._keys.append(token)
        return logits[0, -1]

    def _open_cache(self) -> KVCache:
        if self._cache is None:
            self._cache = self.model.make_cache(1, self.context)
        return self._cache


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


def _text_ids(prompt: Prompt) -> list[int]:
    """The prompt's ids without image placeholders."""
    inside = {i for slot in prompt.slots for i in range(slot.start, slot.end)}
    return [token for i, token in enumerate(prompt.ids) if i not in inside]
