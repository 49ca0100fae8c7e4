"""From logits to a token: watermark, penalties, warpers, a draw. One `Sampler` a row, built once and called blindly.

The order is that of LoRAX, and of transformers' generate() but for the watermark, which comes last there: watermark,
logit bias, repetition penalty, frequency and presence penalties, temperature, top-k, top-p, min-p, typical-p.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinychat.core import SamplingParams, TopToken
from tinychat.engine.logprobs import top_tokens
from tinychat.engine.warpers import bias_scores, penalize_counts, penalize_repetition, scale, warpers
from tinychat.engine.watermark import mark
from tinychat.errors import ModelError, UsageError
from tinychat.layers.torch_threads import one_thread

SEED_BITS = 32


@dataclass(frozen=True, slots=True)
class Draw:
    """A token; `logprob` by the model's logits, `processed_logprob` by what was drawn from (None if not known).

    `top` are the likeliest tokens by the model's logits, without texts.
    """

    token: int
    logprob: float
    processed_logprob: float | None
    top: tuple[TopToken, ...] = ()


class Sampler:
    """Draws the tokens of one row; `seed` repeats the draw and is None where no number is ever drawn.

    The generator is private and lives on the CPU, one number a token: the stream depends on no other row or device.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], device: torch.device | str) -> None:
        self.params = params
        self.seed: int | None = None
        if params.temperature > 0:
            self.seed = secrets.randbits(SEED_BITS) if params.seed is None else params.seed
        self._warpers = warpers(params)
        self._penalized = _penalizes(params)
        self._last = prompt_ids[-1] if prompt_ids else None
        self._prompt = torch.tensor(sorted(set(prompt_ids)), dtype=torch.long, device=device)
        _check_bias(params.logit_bias)
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.long, device=device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self._generator = torch.Generator().manual_seed(self.seed or 0)

    def __call__(self, logits: Tensor, generated: Sequence[int]) -> Draw:
        """Logits `[V]`, any float dtype, and the answer so far -> the next token. The logits stay as they are.

        Raises ModelError where the logits are not numbers, UsageError where the params leave no token.
        """
        with one_thread():
            raw = logits.float()
            if not raw.max().isfinite():
                raise no_numbers(logits)
            scores, ids = self._candidates(raw, generated)
            place = int(scores.argmax(-1)) if self.params.temperature == 0 else self._draw(scores)
            token = place if ids is None else int(ids[place])
            logprobs = raw.log_softmax(-1)
            processed = logprobs if scores is raw else scores.log_softmax(-1)
            top = top_tokens(raw, logprobs, self.params.top_n_tokens)
            return Draw(token, float(logprobs[token]), float(processed[place]), top)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token by the model's own logits is taken."""
        return self.params.temperature == 0 and not self._penalized

    @property
    def temperature(self) -> float | None:
        """What alone decides about a draw, beside the logits; None where more is asked for, such as a penalty."""
        params = self.params
        more = self._penalized or params.top_n_tokens or self._warpers
        return None if more else params.temperature

    def number(self) -> float:
        """The next of this row's random numbers, in [0, 1); one is taken a token, and none where no draw is made."""
        return 0.0 if self.params.temperature == 0 else float(self._random())

    def process(self, scores: Tensor, generated: Sequence[int]) -> Tensor:
        """Scores `[V]` float32 -> the scores that are drawn from; -inf is out. Changes nothing, draws nothing."""
        kept, ids = self._candidates(scores, generated)
        return kept if ids is None else torch.full_like(scores, -math.inf).index_copy(-1, ids, kept)

    def _candidates(self, scores: Tensor, generated: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Scores `[V]` -> those that are drawn from, and which tokens they are of (None: of all)."""
        temperature, ids = self.params.temperature, None
        if self._penalized:
            scores = self._penalize(self._add_bias(self._mark(scores, generated)), generated)
        if temperature not in (0, 1):
            scores = scale(scores, temperature)
        if not scores.max().isfinite():
            raise UsageError(
                "the sampling settings leave no token to draw",
                "give less extreme values of logit_bias and the penalties",
            )
        for warp in self._warpers:
            scores = warp(scores)
            kept = scores.isfinite().nonzero()[:, 0]  # few: the next step and the draw have less to do
            scores, ids = scores[kept], kept if ids is None else ids[kept]
        return scores, ids

    def _mark(self, scores: Tensor, generated: Sequence[int]) -> Tensor:
        previous = generated[-1] if generated else self._last
        return mark(scores, previous) if self.params.watermark and previous is not None else scores

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


def _penalizes(params: SamplingParams) -> bool:
    """Whether scores change before the warpers."""
    penalties = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1
    return bool(penalties or params.logit_bias or params.watermark)


def no_numbers(logits: Tensor | None = None) -> ModelError:
    """What is raised where a model's logits `[V]` hold no number to draw by."""
    which = ""
    if logits is not None:
        finite = f"{int(logits.isfinite().sum())} of {logits.numel()} are finite"
        which = f" ({finite}, dtype {str(logits.dtype).removeprefix('torch.')})"
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
