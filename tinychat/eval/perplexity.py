"""Perplexity by the standard protocol: windows of the joined text that do not overlap, the last partial one dropped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tinychat.core import Request, Text
from tinychat.engine.engine import Engine
from tinychat.engine.prefill import running
from tinychat.errors import ModelError, UsageError
from tinychat.eval.divergence import Held, read
from tinychat.eval.heldout import Item
from tinychat.eval.logits import Predictions, without_logits
from tinychat.inputs.processor import Processor


class LanguageModel(Protocol):
    """Ours or any of transformers': called with input_ids `[B, T]` it runs its head, which gives logits `[B, T, V]`."""

    @property
    def device(self) -> torch.device: ...
    def __call__(self, input_ids: Tensor) -> Any: ...
    def get_output_embeddings(self) -> Any: ...


def perplexity(model: LanguageModel, ids: Sequence[int], seqlen: int) -> float:
    """exp of the mean negative log-likelihood of ids `[N]`, read in windows of `seqlen`.

    A window's first token is context alone, and no window sees another. Raises UsageError for a text shorter than one
    window, ModelError where the model gives NaN.
    """
    windows = split(ids, seqlen)
    total = math.fsum(_window_loss(model, window) for window in windows)
    return exponential(total, len(windows) * (seqlen - 1))


def split(ids: Sequence[int], seqlen: int) -> list[Sequence[int]]:
    """The whole windows of a text. Raises UsageError where there is none."""
    if seqlen < 2:
        raise UsageError(f"a window of {seqlen} tokens predicts nothing", "give --seqlen 2 or more")
    if len(ids) < seqlen:
        remedy = f"give a longer text, or --seqlen {len(ids)} or less" if len(ids) > 1 else "give a longer text"
        raise UsageError(f"the text has {len(ids)} tokens, one window takes {seqlen}", remedy)
    return [ids[start : start + seqlen] for start in range(0, windows_in(ids, seqlen) * seqlen, seqlen)]


def answer_perplexity(engine: Engine, items: Iterable[Item]) -> float:
    """exp of the mean negative log-likelihood of the right answers' tokens, each after its prompt and pictures."""
    total, tokens = 0.0, 0
    for item in items:
        held = answered(engine.processor, item)
        total += loss(read(engine, held).logits, held.answer)
        tokens += len(held.answer)
    return exponential(total, tokens)


def answered(processor: Processor, item: Item) -> Held:
    """An item with the right answer, whose tokens are predicted."""
    prompt, text = processor(item.request), processor.marked
    answer = tuple(text.encode(text.quote(item.answer or "")))
    last = len(prompt.ids) - 1
    scored = tuple(range(last, last + len(answer)))
    return Held(item.kind, prompt, answer, scored, len(answer), processor.config.text.vocab_size)


def loss(logits: Iterable[Tensor], targets: Sequence[int]) -> float:
    """logits, some rows `[n, V]` at a time -> the sum of all P negative log-likelihoods."""
    total, done = list[float](), 0
    for some in logits:
        ids = torch.tensor(targets[done : done + len(some)], device=some.device)
        total.append(float(cross_entropy(some.float(), ids, reduction="sum")))
        done += len(some)
    return math.fsum(total)


def exponential(total: float, tokens: int) -> float:
    """exp of the mean of losses. Raises ModelError for NaN."""
    mean = total / tokens
    if math.isnan(mean):
        raise ModelError("the model's likelihood of the text is not a number", "check its weights")
    return math.exp(mean) if mean < 700 else math.inf


def windows_in(ids: Sequence[int], seqlen: int) -> int:
    """How many whole windows a text has."""
    return len(ids) // seqlen


def _window_loss(model: LanguageModel, window: Sequence[int]) -> float:
    """window `[T]` -> the sum of T - 1 negative log-likelihoods."""
    with running(), without_logits(model) as seen:
        last = model(input_ids=torch.tensor([window], device=model.device)).logits
    return loss(Predictions(seen[0][0, :-1], model.get_output_embeddings(), last.shape[-1]), window[1:])


def text_ids(processor: Processor, text: str) -> tuple[int, ...]:
    """A text as its tokens: no chat template, and nothing in it is special. Raises UsageError where it is empty."""
    if not text.strip():
        raise UsageError("the text is empty", "give a text file with words in it")
    return processor(Request("text", parts=(Text(text),))).ids


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises UsageError where it cannot be read."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8 (byte {error.start})", "give a text file") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "give a text file") from error
