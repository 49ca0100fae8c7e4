"""Batches with pictures: LoRAX's VlmCausalLM over any model that sees, ours or one of transformers.

Pixels live until the prefill. Before it a batch may be filtered, and keeps the pictures of its rows; it cannot be
concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tinychat.core import Request
from tinychat.engine.batch import CausalLMBatch
from tinychat.engine.causal_lm import CausalLM
from tinychat.engine.foreign import AutoProcessor, open_foreign, open_model
from tinychat.engine.prefill import running
from tinychat.engine.requests import requests_of
from tinychat.engine.rows import Reader, Row
from tinychat.errors import UsageError
from tinychat.inputs.placeholders import (
    get_number_of_features,
    get_unpadded_features,
    image_text_replacement,
    image_text_replacement_fixup,
)
from tinychat.inputs.processor import Prompt, Slot

__all__ = [
    "VlmCausalLM",
    "VlmCausalLMBatch",
    "get_number_of_features",
    "get_unpadded_features",
    "image_text_replacement",
    "image_text_replacement_fixup",
]


@dataclass(eq=False)
class VlmCausalLMBatch(CausalLMBatch):
    """`pictures` are the pixels of each row's pictures, in order; None once they have been looked at."""

    pictures: tuple[tuple[Any, ...], ...] | None = None

    @classmethod
    def batch_tokenized_inputs(
        cls, requests: Sequence[Any], tokenizer: Any, processor: Any, config: Any
    ) -> tuple[list[Prompt], list[tuple[Any, ...]]]:
        """Messages of generate.proto or Requests -> their prompts, placeholders expanded, and each one's pixels.

        `processor` is a Processor, or one of transformers; the tokenizer and config are its own. Raises MediaError.
        """
        reader = _reader(processor, tokenizer, config)
        prompts = [reader(request) for _, request in requests_of(requests)]
        return prompts, [_pixels(reader, prompt) for prompt in prompts]

    @classmethod
    def from_pb(
        cls,
        pb: Any,
        tokenizer: Any,
        tokenizers: Any = None,
        processor: Any = None,
        config: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> VlmCausalLMBatch:
        """As CausalLMBatch.from_pb, with the pictures of all rows decoded."""
        reader = _reader(processor, tokenizer, config)
        return cast("VlmCausalLMBatch", super().from_pb(pb, tokenizer, tokenizers, reader, config, dtype, device))

    @classmethod
    def from_requests(
        cls, batch_id: int, requests: Sequence[tuple[Any, Request]], reader: Reader, context: int, device: torch.device
    ) -> VlmCausalLMBatch:
        """As CausalLMBatch.from_requests, with the pictures of all rows decoded."""
        plain = CausalLMBatch.from_requests(batch_id, requests, reader, context, device)
        pictures = tuple(_pixels(reader, row.prompt) for row in plain.rows)
        return cls(batch_id, plain.rows, None, plain.pad_id, pictures=pictures)

    @property
    def pixel_values(self) -> list[Any] | None:
        """What the model's encode_images takes for each picture of the rows, in order; None after the prefill."""
        return None if self.pictures is None else [one for pictures in self.pictures for one in pictures]

    @property
    def pixel_attention_mask(self) -> list[Tensor] | None:
        """Which pixels belong to each picture, where the model's processor says so."""
        inputs = [getattr(one, "inputs", {}) for one in self.pixel_values or ()]
        masks = [one["pixel_attention_mask"] for one in inputs if "pixel_attention_mask" in one]
        return masks or None

    @property
    def image_sizes(self) -> list[tuple[int, int]] | None:
        """(height, width) of each picture; None after the prefill."""
        if self.pictures is None:
            return None
        return [row.prompt.sizes[slot.image] for row in self.rows for slot in row.prompt.slots]

    def select(self, indices: Sequence[int]) -> CausalLMBatch:
        """The rows at these indices, in this order, with the pictures that nobody has looked at."""
        plain = super().select(indices)
        if self.pictures is None:
            return plain
        pictures = tuple(self.pictures[i] for i in indices)
        return VlmCausalLMBatch(plain.batch_id, plain.rows, None, plain.pad_id, pictures)


class VlmCausalLM(CausalLM):
    """A model that sees. Made of a model_class of transformers, or of one of ours where our loader reads the folder."""

    def __init__(  # noqa: PLR0913  # the signature is LoRAX's
        self,
        model_id: str,
        model_class: Any,
        *,
        processor_class: Any = AutoProcessor,
        processor_kwargs: dict[str, Any] | None = None,
        batch_class: type[VlmCausalLMBatch] = VlmCausalLMBatch,
        adapter_id: str,
        adapter_source: str,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        if adapter_id:
            asked = f"the adapter {adapter_id!r} from {adapter_source!r} is asked for"
            raise UsageError(asked, "give an empty adapter_id: the model speaks for itself")
        if kwargs:
            raise UsageError(f"{', '.join(sorted(kwargs))} is not known", "leave it out")
        ours = hasattr(model_class, "make_cache")
        if ours and (processor_class is not AutoProcessor or processor_kwargs):
            raise UsageError(f"{model_class.__name__} has a processor of its own", "leave processor_class out")
        if ours:
            opened = open_model(model_id, revision, None, dtype, trust_remote_code)
        else:
            opened = open_foreign(
                model_id, model_class, processor_class=processor_class, processor_kwargs=processor_kwargs,
                revision=revision, dtype=dtype, trust_remote_code=trust_remote_code,
            )  # fmt: skip
        self.batch_class = batch_class
        self._take(opened.model, opened.reader, opened.context)

    batch_class = VlmCausalLMBatch

    @property
    def batch_type(self) -> type[VlmCausalLMBatch]:
        return self.batch_class

    def max_past(self) -> int | None:
        """The tokens that every layer looks back at; None where one looks at all of them."""
        config = getattr(self.model, "llm", self.model)
        windows = getattr(getattr(config, "config", None), "windows", None)
        if windows is None:
            text = getattr(config, "config", None)
            return getattr(getattr(text, "text_config", text), "sliding_window", None)
        return None if None in windows else max(windows)

    def picture(self, batch: CausalLMBatch, row: Row, slot: Slot) -> Any:
        """The pixels of a row's picture, as the batch holds them."""
        if not isinstance(batch, VlmCausalLMBatch) or batch.pictures is None:
            return super().picture(batch, row, slot)
        return batch.pictures[batch.requests_idx_mapping[row.id]][row.prompt.slots.index(slot)]

    def forward(  # type: ignore[override]  # the seed's signature: a batch instead of its tensors
        self, batch: CausalLMBatch, adapter_data: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """The newest tokens of a batch into its cache, or its prompts and pictures into a new one -> logits `[B, V]`.

        Where a row that is alone has K guesses these are read as well: `[K + 1, V]`. The second value, logits of heads
        that guess, is None: guesses are looked up in the prompt. The batch holds the cache then, and no pixels.
        """
        if adapter_data is not None:
            raise UsageError("adapter data is given, and the model has no adapters", "leave it out")
        if batch.past_key_values is None:
            batch.past_key_values, logits, _ = self.read(batch)
            if isinstance(batch, VlmCausalLMBatch):
                batch.pictures = None
            return logits, None
        past, guess = batch.past_key_values, self.guess(batch)
        with running():
            ids = torch.cat([batch.input_ids, torch.tensor([guess], dtype=torch.long).expand(len(batch), -1)], 1)
            return self.model.verify(ids.to(self.device), past).flatten(0, 1), None


def _reader(processor: Any, tokenizer: Any, config: Any) -> Any:
    """What makes the prompts. Raises UsageError where that is a tokenizer alone."""
    if hasattr(processor, "stop_ids"):
        return processor
    if not hasattr(processor, "image_processor"):
        raise UsageError("a batch with pictures needs a processor", "give the model's own")
    from tinychat.engine.foreign_vlm import ForeignProcessor

    return ForeignProcessor(processor, config)


def _pixels(reader: Any, prompt: Prompt) -> tuple[Any, ...]:
    return tuple(reader.pixels(prompt, [slot.image]) for slot in prompt.slots)
