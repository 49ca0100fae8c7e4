"""A batch of sequences: its rows and their KV cache, from which ids, mask, positions and lengths follow.

The class is that of LoRAX's CausalLM, where the tensors are held, and padded on the left; here they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tinychat.core import Request
from tinychat.engine.adapters import AdapterBatchMetadata
from tinychat.engine.prefill import Cache, last_tokens
from tinychat.engine.requests import TokenReader, requests_of
from tinychat.engine.rows import Reader, Row
from tinychat.engine.sampler import Sampler
from tinychat.engine.stopping import Stopping
from tinychat.errors import UsageError

PAD_POSITION = 1


@dataclass(eq=False)
class CausalLMBatch:
    """Rows that are decoded together. `past_key_values` is None until they are prefilled; afterwards it holds all
    tokens of a row but the newest.

    With B rows of `input_lengths` L, M the longest, and P the tokens that may still come (padding_right_offset):
    attention_mask is `[B, M + P]`, input_ids and position_ids `[B, M]` before the prefill and `[B, 1]` after it.
    filter and concatenate give new batches. Rows go with them, samplers and stopping criteria included: after the next
    step of a new batch the one that it came from is out of date.
    """

    batch_id: int
    rows: tuple[Row, ...]
    past_key_values: Cache | None = None
    pad_id: int = 0

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
    ) -> CausalLMBatch:
        """A batch of generate.proto (`id`, `requests`), or Requests, or anything of their shape; not prefilled.

        `processor` makes prompts of Requests, else the tokenizer alone does. `tokenizers` and `dtype` are LoRAX's:
        adapters have no tokenizers of their own here, and the cache's dtype is the model's. Raises UsageError,
        CapacityError.
        """
        if tokenizers:
            raise UsageError(f"{len(tokenizers)} further tokenizers are given", "all rows of a batch share one")
        alone = TokenReader(tokenizer, config)
        reader = processor if hasattr(processor, "stop_ids") else alone
        return cls.from_requests(getattr(pb, "id", 0), requests_of(pb), reader, alone.context, torch.device(device))

    @classmethod
    def from_requests(
        cls, batch_id: int, requests: Sequence[tuple[Any, Request]], reader: Reader, context: int, device: torch.device
    ) -> CausalLMBatch:
        """Of pairs: what was asked with its id, and the Request that it means."""
        rows = list[Row]()
        for asked, request in requests:
            prompt = reader(request)
            if request.truncate is not None:
                prompt = last_tokens(prompt, request.truncate)
            row = Row.open(reader, request, prompt, context, device)
            row.asked = asked
            rows.append(row)
        pad = getattr(reader.tokenizer, "pad_token_id", None)
        return cls(batch_id, tuple(rows), pad_id=pad or 0)

    # What the rows say, a list entry each.

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def requests(self) -> list[Any]:
        return [row.asked for row in self.rows]

    @cached_property
    def requests_idx_mapping(self) -> dict[Any, int]:
        """Where each request's row is."""
        return {row.id: i for i, row in enumerate(self.rows)}

    @property
    def input_lengths(self) -> list[int]:
        """Tokens of each row, its answer included."""
        return [len(row.ids) for row in self.rows]

    @property
    def all_input_ids(self) -> list[Tensor]:
        """int64 `[L, 1]` each."""
        return [torch.tensor(row.ids)[:, None] for row in self.rows]

    @property
    def prefix_offsets(self) -> list[int]:
        """Where the window begins that each row's newest text is decoded from."""
        return [len(row.ids) - row.detokenizer.window for row in self.rows]

    @property
    def read_offsets(self) -> list[int]:
        """How many of each row's tokens are text that was given out."""
        return [row.read for row in self.rows]

    @property
    def next_token_choosers(self) -> list[Sampler]:
        return [row.chooser for row in self.rows]

    @property
    def stopping_criterias(self) -> list[Stopping]:
        return [row.stopping for row in self.rows]

    @property
    def adapter_meta(self) -> AdapterBatchMetadata:
        return AdapterBatchMetadata.of([row.adapter for row in self.rows])

    @property
    def keys_head_dim_last(self) -> bool:
        """Whether keys are `[..., S, D]`: of every cache here; see foreign_cache.KVLayout for BLOOM's of old."""
        return True

    @property
    def max_input_length(self) -> int:
        return max(self.input_lengths)

    @property
    def padding_right_offset(self) -> int:
        """Tokens that the row with most of them may still have."""
        return max(row.remaining for row in self.rows)

    @property
    def max_tokens(self) -> int:
        """Tokens that the batch takes at most, padding included."""
        return len(self) * self.max_input_length + sum(row.remaining for row in self.rows)

    # What a model that pads sees.

    @property
    def input_ids(self) -> Tensor:
        """int64: padded on the left `[B, M]`, or the newest tokens `[B, 1]`."""
        if self.past_key_values is not None:
            return torch.tensor([[row.ids[-1]] for row in self.rows])
        longest = self.max_input_length
        return torch.tensor([[self.pad_id] * (longest - len(row.ids)) + row.ids for row in self.rows])

    @property
    def attention_mask(self) -> Tensor:
        """int64 `[B, M + P]`, 1 at the rows' tokens; the last P columns are for what comes."""
        longest = self.max_input_length
        columns = torch.arange(longest + self.padding_right_offset)
        first = longest - torch.tensor(self.input_lengths)
        return ((columns >= first[:, None]) & (columns < longest)).long()

    @property
    def position_ids(self) -> Tensor:
        """int64 `[B, M]`, 1 at the padding, or the newest tokens' `[B, 1]`."""
        lengths = torch.tensor(self.input_lengths)[:, None]
        if self.past_key_values is not None:
            return lengths - 1
        longest = self.max_input_length
        positions = torch.arange(longest) - (longest - lengths)
        return positions.where(positions >= 0, torch.tensor(PAD_POSITION))

    # Who is in it.

    def filter(self, request_ids: Sequence[Any]) -> CausalLMBatch:
        """The rows of these requests, in this order. Raises UsageError for none, an unknown one, or one given twice."""
        ids = list(request_ids)
        if not ids:
            raise UsageError("a batch without rows is asked for", "give the ids of one request or more")
        if unknown := [one for one in ids if one not in self.requests_idx_mapping]:
            known = ", ".join(map(str, self.requests_idx_mapping))
            raise UsageError(f"the batch has no request {unknown[0]}", f"give some of {known}")
        if len(set(ids)) < len(ids):
            raise UsageError("a request is named twice", "name each once")
        return self.select([self.requests_idx_mapping[one] for one in ids])

    def select(self, indices: Sequence[int]) -> CausalLMBatch:
        """The rows at these indices, in this order."""
        past = None if self.past_key_values is None else self.past_key_values.select(indices)
        rows = tuple(self.rows[i] for i in indices)
        return CausalLMBatch(self.batch_id, rows, past, self.pad_id)

    def prefilled(self, past: Cache) -> CausalLMBatch:
        """The same rows, whose prompts are in a cache."""
        return CausalLMBatch(self.batch_id, self.rows, past, self.pad_id)

    @classmethod
    def concatenate(cls, batches: Sequence[CausalLMBatch]) -> CausalLMBatch:
        """All rows of prefilled batches, in order. Raises UsageError where one is not, or where an id comes twice."""
        if not batches:
            raise UsageError("there are no batches to concatenate", "give one or more")
        pasts = [batch.past_key_values for batch in batches if batch.past_key_values is not None]
        if len(pasts) < len(batches):
            raise UsageError("only prefilled batches are concatenated", "call generate_token on each of them first")
        rows = tuple(row for batch in batches for row in batch.rows)
        if len({row.id for row in rows}) < len(rows):
            raise UsageError("two rows have the same request id", "give every request an id of its own")
        first = batches[0]
        return cls(first.batch_id, rows, type(pasts[0]).cat(pasts), first.pad_id)

    def check(self) -> None:
        """Raise AssertionError unless mask, positions, lengths and cache belong together."""
        lengths, newest = self.input_lengths, self.past_key_values is not None
        mask, positions, offset = self.attention_mask, self.position_ids, self.padding_right_offset
        assert mask.shape == (len(self), self.max_input_length + offset)
        assert torch.equal(mask[:, : mask.shape[1] - offset].sum(1), torch.tensor(lengths))
        assert torch.equal(positions[:, -1], torch.tensor(lengths) - 1)
        assert self.input_ids.shape == positions.shape == (len(self), 1 if newest else self.max_input_length)
        assert len(self.requests_idx_mapping) == len(self)
        assert all(row.remaining >= 0 for row in self.rows)
        if self.past_key_values is not None:
            assert len(self.past_key_values) == len(self)
            alive = [
                (row, length)
                for row, length in zip(self.rows, self.past_key_values.lengths, strict=True)
                if not row.ended
            ]
            assert all(length == len(row.ids) - 1 for row, length in alive)
