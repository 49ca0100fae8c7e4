"""How far a quantized model's answers lie from the original's, on the same held-out tokens.

The original reads each prompt and continues it greedily; then both models read prompt and continuation, and their
predictions are compared token by token. While a greedy continuation of the other model would still be the same, it
has seen the same tokens: so the first place where its likeliest token differs is where its own answer would diverge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tinychat.core import Failed, Finished
from tinychat.engine.engine import Engine
from tinychat.engine.prefill import embed_rest, running
from tinychat.errors import ModelError
from tinychat.eval.heldout import Item, Kind
from tinychat.eval.logits import Predictions, without_logits
from tinychat.inputs.processor import Prompt

WHOLE = 8192  # tokens of vocabulary up to which all logits are kept
KEPT = 1024  # else so many of the likeliest, and the probability of all others as one
RESAMPLES = 1000
OTHERS = "compare a model with the one that it was made from, tokenizer and template included"
ROWS = 64  # positions whose distributions are computed at once


@dataclass(frozen=True, slots=True)
class Held:
    """A prompt and its continuation by a model of so many tokens of vocabulary; `scored` are the positions whose
    prediction counts, the last `answered` of them the answer's own."""

    kind: Kind
    prompt: Prompt
    answer: tuple[int, ...]
    scored: tuple[int, ...]
    answered: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model makes of a sequence: logits at the scored positions, its layers' outputs `[L, T, D]`."""

    logits: Predictions
    outputs: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Compared:
    """One sequence: KL divergence in nats and top-1 agreement at each scored position; the last `answered` are the
    answer's."""

    kind: Kind
    kl: np.ndarray
    same: np.ndarray
    answered: int

    @property
    def first(self) -> int | None:
        """Which token of the greedy answer is the first that differs; None where none does."""
        other = np.flatnonzero(~self.same[len(self.same) - self.answered :])
        return int(other[0]) if len(other) else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval (bootstrap over sequences, the tokens of one being dependent)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """Over `tokens` predictions in `answers` sequences; `first` holds each answer's first diverging token or None.

    `kl_along` is the mean KL at each place of the answers, `same_along` the share that has not diverged by then. All
    three are empty where no answer was generated.
    """

    tokens: int
    answers: int
    kl: Estimate
    kl_p99: Estimate
    top1: Estimate
    first: tuple[int | None, ...]
    kl_along: tuple[float, ...]
    same_along: tuple[float, ...]

    @property
    def unchanged(self) -> float | None:
        """The share of greedy answers that do not diverge; None where none was generated."""
        return self.first.count(None) / self.answers if self.first else None

    @property
    def median_first(self) -> int | None:
        """The median first diverging token; None where at least half of the answers, or all, never diverge."""
        if not self.first:
            return None
        ranked = sorted(float("inf") if first is None else first for first in self.first)
        middle = ranked[(len(ranked) - 1) // 2]
        return None if middle == float("inf") else int(middle)


def continued(engine: Engine, item: Item) -> Held:
    """An item with the model's greedy answer. Raises ModelError where the engine cannot answer."""
    prompt = engine.processor(item.request)
    for event in engine.run([item.request]):
        if isinstance(event, Failed):
            raise ModelError(f"the model cannot be compared: {event.message}", event.remedy)
        if isinstance(event, Finished):
            ids = event.token_ids
            answered = len(ids) + (event.finish_reason == "eos")  # where it ends is predicted too
            asked = text_positions(prompt) if item.reads_prompt else ()
            last = len(prompt.ids) - 1
            return Held(item.kind, prompt, ids, (*asked, *range(last, last + answered)), answered, _vocabulary(engine))
    raise ModelError("the engine ended without an answer", "report this as a bug")


def text_positions(prompt: Prompt) -> tuple[int, ...]:
    """The positions before the last whose next token is text."""
    inside = {i for slot in prompt.slots for i in range(slot.start, slot.end)}
    return tuple(i for i in range(len(prompt.ids) - 1) if i + 1 not in inside)


def read(engine: Engine, sequence: Held) -> Reading:
    """One forward pass over prompt and answer. Raises ModelError for NaN or Inf."""
    model, prompt = cast("Any", engine.model), sequence.prompt
    with running():
        features: list[Tensor] = []
        for slot in prompt.slots:
            features += list(model.encode_images(engine.processor.pixels(prompt, [slot.image]).to(model.device)))
        whole = replace(prompt, ids=(*prompt.ids, *sequence.answer))
        with without_logits(model) as seen:
            out = model(inputs_embeds=embed_rest(engine.model, whole, 0, features), output_hidden_states=True)
        outputs = torch.stack([state[0].cpu() for state in out.hidden_states[1:]])
        scored = seen[0][0, list(sequence.scored)]
    check_finite(scored)
    return Reading(Predictions(scored, model.get_output_embeddings(), sequence.vocabulary), outputs)


def check_finite(numbers: Tensor) -> None:
    """Raises ModelError for NaN or Inf in what a model gives."""
    if not torch.isfinite(numbers).all():
        raise ModelError("the model gives NaN or Inf on held-out data", "check its weights")


def check_same_tokens(engine: Engine, item: Item, sequence: Held) -> None:
    """Raises ModelError where another model makes other tokens of an item."""
    if (size := _vocabulary(engine)) != sequence.vocabulary:
        raise ModelError(f"the models have {sequence.vocabulary} and {size} tokens of vocabulary", OTHERS)
    if engine.processor(item.request).ids != sequence.prompt.ids:
        raise ModelError("the two models make different tokens of the same question", OTHERS)


def _vocabulary(engine: Engine) -> int:
    return engine.processor.config.text.vocab_size


def coded(logits: Iterable[Tensor]) -> dict[str, Tensor]:
    """Logits, some rows `[n, V]` at a time, as what is kept of all P of them: `top` ids `[P]`, `ids` `[P, K]` (empty:
    all), `logp` `[P, V]` or `[P, K + 1]`. Raises ModelError for NaN or Inf."""
    parts = [_coded(some) for some in logits]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _coded(logits: Tensor) -> dict[str, Tensor]:
    check_finite(logits)
    ids = logits.topk(KEPT, 1).indices if logits.shape[1] > WHOLE else torch.empty((len(logits), 0), dtype=torch.int64)
    return {"top": logits.argmax(1), "ids": ids.to(torch.int32), "logp": log_probabilities(logits, ids)}


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """`[P, V]` -> fp32 `[P, V]`, or at ids `[P, K]` and of all others together `[P, K + 1]`."""
    rows = [_log_probabilities(x, i) for x, i in zip(logits.split(ROWS), ids.split(ROWS), strict=True)]
    return torch.cat(rows) if rows else logits


def _log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    every = logits.double().log_softmax(1)
    if not ids.shape[1]:
        return every.float()
    picked = every.gather(1, ids.long())
    rest = (1 - picked.exp().sum(1, keepdim=True)).clamp(min=1e-12).log()
    return torch.cat([picked, rest], 1).float()


def compare(sequence: Held, base: Mapping[str, Tensor], logits: Iterable[Tensor]) -> Compared:
    """The other model's logits, some rows `[n, V]` at a time, against what was kept of the original's.

    Where not all logits are kept, the KL is that of the coarser distributions: a lower bound, and close to it. Raises
    ModelError for NaN or Inf.
    """
    kl, same, done = list[Tensor](), list[Tensor](), 0
    for some in logits:
        check_finite(some)
        kept = {name: tensor[done : done + len(some)] for name, tensor in base.items()}
        logp, logq = kept["logp"].double(), log_probabilities(some, kept["ids"]).double()
        kl.append((logp.exp() * (logp - logq)).sum(1).clamp(min=0))
        same.append(some.argmax(1) == kept["top"])
        done += len(some)
    return Compared(sequence.kind, torch.cat(kl).numpy(), torch.cat(same).numpy(), sequence.answered)


def summarize(compared: Sequence[Compared], seed: int = 0) -> Divergence:
    """One figure each over all sequences; answers of their own have all of them, or none."""
    kls, sames = [item.kl for item in compared], [item.same for item in compared]
    answers = [item for item in compared if item.answered]
    return Divergence(
        tokens=sum(map(len, kls)),
        answers=len(compared),
        kl=bootstrap(kls, np.mean, seed),
        kl_p99=bootstrap(kls, lambda values: np.quantile(values, 0.99), seed),
        top1=bootstrap(sames, np.mean, seed),
        first=tuple(item.first for item in answers),
        kl_along=_along([item.kl[len(item.kl) - item.answered :] for item in answers]),
        same_along=_survival([item.first for item in answers], max((item.answered for item in answers), default=0)),
    )


def bootstrap(groups: Sequence[np.ndarray], figure: Any, seed: int = 0) -> Estimate:
    """A figure of the joined groups, and the percentile interval of it over resampled groups (Efron 1979)."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(groups), size=(RESAMPLES, len(groups)))
    found = [figure(np.concatenate([groups[i] for i in row])) for row in drawn]
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(float(figure(np.concatenate(groups))), float(low), float(high))


def _along(rows: Sequence[np.ndarray]) -> tuple[float, ...]:
    """The mean over the rows that are long enough, place by place."""
    longest = max(map(len, rows), default=0)
    return tuple(float(np.mean([row[i] for row in rows if len(row) > i])) for i in range(longest))


def _survival(firsts: Sequence[int | None], longest: int) -> tuple[float, ...]:
    """The share of answers that have not diverged up to and with each place."""
    return tuple(sum(first is None or first > i for first in firsts) / len(firsts) for i in range(longest))
