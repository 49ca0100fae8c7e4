"""Whole decoders on the GPU: a step's CUDA graph beside its launches, tokens beside prompts, and all beside float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu_checks.decoders import SHAPES, Shape, cache_of, decoder_of, float_model
from gpu_checks.machine import Machine
from gpu_checks.store import Json
from tinychat_kernels.cuda_golden import relative

SMALL = Shape("small", 1024, 2816, 16, 4, 64, 3, 2000)
CAPACITY = 640
STEPS, DRY_STEPS = 12, 2
PROMPT = 300
LOGITS, LOGPROBS = 0.03, 0.02  # bounds: float16 activations through some layers
CLEAR = 0.05  # of the logits' spread: how far the first must be ahead to be asked for

Chain = list[tuple[list[int], list[float]]]


def graph(machine: Machine) -> Json:
    """A step's first run is launches, the next are a CUDA graph: tokens and log-probabilities are the same bits."""
    shape, decoder = _decoder(machine)
    for rows in _rows(machine):
        for temperature in (0.8,) if machine.dry else (0.0, 0.8):
            cache = cache_of(machine, shape, rows, CAPACITY)
            runs = [_chain(machine, decoder, cache, rows, temperature) for _ in range(3)]
            if runs[0] != runs[1] or runs[1] != runs[2]:  # the first token of all is by launches
                return _wrong(f"{rows} rows at temperature {temperature}: {runs[0]}, {runs[1]} and {runs[2]}")
    return _right(f"{_rows(machine)} rows, drawn and greedy")


def prompts(machine: Machine) -> Json:
    """Greedy tokens one by one, beside the logits of prompts that hold them."""
    shape, decoder = _decoder(machine)
    for rows in _rows(machine):
        chain = _chain(machine, decoder, cache_of(machine, shape, rows, CAPACITY), rows, 0.0)
        said = _beside(machine, decoder, cache_of(machine, shape, rows, CAPACITY), _first(rows), chain)
        if said:
            return _wrong(f"{rows} rows: {said}")
    return _right("tokens and log-probabilities are a prompt's")


def modules(machine: Machine) -> Json:
    """Logits of a prompt and of tokens behind it, beside the model's modules in float32."""
    shape, decoder = _decoder(machine)
    plain = float_model(decoder, shape)
    count = 9 if machine.dry else PROMPT
    ids = torch.randint(0, shape.vocabulary, (2, count), generator=torch.Generator().manual_seed(3)).to(machine.device)
    cache = cache_of(machine, shape, 2, CAPACITY)
    with torch.no_grad():
        exact = plain.logits(plain.model(plain.model.embed_tokens(ids), [0, 0]).hidden)
        chunk: Any = decoder.forward(ids[:, : count - 2], cache, [0, 0], "every")
        parts = [chunk]
        for at in (count - 2, count - 1):
            parts.append(decoder.forward(ids[:, at : at + 1], cache, [at, at], "every"))
    error = relative(torch.cat(parts, 1), exact)
    said = f"logits of {count} tokens are off by {error:.1e}, {LOGITS} is allowed"
    return _right(said) if error <= LOGITS else _wrong(said)


CHECKS: dict[str, Callable[[Machine], Json]] = {
    "a step's CUDA graph beside its launches": graph,
    "tokens beside prompts": prompts,
    "a decoder beside its modules in float32": modules,
}


def _decoder(machine: Machine) -> tuple[Shape, Any]:
    torch.manual_seed(5)
    shape = SHAPES["tiny"] if machine.dry else SMALL
    return shape, decoder_of(machine, shape)


def _rows(machine: Machine) -> tuple[int, ...]:
    return (1, 2) if machine.dry else (1, 5, 8)


def _first(rows: int) -> list[int]:
    return [7 + row for row in range(rows)]


def _chain(machine: Machine, decoder: Any, cache: Any, rows: int, temperature: float) -> Chain:
    """Tokens from an empty cache on."""
    cache.truncate([0] * rows)
    tokens, chain = _first(rows), []
    for step in range(DRY_STEPS if machine.dry else STEPS):
        numbers = [(0.37 * (step + 1) + 0.11 * row) % 1 for row in range(rows)]
        tokens, logprobs = decoder.draw(tokens, cache, [temperature] * rows, numbers)
        cache.advance(1)
        chain.append((tokens, logprobs))
    return chain


def _beside(machine: Machine, decoder: Any, cache: Any, tokens: list[int], chain: Chain) -> str:
    """What is wrong with a greedy chain beside prompts of growing length; empty where nothing is."""
    ids = torch.tensor([tokens], device=machine.device).T
    for step, (drawn, logprobs) in enumerate(chain):
        embeds = torch.nn.functional.embedding(ids, decoder.kernel.weights.embeddings)
        logits = decoder.forward(embeds, cache, [0] * len(tokens), "last")[:, 0].double()
        top = logits.topk(2).values
        clear = (top[:, 0] - top[:, 1]) > CLEAR * logits.std(-1)
        chosen = torch.tensor(drawn, device=machine.device)
        if bool(((logits.argmax(-1) != chosen) & clear).any()):
            return f"step {step} draws {drawn}, a prompt gives {logits.argmax(-1).tolist()}"
        expected = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        if not relative(torch.tensor(logprobs, device=machine.device), expected) < LOGPROBS:
            return f"step {step} has log-probabilities {logprobs}, a prompt gives {expected.tolist()}"
        ids = torch.cat((ids, chosen[:, None]), 1)
    return ""


def _right(said: str) -> Json:
    return {"right": True, "said": said}


def _wrong(said: str) -> Json:
    return {"right": False, "said": said}
