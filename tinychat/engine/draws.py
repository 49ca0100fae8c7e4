"""The next tokens of a batch, a sampler a row: each row as it would be alone, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tinychat.engine.logprobs import top_tokens
from tinychat.engine.sampler import Draw, Sampler, no_numbers
from tinychat.errors import TinychatError
from tinychat.layers.torch_threads import one_thread

Drawn = Draw | TinychatError


def draw_rows(samplers: Sequence[Sampler], logits: Tensor, generated: Sequence[Sequence[int]]) -> list[Drawn]:
    """Logits `[B, V]` and each row's answer so far -> the next token of each row.

    A row that cannot be drawn gives its error (what its sampler raises alone) and stops no other.
    """
    drawn: dict[int, Drawn] = {}
    with one_thread():
        greedy = [row for row, sampler in enumerate(samplers) if sampler.greedy]
        if greedy:
            theirs = logits if len(greedy) == len(samplers) else logits[greedy]
            drawn |= zip(greedy, _likeliest([samplers[row] for row in greedy], theirs), strict=True)
        for row, sampler in enumerate(samplers):
            if not sampler.greedy:
                drawn[row] = _draw(sampler, logits[row], generated[row])
    return [drawn[row] for row in range(len(samplers))]


def _draw(sampler: Sampler, logits: Tensor, generated: Sequence[int]) -> Drawn:
    try:
        return sampler(logits, generated)
    except TinychatError as error:
        return error


def _likeliest(samplers: Sequence[Sampler], logits: Tensor) -> list[Drawn]:
    raw = logits.float()
    tokens = [int(token) for token in raw.argmax(-1).cpu()]
    # One by one: of a whole batch, the order of the additions might be another one.
    logprobs = [row.log_softmax(-1) for row in raw]
    chosen = torch.stack([row[token] for row, token in zip(logprobs, tokens, strict=True)]).cpu()
    return [
        no_numbers(logits[row])
        if math.isnan(logprob := float(chosen[row]))
        else Draw(token, logprob, logprob, top_tokens(raw[row], logprobs[row], samplers[row].params.top_n_tokens))
        for row, token in enumerate(tokens)
    ]
