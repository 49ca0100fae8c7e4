"""What is done to scores before a draw: penalties, then warpers. Pure functions of scores `[..., V]` float32; all copy.

Each is the processor of transformers of the same purpose, bit for bit (top-p but for the choice among equals).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tinychat.core import SamplingParams

Warper = Callable[[Tensor], Tensor]

# Dividing by less overflows float32; at this value already every draw falls on the highest score.
COLDEST = 1e-6


def bias_scores(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Adds values `[N]` to the scores of ids `[N]`."""
    return scores.index_add(-1, ids, values.expand(*scores.shape[:-1], -1))


def penalize_repetition(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Makes each of ids `[N]` less likely, once (CTRL, Keskar et al. 2019); ids beyond the vocabulary do not count."""
    seen = ids[ids < scores.shape[-1]]
    before = scores.index_select(-1, seen)
    return scores.index_copy(-1, seen, torch.where(before < 0, before * penalty, before / penalty))


def penalize_counts(scores: Tensor, ids: Tensor, frequency: float, presence: float) -> Tensor:
    """Subtracts count * frequency + (count > 0) * presence for each of ids `[N]`, as OpenAI's API defines it."""
    counts = torch.bincount(ids, minlength=scores.shape[-1])
    return scores - counts * frequency - (counts > 0) * presence


def scale(scores: Tensor, temperature: float) -> Tensor:
    """Divides by the temperature."""
    return scores / max(temperature, COLDEST)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Keeps the k highest scores and those equal to the k-th (Fan et al. 2018)."""
    kth = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return _drop(scores, scores < kth)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Keeps the fewest tokens whose probabilities add up to p (Holtzman et al. 2020); one at least."""
    probs = scores.softmax(-1)
    # Tokens this unlikely do not add up to 1 - p even all together: they are out, and only the others need sorting.
    count = int((probs > (1 - p) / scores.shape[-1]).sum(-1).amax())
    likeliest, ids = probs.topk(max(count, 1))
    above = likeliest.cumsum(-1) - likeliest
    unlikely = torch.ones_like(probs, dtype=torch.bool).scatter(-1, ids, above >= p)
    return _drop(scores, unlikely)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """Keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    probs = scores.softmax(-1)
    return _drop(scores, probs < p * probs.amax(-1, keepdim=True))


def keep_typical(scores: Tensor, mass: float) -> Tensor:
    """Keeps tokens whose surprise is nearest to the entropy, until they add up to mass (Meister et al. 2022)."""
    logprobs = scores.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    distance, order = (-logprobs - entropy).abs().sort()
    cumulative = scores.gather(-1, order).softmax(-1).cumsum(-1)
    last = (cumulative < mass).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    atypical = distance > distance.gather(-1, last)
    return _drop(scores, atypical.scatter(-1, order, atypical))


def _drop(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -math.inf)


def warpers(params: SamplingParams) -> tuple[Warper, ...]:
    """The steps that leave tokens out, those that these params ask for, in order; none where the answer is greedy."""
    if params.temperature == 0:
        return ()
    steps: tuple[tuple[bool, Warper], ...] = (
        (params.top_k > 0, partial(keep_top_k, k=params.top_k)),
        (params.top_p < 1, partial(keep_top_p, p=params.top_p)),
        (params.min_p > 0, partial(keep_min_p, p=params.min_p)),
        (params.typical_p < 1, partial(keep_typical, mass=params.typical_p)),
    )
    return tuple(warp for wanted, warp in steps if wanted)
