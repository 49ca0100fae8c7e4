"""The words that all parts of the runtime share. Frozen data, no behaviour but checking itself.

A `Request` goes in; a stream of `Event`s comes out: Started, then Progress and Token, then Finished or Failed.
Chat, one-shot questions, batch jobs and tests all speak in these types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tinychat.errors import UsageError

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "eos", "cancelled"]
Stage = Literal["compile", "load", "images", "vision", "prefill", "check", "tower", "quantize", "convert", "card"]


@dataclass(frozen=True, slots=True)
class Text:
    """Words of a message. Nothing in them is special: `<image>` here is seven characters."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture by its encoded bytes, by its path, or both: then the path only says where the bytes came from.

    `digest` (sha256 of the bytes) names its content.
    """

    data: bytes | None = field(default=None, repr=False)
    path: str | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        if self.data is None and self.path is None:
            raise UsageError("an image needs data or a path", "give one of the two")


Part = Text | Image


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `token_ids` are an answer's own tokens: with them the next turn's prompt extends this one exactly."""

    role: Role
    parts: tuple[Part, ...]
    token_ids: tuple[int, ...] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))


def _check(name: str, value: float, ok: bool, rule: str) -> None:
    if not ok:
        raise UsageError(f"{name} is {value}, it must be {rule}", f"give a {name} that is {rule}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is drawn. Names and ranges are those of transformers' GenerationConfig; temperature 0 is greedy.

    Frequency and presence penalties count generated tokens only; repetition_penalty counts the prompt's text too.
    `watermark` marks the answer (Kirchenbauer et al. 2023), `top_n_tokens` tells so many alternatives to each token,
    `prompt_logprobs` the log-probability of each of the prompt's tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    watermark: bool = False
    top_n_tokens: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0, "0 or more")
        _check("temperature", self.temperature, self.temperature < math.inf, "finite")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        _check("typical_p", self.typical_p, 0 < self.typical_p <= 1, "above 0 and at most 1")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0")
        for name in ("frequency_penalty", "presence_penalty"):
            value: float = getattr(self, name)
            _check(name, value, -2 <= value <= 2, "from -2 to 2")
        _check("top_n_tokens", self.top_n_tokens, self.top_n_tokens >= 0, "0 (off) or more")
        for token, value in self.logit_bias.items():
            if type(token) is not int or type(value) not in (int, float) or token >= 2**31:
                raise UsageError(f"logit_bias has {token!r}: {value!r}", "give token ids below 2^31, and numbers")
        if self.seed is not None:
            _check("seed", self.seed, 0 <= self.seed < 2**64, "from 0 to 2^64 - 1")


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When an answer ends: after max_new_tokens (None = the room in the context), at a stop string, or at an EOS token.

    A stop string is cut from the text unless include_stop is set.
    """

    max_new_tokens: int | None = 512
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more")
        if any(not text for text in self.stop):
            raise UsageError("a stop string is empty", "give stop strings of one character or more")


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to answer: `messages` go through the chat template, `parts` are a raw prompt as it stands.

    `truncate` keeps that many of the prompt's last tokens. Of those that wait, a higher `priority` goes first. What has
    not ended `deadline` seconds after it was handed in is cut off.
    """

    id: str
    messages: tuple[Message, ...] = ()
    parts: tuple[Part, ...] = ()
    sampling: SamplingParams = SamplingParams()
    stopping: StoppingParams = StoppingParams()
    truncate: int | None = None
    priority: int = 0
    deadline: float | None = None

    def __post_init__(self) -> None:
        if self.truncate is not None:
            _check("truncate", self.truncate, self.truncate >= 1, "1 or more")
        if type(self.priority) is not int:
            raise UsageError(f"the priority is {self.priority!r}", "give a whole number")
        if self.deadline is not None:
            _check("deadline", self.deadline, self.deadline > 0, "above 0")
        if bool(self.messages) == bool(self.parts):
            raise UsageError(f"request {self.id!r} needs either messages or parts", "give exactly one of the two")


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. prompt_tokens includes image_tokens and cached_tokens (those found in the KV cache)."""

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, and tokens a second: prefill_tps over the tokens computed, decode_tps over those after the first."""

    load_s: float = 0.0
    image_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt is read: this many tokens, of which so many belong to images and so many are cached."""

    request_id: str
    prompt_tokens: int
    image_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` tensors (load, check, convert), pictures (images, vision), tokens (prefill), figures (card)."""

    request_id: str
    stage: Stage
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the likeliest tokens at a place of the answer, by the model's own log-probability."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token and the text that became certain with it (empty while a character or a stop string is incomplete).

    `logprob` is that of the model's logits; `processed_logprob` that of what was drawn from, after penalties and
    warpers (None where the model itself drew). `top` are the top_n_tokens likeliest, the first is the likeliest.
    """

    request_id: str
    id: int
    text: str
    logprob: float
    processed_logprob: float | None = None
    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer. `text` is what the Token events and `tail` add up to; `token_ids` exclude the EOS.

    `prompt_logprobs` are one a token of the prompt, the first nan, where the request wanted them.
    """

    request_id: str
    text: str
    tail: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int | None
    prompt_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The request could not be answered; nothing of it stays in the cache."""

    request_id: str
    message: str
    remedy: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class PrefillTokens:
    """The prompt's tokens, one entry each in every field; the first log-probability is nan.

    This and the three classes below are the messages of the same names in LoRAX's generate.proto.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The tokens of one step, one entry each in every field: several where speculation was right.

    `top` are the likeliest tokens at each place (alternative_tokens there), and () where none were asked for;
    `processed_logprobs` those of what was drawn from.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    texts: tuple[str, ...]
    is_special: tuple[bool, ...]
    top: tuple[tuple[TopToken, ...], ...] = ()
    processed_logprobs: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """A whole answer. `skipped_tokens` came from speculation, beside the one of each step; `seed` only of a draw."""

    text: str
    generated_tokens: int
    skipped_tokens: int
    finish_reason: FinishReason
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What one step made for one request: the prompt's tokens with the first step, the text with the last."""

    request_id: str
    prefill_tokens: PrefillTokens | None
    next_tokens: NextTokens
    generated_text: GeneratedText | None
    prefill_tokens_length: int


Event = Started | Progress | Token | Finished | Failed
