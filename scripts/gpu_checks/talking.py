"""An answer of the project's engine from a decoder with random weights: what a user waits for, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gpu_checks.decoders import DTYPE, Shape
from gpu_checks.machine import Machine
from gpu_checks.store import Json
from tinychat.core import Failed, Finished, Message, Request, SamplingParams, StoppingParams, Text
from tinychat.engine.engine import CHUNK, Engine
from tinychat.inputs.processor import Prompt
from tinychat.layers.cuda_decoder import CudaDecoder
from tinychat.layers.kv_cache import KVCache, KVPool

PROMPT, ANSWER = 512, 128
DRY_PROMPT, DRY_ANSWER = 9, 3
TEMPERATURE = 0.7


@dataclass
class Speaker:
    """What the engine asks of a model, by a CudaDecoder alone: no pictures."""

    decoder: CudaDecoder
    shape: Shape
    device: torch.device
    can_draw: bool = True

    def embed(self, ids: Tensor, slots: Sequence[object], features: Sequence[object]) -> Tensor:
        assert not slots and not features
        return torch.nn.functional.embedding(ids, self.decoder.kernel.weights.embeddings)[None]

    def prefill(self, embeds: Tensor, cache: KVCache, start: int) -> Tensor:
        logits = self.decoder.forward(embeds, cache, [start], "last")
        assert logits is not None
        cache.advance(embeds.shape[1])
        return logits

    def draw(
        self, tokens: Sequence[int], cache: KVCache, temperatures: Sequence[float], numbers: Sequence[float]
    ) -> tuple[list[int], list[float]]:
        found = self.decoder.draw(list(tokens), cache, list(temperatures), list(numbers))
        cache.advance(1)
        return found

    def make_cache(self, rows: int, capacity: int) -> KVCache:
        return KVPool(self.shape.config, rows, capacity, DTYPE, self.device).take(rows)


@dataclass
class Writer:
    """What the engine asks of a processor: a prompt of so many tokens, and tokens that are words."""

    count: int
    vocabulary: int
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizer = SimpleNamespace(
            decode=lambda ids, **_: "".join(f" {token}" for token in ids),
            convert_ids_to_tokens=lambda ids: [f" {token}" for token in ids],
            all_special_ids=[],
        )

    def __call__(self, request: Request) -> Prompt:
        return Prompt(tuple((len(request.id) + i) % self.vocabulary for i in range(self.count)))


def answer(machine: Machine, decoder: CudaDecoder, shape: Shape) -> Json:
    """Tokens a second of prompt and answer, and seconds to the first token, as a user's own answers say them."""
    count, length = (DRY_PROMPT, DRY_ANSWER) if machine.dry else (PROMPT, ANSWER)
    model: Any = Speaker(decoder, shape, machine.device)
    writer: Any = Writer(count, shape.vocabulary)
    engine = Engine(model, writer, context=count + length, chunk=CHUNK)
    sampling, stopping = SamplingParams(temperature=TEMPERATURE, seed=1), StoppingParams(max_new_tokens=length)
    for name in ("warm", "timed"):
        engine.reset()
        request = Request(name, (Message("user", (Text("words"),)),), sampling=sampling, stopping=stopping)
        (*_, last) = engine.run([request])
        assert not isinstance(last, Failed), last.message
    assert isinstance(last, Finished) and len(last.token_ids) == length, last
    times = last.timings
    return {
        "prompt": count, "answer": length, "tokens_per_second": times.decode_tps,
        "prefill_tokens_per_second": times.prefill_tps, "first_token_seconds": times.ttft_s,
    }  # fmt: skip
