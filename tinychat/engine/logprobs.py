"""Log-probabilities of the model's own logits: of a drawn token, of its likeliest rivals, of a whole prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tinychat.core import TopToken

# Positions whose logits are float32 at once: 16 of 128,000 tokens are 8 MB.
BLOCK = 16


def top_tokens(scores: Tensor, logprobs: Tensor, count: int) -> tuple[TopToken, ...]:
    """The `count` highest of scores `[V]` (all, where it is more), equals by id, with their log-probabilities.

    They have no text yet: `with_texts`.
    """
    count = min(count, scores.shape[-1])
    if count == 0:
        return ()
    least = scores.topk(count).values[-1]
    ids = (scores >= least).nonzero()[:, 0]  # all equals of the last one, in the order of ids
    chosen = ids[scores[ids].argsort(descending=True, stable=True)[:count]]
    pairs = zip(chosen.cpu(), logprobs[chosen].cpu(), strict=True)
    return tuple(TopToken(int(token), "", float(logprob)) for token, logprob in pairs)


def with_texts(top: Sequence[TopToken], text: Callable[[int], str]) -> tuple[TopToken, ...]:
    """The same tokens with the text of each, such as detokenizer.token_text gives it."""
    return tuple(replace(token, text=text(token.id)) for token in top)


class PromptLogprobs:
    """Collects the log-probability of each token of a prompt that is read piece by piece.

    `values` has one entry a token. The first is nan: nothing came before it. Of the logits only the last ones are kept.
    """

    def __init__(self) -> None:
        self.values: list[float] = []
        self._last: Tensor | None = None

    def add(self, logits: Tensor, ids: Sequence[int]) -> None:
        """The next piece: its tokens, and the logits `[n, V]` after each of them."""
        if not ids:
            return
        self.values.append(math.nan if self._last is None else _logprobs(self._last, ids[:1])[0])
        self.values += _logprobs(logits[:-1], ids[1:])
        self._last = logits[-1:].clone()  # they wait for the next piece's first token


def prompt_logprobs(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """The logits `[n, V]` after each of n tokens -> the log-probability of each token; the first is nan."""
    collected = PromptLogprobs()
    collected.add(logits, ids)
    return collected.values


def _logprobs(logits: Tensor, ids: Sequence[int]) -> list[float]:
    wanted = torch.tensor(ids, dtype=torch.long, device=logits.device)
    places: tuple[Tensor, ...] = torch.split(logits, BLOCK)
    following: tuple[Tensor, ...] = torch.split(wanted, BLOCK)
    found: list[float] = []
    for rows, tokens in zip(places, following, strict=True):
        logprobs = rows.float().log_softmax(-1).gather(-1, tokens[:, None])
        found += [float(logprob) for logprob in logprobs.cpu()]
    return found
