"""Requests of other shapes: generate.proto's messages become Requests, and a tokenizer alone makes prompts of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from tinychat.core import Image, Request, SamplingParams, StoppingParams, Text
from tinychat.errors import UsageError
from tinychat.inputs.processor import Prompt

SAMPLING = (
    "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "frequency_penalty", "presence_penalty", "watermark",
)  # fmt: skip


def requests_of(batch: Any) -> list[tuple[Any, Request]]:
    """What was asked, and the Request that it means: of a Batch of generate.proto, of its requests, or of Requests."""
    asked = cast("Iterable[Any]", batch if isinstance(batch, Sequence) else batch.requests)
    return [(one, one if isinstance(one, Request) else request_of(one)) for one in asked]


def request_of(message: Any) -> Request:
    """A Request of generate.proto: `inputs`, or the chunks of `tokenized_inputs`, as a raw prompt.

    Its zeros mean what LoRAX's router sends for what a user left out: no draw, no penalty. Raises UsageError for an
    adapter or a schema, which no row has.
    """
    parameters = message.parameters
    for name in ("adapter_id", "schema"):
        if value := getattr(parameters, name, None):
            raise UsageError(f"request {message.id} has the {name} {value!r}", f"leave {name} out: it is not supported")
    if index := getattr(message, "adapter_index", 0):
        raise UsageError(
            f"request {message.id} speaks through adapter {index}", "leave adapter_index 0: the model itself"
        )
    stopping = message.stopping_parameters
    return Request(
        str(message.id),
        parts=_parts(message),
        sampling=_sampling(message, parameters),
        stopping=StoppingParams(
            stopping.max_new_tokens or None,
            tuple(stopping.stop_sequences),
            stopping.ignore_eos_token,
            include_stop=True,
        ),
        truncate=getattr(message, "truncate", 0) or None,
    )


def _parts(message: Any) -> tuple[Text | Image, ...]:
    chunks = getattr(getattr(message, "tokenized_inputs", None), "input_chunks", None) or ()
    parts = [_part(chunk) for chunk in chunks if getattr(chunk, "image", None) or getattr(chunk, "text", "")]
    return tuple(parts) or (Text(message.inputs),)


def _part(chunk: Any) -> Text | Image:
    image = getattr(chunk, "image", None)
    return Image(data=image.data) if image is not None and image.data else Text(chunk.text)


def _sampling(message: Any, parameters: Any) -> SamplingParams:
    given = {name: getattr(parameters, name) for name in SAMPLING if getattr(parameters, name, None)}
    warps = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
    draws = getattr(parameters, "do_sample", False) or any(given.get(name, off) != off for name, off in warps.items())
    greedy = not draws or getattr(parameters, "temperature", 0) == 0
    given["temperature"] = 0.0 if greedy else given.get("temperature", 1.0)
    return SamplingParams(
        **given,
        seed=parameters.seed if draws and not greedy else None,
        top_n_tokens=getattr(parameters, "return_k_alternatives", 0) or 0,
        prompt_logprobs=bool(getattr(message, "prefill_logprobs", False)),
    )


class TokenReader:
    """A tokenizer alone, and its model's configs: prompts without pictures. `context` is what the positions take."""

    def __init__(self, tokenizer: Any, config: Any = None, generation: Any = None) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.stop_strings: tuple[str, ...] = ()
        holders = (tokenizer, config, generation, getattr(config, "text_config", None))
        named = [getattr(holder, name, None) for holder in holders for name in ("eos_token_ids", "eos_token_id")]
        self.stop_ids = frozenset(token for one in named for token in _ids(one))
        text = getattr(config, "text_config", None) or config
        self.context = int(getattr(text, "max_position_embeddings", None) or getattr(text, "seq_length", None) or 2048)

    def __call__(self, request: Request) -> Prompt:
        """Raises UsageError for pictures, and for messages where the tokenizer has no template."""
        parts = request.parts or tuple(part for message in request.messages for part in message.parts)
        if count := sum(isinstance(part, Image) for part in parts):
            raise UsageError(f"the model reads text only and was given {count} images", "take a vision model")
        if request.parts:
            ids = self.tokenizer("".join(part.text for part in parts if isinstance(part, Text)))["input_ids"]
        else:
            turns = [{"role": message.role, "content": message.text} for message in request.messages]
            try:
                made = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
            except ValueError as error:
                raise UsageError(f"the messages make no prompt ({error})", "give parts: a raw prompt") from error
            ids = made["input_ids"]
        if not ids:
            raise UsageError(f"request {request.id} has no tokens", "give it some text")
        return Prompt(tuple(ids))


def _ids(value: Any) -> list[int]:
    """One id, several, or none."""
    return [] if value is None else [value] if isinstance(value, int) else [int(one) for one in value]
