"""A model that answers batches: each row's newest token goes in, its next one comes out.

The class is LoRAX's CausalLM; chat and `ask` go through it, by way of the scheduler.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tinychat.core import Generation, NextTokens, PrefillTokens
from tinychat.engine.batch import CausalLMBatch
from tinychat.engine.detokenizer import token_text
from tinychat.engine.draws import draw_rows
from tinychat.engine.logprobs import with_texts
from tinychat.engine.prefill import Cache, Draws, Filling, Model, running
from tinychat.engine.rows import Reader, Row
from tinychat.engine.sampler import Draw, no_numbers
from tinychat.engine.speculative import accept, propose
from tinychat.errors import TinychatError, UsageError
from tinychat.inputs.processor import Prompt, Slot

Generations = list[Generation]
Drawn = list[Draw] | TinychatError  # what a row gets in a step
CHUNK = 512


class CausalLM:
    """A model that answers batches: `generate_token` is one step of all their rows.

    `rank` of `world_size` processes tell of their own rows alone; where one process does everything it is 0 of 1.
    `speculate` tokens are guessed ahead, by prompt lookup, where a row is alone: the answer stays what it is.
    """

    dynamic_adapter_loading_enabled = False
    has_adapter_data = False
    rank, world_size = 0, 1
    speculate = 0

    model: Model
    reader: Reader
    context: int

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        quantize: str | None = None,
        compile: bool = False,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from tinychat.engine.foreign import open_model

        if compile:
            logging.getLogger(__name__).warning("%s is not compiled: its kernels are", model_id)
        opened = open_model(model_id, revision, quantize, dtype, trust_remote_code)
        self._take(opened.model, opened.reader, opened.context)

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, context: int | None = None) -> CausalLM:
        """Over a model of ours or of transformers that is in memory, and its tokenizer or processor."""
        made, reader = cls.__new__(cls), tokenizer
        if not (hasattr(model, "make_cache") and hasattr(reader, "stop_ids")):
            from tinychat.engine.foreign import adapted, reader_of  # of transformers, which take seconds to import

            model, reader = adapted(model), reader_of(tokenizer, model)
        made._take(model, reader, context or reader.context)
        return made

    def _take(self, model: Model, reader: Reader, context: int) -> None:
        self.model, self.reader, self.context = model, reader, context
        self._special: frozenset[int] = frozenset(getattr(reader.tokenizer, "all_special_ids", ()))

    @property
    def batch_type(self) -> type[CausalLMBatch]:
        return CausalLMBatch

    @property
    def device(self) -> torch.device:
        return self.model.device

    def pixels(self, prompt: Prompt, slot: Slot) -> Any:
        """The picture of a slot, decoded now. Raises MediaError."""
        return cast("Any", self.reader).pixels(prompt, [slot.image])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        past_key_values: Cache | None = None,
        adapter_data: Any = None,
    ) -> tuple[Tensor, Cache]:
        """Ids `[B, T]` padded on the left, with mask and positions -> logits `[B, T, V]`, and the cache with them.

        Logits at the padding are 0. Without a cache one is made; one that is given is written to. Raises UsageError for
        adapter data, a row of padding alone, padding on the right, and positions that are not the cache's next ones.
        """
        if adapter_data is not None:
            raise UsageError("adapter data is given, and the model has no adapters", "leave it out")
        rows, width = input_ids.shape
        if (attention_mask[:, -width:].diff(dim=1) < 0).any():
            raise UsageError("the mask has padding behind tokens", "pad on the left")
        counts = [int(count) for count in attention_mask[:, -width:].sum(1)]
        if min(counts) < 1:
            raise UsageError("a row is padding alone", "give every row one token or more")
        cache: Cache = past_key_values or self.model.make_cache(rows, self.context)
        ends = [length + count - 1 for length, count in zip(cache.lengths, counts, strict=True)]
        if position_ids is not None and (given := [int(last) for last in position_ids[:, -1]]) != ends:
            raise UsageError(f"the last positions are {given}, the cache goes on to {ends}", "leave position_ids out")
        ids = input_ids.to(self.device)
        with running():
            if len(set(counts)) == 1:
                return self.model.verify(ids[:, width - counts[0] :], cache), cache
            each = [cache.select([row]) for row in range(rows)]
            pieces = [
                pad(self.model.verify(ids[row : row + 1, width - count :], each[row]), (0, 0, width - count, 0))
                for row, count in enumerate(counts)
            ]
        return torch.cat(pieces), cast("Cache", type(cache).cat(each))

    def generate_token(self, batch: CausalLMBatch) -> tuple[Generations, CausalLMBatch | None]:
        """One token more for every row that has not ended: what came, and the batch to go on with (None: all ended).

        A batch without a cache is prefilled. Rows that end stay in the batch that is returned until it is filtered, or
        until the next step leaves them out.
        """
        going = [i for i, row in enumerate(batch.rows) if not row.ended]
        if not going:
            return [], None
        if len(going) < len(batch):
            batch = batch.select(going)
        if batch.past_key_values is None:
            past, logits, logprobs = self.read(batch)
            batch, draws = batch.prefilled(past), draw(batch.rows, logits)
        else:
            draws, logprobs = self._decoded(batch), [None] * len(batch)
        made = self.advance(batch, draws, logprobs)
        return made, None if all(row.ended for row in batch.rows) else batch

    def read(self, batch: CausalLMBatch) -> tuple[Cache, Tensor, list[list[float] | None]]:
        """Prompts into a new cache -> the last logits `[B, V]`, and the prompts' log-probabilities where wanted."""
        room = batch.max_input_length + batch.padding_right_offset
        cache: Cache = self.model.make_cache(len(batch), room)
        fillings = [
            Filling(self.model, row.prompt, cache.select([i]), row.wants_prompt_logprobs)
            for i, row in enumerate(batch.rows)
        ]
        logits = [self._filled(batch, row, filling) for row, filling in zip(batch.rows, fillings, strict=True)]
        past = cast("Cache", type(cache).cat([filling.cache for filling in fillings]))
        scores = [None if filling.logprobs is None else filling.logprobs.values for filling in fillings]
        return past, torch.stack(logits), scores

    def _filled(self, batch: CausalLMBatch, row: Row, filling: Filling) -> Tensor:
        """Read a whole prompt -> the last logits `[V]`."""
        for slot in filling.unseen:
            filling.look(self.picture(batch, row, slot))
        while (logits := filling.read(CHUNK)) is None:
            pass
        return logits

    def picture(self, batch: CausalLMBatch, row: Row, slot: Slot) -> Any:
        """The pixels of a row's picture."""
        return self.pixels(row.prompt, slot)

    def _decoded(self, batch: CausalLMBatch) -> list[Drawn]:
        past = cast("Cache", batch.past_key_values)
        if guess := self.guess(batch):
            return [self._verified(batch.rows[0], guess, past)]
        temperatures = [row.chooser.temperature for row in batch.rows]
        with running():
            if isinstance(self.model, Draws) and self.model.can_draw and None not in temperatures:
                numbers = [row.chooser.number() for row in batch.rows]
                newest = [row.ids[-1] for row in batch.rows]
                ids, logprobs = self.model.draw(newest, past, cast("list[float]", temperatures), numbers)
                return [_drawn(*one) for one in zip(ids, logprobs, strict=True)]
            logits = self.model.decode(batch.input_ids.to(self.device), past)[:, -1]
        return draw(batch.rows, logits)

    def guess(self, batch: CausalLMBatch) -> list[int]:
        """What a row that is alone might say next."""
        if not self.speculate or len(batch) > 1:
            return []
        row = batch.rows[0]
        return propose([*row.words, *row.generated], min(self.speculate, row.remaining - 1))

    def _verified(self, row: Row, guess: list[int], past: Cache) -> Drawn:
        """Read the newest token and the guess -> the tokens that come of them; the cache keeps what was right."""
        with running():
            logits = self.model.verify(torch.tensor([[row.ids[-1], *guess]], device=self.device), past)[0]
        try:
            draws = accept(row.chooser, logits, guess, row.generated)
        except TinychatError as error:
            return error
        past.truncate([past.lengths[0] - len(guess) - 1 + len(draws)])
        return draws

    def advance(
        self, batch: CausalLMBatch, draws: Sequence[Drawn], logprobs: Sequence[list[float] | None]
    ) -> Generations:
        """Give every row its drawn tokens, or the error in their place; what this process tells of them."""
        made = Generations()
        for i, (row, drawn, prompt) in enumerate(zip(batch.rows, draws, logprobs, strict=True)):
            if isinstance(drawn, TinychatError):
                row.error = drawn
                continue
            row.prompt_logprobs = row.prompt_logprobs if prompt is None else tuple(prompt)
            generation = self._generation(row, drawn, prompt)
            if i % self.world_size == self.rank:
                made.append(generation)
        return made

    def _generation(self, row: Row, draws: Sequence[Draw], prompt: list[float] | None) -> Generation:
        tokenizer, texts = self.reader.tokenizer, list[str]()
        for drawn in draws:
            texts.append(row.push(drawn.token))
            if row.ended:
                break
        row.skipped += len(texts) - 1
        taken = draws[: len(texts)]
        tokens = NextTokens(
            ids=tuple(drawn.token for drawn in taken),
            logprobs=tuple(drawn.logprob for drawn in taken),
            texts=tuple(texts),
            is_special=tuple(drawn.token in self._special for drawn in taken),
            top=tuple(with_texts(drawn.top, partial(token_text, tokenizer)) for drawn in taken),
            processed_logprobs=tuple(drawn.processed_logprob for drawn in taken),
        )
        return Generation(row.id, self._prompt_tokens(row, prompt), tokens, row.finished(), len(row.prompt.ids))

    def _prompt_tokens(self, row: Row, logprobs: list[float] | None) -> PrefillTokens | None:
        if logprobs is None:
            return None
        ids = row.prompt.ids
        return PrefillTokens(ids, tuple(logprobs), tuple(token_text(self.reader.tokenizer, token) for token in ids))


def draw(rows: Sequence[Row], logits: Tensor) -> list[Drawn]:
    """Logits `[B, V]` -> each row's next token, drawn by its own sampler, or why there is none."""
    with running():
        found = draw_rows([row.chooser for row in rows], logits, [row.generated for row in rows])
    return [[one] if isinstance(one, Draw) else one for one in found]


def _drawn(token: int, logprob: float) -> Drawn:
    return no_numbers() if math.isnan(logprob) else [Draw(token, logprob, None)]
