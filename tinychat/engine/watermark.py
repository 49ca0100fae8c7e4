"""A watermark in the words: half of the vocabulary, another half after each token, is made a little likelier.

"A Watermark for Large Language Models" (Kirchenbauer et al. 2023, algorithm 2), with the constants of LoRAX. It is the
WatermarkLogitsProcessor of transformers on a CPU, scheme "lefthash" of one token; its WatermarkDetector finds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinychat.engine.warpers import bias_scores

GREEN_SHARE = 0.5
BIAS = 2.0
HASH_KEY = 15485863
SEEDS = 2**64 - 1


def green_ids(previous: int, vocabulary: int) -> Tensor:
    """The ids `[vocabulary / 2]` that are favoured after the token `previous`: on the CPU, alike on every machine."""
    generator = torch.Generator().manual_seed(HASH_KEY * previous % SEEDS)
    return torch.randperm(vocabulary, generator=generator)[: int(vocabulary * GREEN_SHARE)]


def mark(scores: Tensor, previous: int) -> Tensor:
    """Adds BIAS to the favoured ones of scores `[V]`; a copy."""
    green = green_ids(previous, scores.shape[-1]).to(scores.device)
    return bias_scores(scores, green, torch.full(green.shape, BIAS, device=scores.device))
