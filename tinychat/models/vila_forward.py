"""The wide `forward` of VilaLlamaForCausalLM, step by step: check, fuse, choose a cache, justify, run, restore.

Rows with padding are brought to the front first (masked tokens take no position), so that the decoder and its cache
never see padding; the results are put back where the caller's tokens stood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinychat.errors import UsageError
from tinychat.layers.kv_cache import KVCache
from tinychat.models.llama import DecoderOutput
from tinychat.models.vila_fusion import IGNORE_INDEX, IMAGE_TOKEN_INDEX, gather, justify, unjustify
from tinychat.tiling import Tiles

if TYPE_CHECKING:
    from tinychat.models.vila_llama import VilaLlamaForCausalLM


@dataclass(frozen=True, slots=True)
class ForwardArgs:
    """The arguments of VilaLlamaForCausalLM.forward; return_dict is the caller's."""

    input_ids: Tensor | None
    start_pos: int | Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    past_key_values: KVCache | None
    inputs_embeds: Tensor | None
    labels: Tensor | None
    use_cache: bool | None
    output_attentions: bool
    output_hidden_states: bool
    images: Tensor | list[Tensor] | Tiles | None
    special_token: bool
    chunk_prefilling: bool

    def check(self) -> None:
        """Raise UsageError for arguments that contradict each other."""
        stateful = self.start_pos is not None or self.past_key_values is not None
        images, wants_more = self.images is not None, self.output_attentions or self.output_hidden_states
        chunks = self.chunk_prefilling
        for wrong, message, remedy in (
            (
                (self.input_ids is None) == (self.inputs_embeds is None),
                "input_ids or inputs_embeds",
                "give one of both",
            ),
            (self.inputs_embeds is not None and images, "inputs_embeds with images", "fuse them, or give input_ids"),
            (
                self.use_cache is False and stateful,
                "use_cache=False with start_pos or a cache",
                "leave out one of both",
            ),
            (chunks and self.labels is not None, "labels with chunk_prefilling", "train without chunks"),
            (chunks and wants_more, "states or attentions with chunk_prefilling", "run without chunks"),
            (chunks and self.position_ids is not None, "position_ids with chunk_prefilling", "leave them out"),
            (
                self.labels is not None and (stateful or bool(self.use_cache)) and torch.is_grad_enabled(),
                "labels with a cache, which holds no gradients,",
                "leave out the cache, or work under torch.no_grad",
            ),
            (images and self.position_ids is not None, "position_ids with images", "leave them out, or fuse first"),
        ):
            if wrong:
                raise UsageError(f"forward cannot work with {message} like this", remedy)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the decoder gets: embeds `[B, T, D]`, mask bool `[B, T]` or None (no padding), positions, labels."""

    embeds: Tensor
    mask: Tensor | None
    position_ids: Tensor | None
    labels: Tensor | None


class Forward:
    """One call of forward."""

    def __init__(self, model: VilaLlamaForCausalLM, args: ForwardArgs) -> None:
        args.check()
        self.model = model
        self.args = args

    def run(self) -> CausalLMOutputWithPast:
        """Everything in order. A forward that writes a cache records no gradients."""
        tokens = self._tokens()
        cache = self._cache(len(tokens.embeds), tokens.embeds.shape[1])
        starts = [0] * len(tokens.embeds) if cache is None else self._starts(cache)
        self._check_past(starts, tokens.embeds.shape[1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            if self.args.chunk_prefilling:
                assert cache is not None
                return CausalLMOutputWithPast(logits=self._prefill(tokens, cache, starts), past_key_values=cache)  # type: ignore[arg-type]
            return self._all(tokens, cache, starts)

    def _all(self, tokens: Tokens, cache: KVCache | None, starts: list[int]) -> CausalLMOutputWithPast:
        """Logits, loss, states and attentions of every token."""
        out = self._decode(tokens, cache, starts)
        logits = self.model.llm.logits(out.hidden)
        loss = None if tokens.labels is None else shifted_loss(logits, tokens.labels, tokens.mask)
        if tokens.mask is not None:
            logits = logits * tokens.mask[..., None]
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]  # a scalar tensor
            logits=logits,  # type: ignore[arg-type]
            past_key_values=cache,  # type: ignore[arg-type]  # ours instead of transformers'
            hidden_states=out.states,  # type: ignore[arg-type]
            attentions=out.attentions,  # type: ignore[arg-type]
        )

    def _tokens(self) -> Tokens:
        args, model = self.args, self.model
        if args.inputs_embeds is not None:
            return Tokens(args.inputs_embeds, self._mask(args.inputs_embeds), self._positions(), args.labels)
        assert args.input_ids is not None
        self._check_placeholders(args.input_ids)
        mask = self._mask(args.input_ids)
        if args.images is None:
            return Tokens(model.embed_text(args.input_ids), mask, self._positions(), args.labels)
        batch = model.fuse(args.input_ids, mask, args.labels, args.images)
        padding = None if bool(batch.mask.all()) else batch.mask
        return Tokens(batch.embeds, padding, None, batch.labels if args.labels is not None else None)

    def _positions(self) -> Tensor | None:
        """position_ids `[B, T]`, or `[1, T]` for all rows."""
        given, tokens = self.args.position_ids, self.args.input_ids
        tokens = self.args.inputs_embeds if tokens is None else tokens
        if given is not None and tokens is not None and given.shape not in (tokens.shape[:2], (1, tokens.shape[1])):
            raise UsageError(
                f"position_ids have shape {list(given.shape)}, the tokens {list(tokens.shape[:2])}", "give one a token"
            )
        return given

    def _check_placeholders(self, ids: Tensor) -> None:
        count = int((ids == IMAGE_TOKEN_INDEX).sum())
        if not ids.numel():
            raise UsageError(f"input_ids have shape {list(ids.shape)}", "give at least one token")
        if self.args.special_token and not count:
            raise UsageError(
                "special_token=True, but input_ids hold no image placeholder",
                f"put {IMAGE_TOKEN_INDEX} where a picture belongs, or pass special_token=False",
            )
        if count and self.args.images is None:
            raise UsageError(f"the ids hold {count} image placeholders, 0 images came", "pass images")

    def _mask(self, tokens: Tensor) -> Tensor | None:
        """The mask of the new tokens (ids or embeddings); one that covers the past as well is cut."""
        given = self.args.attention_mask
        if given is None:
            return None
        mask = given[:, -tokens.shape[1] :].bool()
        if tuple(mask.shape) != tuple(tokens.shape[:2]):
            raise UsageError(
                f"attention_mask has shape {list(given.shape)}, the tokens {list(tokens.shape[:2])}",
                "give a mask of the tokens' shape, or of past and new tokens together",
            )
        return None if bool(mask.all()) else mask

    def _check_past(self, starts: list[int], count: int) -> None:
        """What a wide mask says of the past must be what the cache holds: kept tokens cannot be masked any more."""
        given, tokens = self.args.attention_mask, self.args.input_ids
        width = count if tokens is None else tokens.shape[1]
        if given is None or given.shape[1] == width:
            return
        kept = given[:, :-width].bool().sum(1).tolist()
        if kept != starts:
            raise UsageError(
                f"attention_mask keeps {kept} past tokens a row, the cache holds {starts}",
                "give a mask of the new tokens' shape, or the past's own mask and the new tokens' together",
            )

    def _cache(self, rows: int, count: int) -> KVCache | None:
        args = self.args
        if args.past_key_values is not None:
            if not isinstance(args.past_key_values, KVCache) or len(args.past_key_values) != rows:
                raise UsageError(f"past_key_values is not a KVCache of {rows} rows", "take one from model.make_cache")
            return args.past_key_values
        if args.start_pos is not None:
            return self.model.owned_cache(rows, args.start_pos)
        if args.use_cache:
            return self.model.make_cache(rows)
        return self.model.make_cache(rows, count) if args.chunk_prefilling else None

    def _starts(self, cache: KVCache) -> list[int]:
        starts = list(cache.lengths) if self.args.start_pos is None else cache.starts(self.args.start_pos)
        cache.truncate([min(start, length) for start, length in zip(starts, cache.lengths, strict=True)])
        if starts != cache.lengths:
            raise UsageError(
                f"start_pos is {starts}, the cache is filled to {cache.lengths}", "continue at the filled length"
            )
        return starts

    def _prefill(self, tokens: Tokens, cache: KVCache, starts: list[int]) -> Tensor:
        """Bounded chunks -> logits of each row's last unmasked token `[B, 1, V]`."""
        if tokens.mask is None:
            return self.model.prefill(tokens.embeds, cache, torch.tensor(starts))
        order, counts = justify(tokens.mask), tokens.mask.sum(1).tolist()
        embeds = gather(tokens.embeds, order)
        rows = [self.model.prefill(embeds[i : i + 1, :n], cache.select([i]), starts[i]) for i, n in enumerate(counts)]
        cache.advance(counts)
        return torch.cat(rows)

    def _decode(self, tokens: Tokens, cache: KVCache | None, starts: list[int]) -> DecoderOutput:
        args, mask = self.args, tokens.mask
        order = None if mask is None else justify(mask)
        embeds, positions = tokens.embeds, tokens.position_ids
        if order is not None and mask is not None:
            embeds = gather(embeds, order)
            if positions is None:  # padding repeats the last position: the length seen must not grow with it
                counted = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
                places = torch.arange(mask.shape[1], device=mask.device).minimum(counted)
                positions = torch.tensor(starts, device=mask.device)[:, None] + places
            else:
                positions = gather(positions.expand(len(embeds), -1), order)
        out = self.model.llm.model(embeds, starts, cache, positions, args.output_hidden_states, args.output_attentions)
        if cache is not None:
            cache.advance(embeds.shape[1] if mask is None else mask.sum(1).tolist())
        return out if order is None or mask is None else _restore(out, order, mask)


def _restore(out: DecoderOutput, order: Tensor, mask: Tensor) -> DecoderOutput:
    """Results of justified rows back to where the caller's tokens stood."""
    states = None if out.states is None else tuple(unjustify(state, order, mask) for state in out.states)
    attentions = None
    if out.attentions is not None:
        if out.attentions[0].shape[3] != mask.shape[1]:
            raise UsageError("attentions of padded rows need a start at 0", "leave the padding or the cache out")
        attentions = tuple(unjustify(unjustify(a, order, mask, 2), order, mask, 3) for a in out.attentions)
    return DecoderOutput(unjustify(out.hidden, order, mask), states, attentions)


def shifted_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of each next token; logits `[B, T, V]`, labels and mask `[B, T]`.

    IGNORE_INDEX is left out, and so are masked tokens, as targets and as those that predict.
    """
    if labels.shape != logits.shape[:2]:
        raise UsageError(f"labels have shape {list(labels.shape)}, logits {list(logits.shape)}", "give one a token")
    targets = labels[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORE_INDEX)
    return cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
