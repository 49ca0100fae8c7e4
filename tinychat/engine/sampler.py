"""From logits to a token: penalties, then warpers, then a draw. One `Sampler` a row, built once and called blindly.

The order is that of transformers' generate(): logit bias, repetition penalty, (frequency and presence penalties,)
temperature, top-k, top-p, min-p, typical-p. Every function takes scores `[..., V]` in float32 and copies.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tinychat.core import SamplingParams
from tinychat.errors import ModelError, UsageError
from tinychat.layers.torch_threads import one_thread

Warper = Callable[[Tensor], Tensor]

# Dividing by less overflows float32; at this value already every draw falls on the highest score.
COLDEST = 1e-6
SEED_BITS = 32


def bias_scores(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Adds values `[N]` to the scores of ids `[N]`."""
    return scores.index_add(-1, ids, values.expand(*scores.shape[:-1], -1))


def penalize_repetition(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Makes each of ids `[N]` less likely, once (CTRL, Keskar et al. 2019); ids beyond the vocabulary do not count."""
    vocabulary = scores.shape[-1]
    seen = torch.zeros(vocabulary + 1, dtype=torch.bool, device=scores.device)
    seen[ids.clamp(max=vocabulary)] = True
    penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen[:vocabulary], penalized, scores)


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
    """The steps of a draw that these params ask for, in order; none where the answer is greedy."""
    if params.temperature == 0:
        return ()
    steps: tuple[tuple[bool, Warper], ...] = (
        (params.temperature != 1, partial(scale, temperature=params.temperature)),
        (params.top_k > 0, partial(keep_top_k, k=params.top_k)),
        (params.top_p < 1, partial(keep_top_p, p=params.top_p)),
        (params.min_p > 0, partial(keep_min_p, p=params.min_p)),
        (params.typical_p < 1, partial(keep_typical, mass=params.typical_p)),
    )
    return tuple(warp for wanted, warp in steps if wanted)


class Sampler:
    """Draws the tokens of one row; `seed` repeats the draw and is None where no number is ever drawn.

    The generator is private and lives on the CPU, one number a token: the stream depends on no other row or device.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], device: torch.device | str) -> None:
        self.params = params
        self.seed = params.seed
        if params.temperature > 0 and params.seed is None:
            self.seed = secrets.randbits(SEED_BITS)
        self._warpers = warpers(params)
        self._prompt = torch.tensor(sorted(set(prompt_ids)), dtype=torch.long, device=device)
        _check_bias(params.logit_bias)
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.long, device=device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self._generator = torch.Generator().manual_seed(self.seed or 0)

    def __call__(self, logits: Tensor, generated: Sequence[int]) -> tuple[int, float]:
        """Logits `[V]`, any float dtype, and the answer so far -> the next token and its raw log-probability.

        Raises ModelError where the logits are not numbers, UsageError where the params leave no token.
        """
        with one_thread():
            raw = logits.float()
            _check_logits(raw, logits.dtype)
            scores = self.process(raw, generated)
            if not scores.max().isfinite():
                raise UsageError(
                    "the sampling settings leave no token to draw",
                    "give less extreme values of logit_bias and the penalties",
                )
            token = int(scores.argmax()) if self.params.temperature == 0 else self._draw(scores)
            return token, float(raw[token] - raw.logsumexp(-1))

    @property
    def temperature(self) -> float | None:
        """What alone decides about a draw, beside the logits; None where there is more, such as a penalty."""
        params = self.params
        penalties = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1
        more = penalties or params.logit_bias or len(self._warpers) > (params.temperature not in (0, 1))
        return None if more else params.temperature

    def number(self) -> float:
        """The next of this row's random numbers, in [0, 1); one is taken a token, and none where no draw is made."""
        return 0.0 if self.params.temperature == 0 else float(self._random())

    def process(self, scores: Tensor, generated: Sequence[int]) -> Tensor:
        """Scores `[V]` float32 -> the scores that are drawn from; -inf is out. Changes nothing, draws nothing."""
        scores = self._penalize(self._add_bias(scores), generated)
        for warp in self._warpers:
            scores = warp(scores)
        return scores

    def _add_bias(self, scores: Tensor) -> Tensor:
        if not self.params.logit_bias:
            return scores
        vocabulary, highest = scores.shape[-1], max(self.params.logit_bias)
        if highest >= vocabulary:
            raise _outside(highest, f"the vocabulary ends at {vocabulary - 1}")
        return bias_scores(scores, self._biased, self._bias)

    def _penalize(self, scores: Tensor, generated: Sequence[int]) -> Tensor:
        params = self.params
        counted = bool(params.frequency_penalty or params.presence_penalty)
        if params.repetition_penalty == 1 and not counted:
            return scores
        ids = torch.tensor(generated, dtype=torch.long, device=scores.device)
        if params.repetition_penalty != 1:
            scores = penalize_repetition(scores, torch.cat((self._prompt, ids)), params.repetition_penalty)
        if counted:
            scores = penalize_counts(scores, ids, params.frequency_penalty, params.presence_penalty)
        return scores

    def _draw(self, scores: Tensor) -> int:
        """Inverts the distribution function at one random number in [0, 1)."""
        cumulative = scores.double().softmax(-1).cumsum(-1)
        number = self._random().to(cumulative.device)
        return int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))

    def _random(self) -> Tensor:
        return torch.rand((), dtype=torch.float64, generator=self._generator)


def make_sampler(params: SamplingParams, prompt_ids: Sequence[int], device: torch.device | str) -> Sampler:
    """The sampler of one row. prompt_ids are the prompt's text alone, without image placeholders."""
    return Sampler(params, prompt_ids, device)


def _check_logits(scores: Tensor, dtype: torch.dtype) -> None:
    if scores.max().isfinite():
        return
    finite = f"{int(scores.isfinite().sum())} of {scores.numel()} are finite"
    raise no_numbers(f" ({finite}, dtype {str(dtype).removeprefix('torch.')})")


def no_numbers(which: str = "") -> ModelError:
    """What is raised where a model's logits hold no number to draw by."""
    return ModelError(
        f"the model's logits are not numbers{which}",
        "float16 overflows in some models: try --dtype float32 or --dtype bfloat16",
    )


def _check_bias(bias: Mapping[int, float]) -> None:
    for token, value in bias.items():
        if token < 0:
            raise _outside(token, "the vocabulary begins at 0")
        if math.isnan(value) or value == math.inf:
            raise UsageError(f"logit_bias of token {token} is {value}", "give a number, or -inf to ban the token")


def _outside(token: int, bound: str) -> UsageError:
    return UsageError(f"logit_bias names token {token}, {bound}", "give token ids of this model's tokenizer")
