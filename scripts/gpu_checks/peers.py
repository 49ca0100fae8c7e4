"""transformers in float16 with random weights of the same shapes: its decoding and its prompts, beside ours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_checks.decoders import Shape
from gpu_checks.machine import Machine
from gpu_checks.store import Json

DEPTHS, DRY_DEPTHS = (512, 4096), (20,)
PROMPTS, DRY_PROMPTS = (512, 2048), (20,)
TOKENS, DRY_TOKENS = 32, 3
WARM = 4
STATIC_TOKENS = 40  # of which the first ones are spent on compiling
KEPT = 20


def eager(machine: Machine, shape: Shape) -> Json:
    """Its own class with torch's attention and a cache that grows: the same prompts, and tokens one by one."""
    model = _model(machine, shape)
    with torch.inference_mode():
        return {
            "decode": [_decode(machine, model, depth) for depth in (DRY_DEPTHS if machine.dry else DEPTHS)],
            "prefill": [_prefill(machine, model, length) for length in (DRY_PROMPTS if machine.dry else PROMPTS)],
        }


def static(machine: Machine, shape: Shape) -> Json:
    """Its `generate` with a static cache, which it compiles on a GPU: seconds between tokens once that is over."""
    model = _model(machine, shape)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    depth, count = (DRY_DEPTHS[0], 6) if machine.dry else (DEPTHS[0], STATIC_TOKENS)
    ids = torch.randint(0, shape.vocabulary, (1, depth), device=machine.device)
    stamps = Stamps(machine.wait)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        cache_implementation="static", streamer=stamps,
    )  # fmt: skip
    spent = [end - begin for begin, end in zip(stamps.at, stamps.at[1:], strict=False)]
    return {"decode": [_row(depth, statistics.median(spent[-KEPT:]))], "prefill": []}


class Stamps:
    """When each token came; what transformers calls a streamer."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.at: list[float] = []
        self._wait = wait

    def put(self, value: object) -> None:  # transformers gives the tokens
        del value
        self._wait()
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _model(machine: Machine, shape: Shape) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(machine.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _decode(machine: Machine, model: Any, depth: int) -> Json:
    ids = torch.randint(0, model.config.vocab_size, (1, depth), device=machine.device)
    found = model(ids, use_cache=True, logits_to_keep=1)
    token, spent = found.logits[:, -1:].argmax(-1), []
    for _ in range((DRY_TOKENS if machine.dry else TOKENS) + WARM):
        machine.wait()
        begun = time.perf_counter()
        found = model(token, past_key_values=found.past_key_values, use_cache=True)
        token = found.logits[:, -1:].argmax(-1)
        token.item()
        spent.append(time.perf_counter() - begun)
    return _row(depth, statistics.median(spent[WARM:]))


def _row(depth: int, seconds: float) -> Json:
    return {"rows": 1, "depth": depth, "seconds": seconds, "tokens_per_second": 1 / seconds}


def _prefill(machine: Machine, model: Any, length: int) -> Json:
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=machine.device)
    seconds = machine.eager(lambda: model(ids, use_cache=True, logits_to_keep=1))
    return {"tokens": length, "seconds": seconds, "tokens_per_second": length / seconds}
