"""VilaLlamaForCausalLM: decoder, vision tower and projector as one model, for every layout that tinychat reads.

`forward` is the wide, familiar entrance; the engine uses the narrow one under it: embed, encode_images, prefill,
decode, verify, make_cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinychat.config import FLOAT_TYPES, VilaConfig
from tinychat.errors import ModelError, UsageError
from tinychat.layers.cpu_decoder import CpuDecoder
from tinychat.layers.cuda_decoder import CudaDecoder, Refusal
from tinychat.layers.kv_cache import KVCache, KVPool, start_positions
from tinychat.layers.one_call import Obstacle, split
from tinychat.models import vila_fusion
from tinychat.models.llama import LlamaForCausalLM
from tinychat.models.llava_base.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from tinychat.models.shares import Share, tower_group
from tinychat.models.vila_forward import Forward, ForwardArgs
from tinychat.models.vila_fusion import IMAGE_TOKEN_INDEX
from tinychat.tiling import Tiles

CHUNK = 512  # tokens of a prefill chunk: activation memory does not grow with the prompt
OWNED_CAPACITY = 4096  # tokens a row of a cache that nobody sized


class VilaLlamaForCausalLM(LlavaMetaModel, LlavaMetaForCausalLM, PreTrainedModel):
    """A Llama, Mistral or Qwen2 decoder that may look at pictures; llm, vision_tower, mm_projector are its parts."""

    config_class = VilaConfig
    base_model_prefix = "llm"
    _no_split_modules = [
        "DecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings", "SiglipVisionEmbeddings", "Projector",
    ]  # fmt: skip
    _supports_sdpa = True

    _share: Share | None = None

    def __init__(self, config: PretrainedConfig) -> None:
        if not isinstance(config, VilaConfig):
            config = VilaConfig(**config.to_dict())
        PreTrainedModel.__init__(self, config)
        self.init_vlm(config)
        self.post_init()

    def init_vlm(self, config: VilaConfig | None = None, *args: Any, **kwargs: Any) -> None:
        """Make the three parts with empty parameters, once; later calls change nothing.

        The dtype is config.dtype or VILA's config.model_dtype; without one, float16 on a CUDA default device and
        float32 elsewhere. Raises UsageError for further arguments.
        """
        if args or kwargs:
            raise UsageError(f"init_vlm got unknown arguments {[*args, *kwargs]}", "pass the config alone")
        if hasattr(self, "llm"):
            return
        config = config or self.config
        self._owned: KVCache | None = None
        self._one_call: CpuDecoder | CudaDecoder | None = None
        self._refusal: Refusal | None = None
        self.obstacle: str | None = None  # to running the decoder as a whole, when that was last tried
        self.kv_dtype: torch.dtype | None = None
        self.home: torch.device | None = None  # where inputs come and logits go, of a model on several devices
        self.kv_devices: tuple[torch.device, ...] = ()  # of its layers
        self.llm = LlamaForCausalLM(config.text, self._share)
        group = self.llm.share.group
        towers = tower_group(config.vision, group) if config.vision else group
        self.build_vision(config.vision, config.projector, config.tiling, towers)
        dtype = _dtype_of(config, self.llm.lm_head.weight.device)
        if dtype != self.llm.lm_head.weight.dtype:
            nn.Module.to(self, dtype)  # transformers' own wrapper has no types

    @classmethod
    def of_share(cls, config: VilaConfig, share: Share | None) -> VilaLlamaForCausalLM:
        """With empty parameters, and where there is a share of a tensor-parallel group, one rank's part of the model.

        All ranks are called alike, and each gets the whole logits.
        """
        model = cls.__new__(cls)
        object.__setattr__(model, "_share", share)  # __init__ takes a config alone, as llm-awq's does
        model.__init__(config)  # pyright: ignore[reportUnknownMemberType]
        return model

    def freezed_module_patch(self) -> None:
        """While training, keep the parts that are not tuned in eval mode (config.tune_vision_tower, _mm_projector)."""
        if not self.training:
            return
        for part, tuned in ((self.get_vision_tower(), "tune_vision_tower"), (self.mm_projector, "tune_mm_projector")):
            if part is not None and not getattr(self.config, tuned):
                part.eval()

    def forward(  # noqa: PLR0913  # the signature is llm-awq's
        self,
        input_ids: Tensor | None = None,
        start_pos: int | Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | list[Tensor] | Tiles | None = None,
        return_dict: bool | None = None,
        special_token: bool = False,
        chunk_prefilling: bool = False,
    ) -> tuple[Any, ...] | CausalLMOutputWithPast:
        """input_ids `[B, T]` or inputs_embeds `[B, T, D]` -> logits fp32 `[B, T, V]`, `[B, 1, V]` if chunk_prefilling.

        A picture is IMAGE_TOKEN_INDEX in input_ids and an entry of `images`; special_token=True demands one. Without
        start_pos and past_key_values the call is stateless. start_pos (one, or `[B]`) is the first position written:
        into past_key_values, else into a cache that the model owns, where 0 begins anew. Masked tokens, on either
        side, take no position; their logits are 0. labels give the shifted cross-entropy, IGNORE_INDEX left out.
        Raises UsageError for contradictory arguments, CapacityError for an overflow of the cache.
        """
        self.freezed_module_patch()
        args = ForwardArgs(
            input_ids, start_pos, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache,
            bool(output_attentions), bool(output_hidden_states), images, special_token, chunk_prefilling,
        )  # fmt: skip
        output = Forward(self, args).run()
        return output.to_tuple() if return_dict is False else output

    # What the engine sees.

    def embed_text(self, ids: Tensor) -> Tensor:
        """ids of any shape -> embeddings `[..., D]`."""
        return self.llm.model.embed(ids)

    def embed(self, ids: Tensor, slots: Sequence[tuple[int, int]] = (), features: Sequence[Tensor] = ()) -> Tensor:
        """ids `[T]`, slots (start, end) and their picture features `[n, D]` -> embeddings `[1, T, D]`."""
        return vila_fusion.fill_slots(self.embed_text(ids), slots, features)[None]

    @torch.no_grad()
    def prefill(self, embeds: Tensor, cache: KVCache, start: int | Tensor, chunk: int = CHUNK) -> Tensor:
        """embeds `[B, T, D]` written from position `start` in chunks -> logits of the last token `[B, 1, V]`."""
        if not embeds.shape[1]:
            raise UsageError("a row has no tokens to prefill", "give at least one token a row")
        starts = cache.starts(start)
        cache.check_room(starts, embeds.shape[1])
        self._choose_way()
        *pieces, last = embeds.split(chunk, dim=1)
        for piece in pieces:
            self._step(piece, cache, starts, "none")
            starts = [at + piece.shape[1] for at in starts]
        return cast("Tensor", self._step(last, cache, starts, "last"))

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """The newest token of each row `[B, 1]` -> logits `[B, 1, V]`, appended to the cache."""
        return self.verify(ids, cache)

    @torch.no_grad()
    def verify(self, ids: Tensor, cache: KVCache) -> Tensor:
        """K tokens a row `[B, K]`, or their embeddings `[B, K, D]`, appended to the cache -> logits after each."""
        if self._one_call is None:
            self._choose_way()
        return cast("Tensor", self._step(ids, cache, list(cache.lengths), "every"))

    @property
    def can_draw(self) -> bool:
        """Whether `draw` may be called: the CUDA kernels ran the last prefill."""
        return isinstance(self._one_call, CudaDecoder)

    def draw(
        self, tokens: Sequence[int], cache: KVCache, temperatures: Sequence[float], numbers: Sequence[float]
    ) -> tuple[list[int], list[float]]:
        """The newest token of each row, appended to the cache -> the next one and its log-probability.

        Drawn on the GPU: the likeliest at temperature 0, else by inverting the distribution at `numbers`, in [0, 1).
        """
        assert isinstance(self._one_call, CudaDecoder)
        cache.check_room(cache.lengths, 1)
        drawn = self._one_call.draw(list(tokens), cache, list(temperatures), list(numbers))
        cache.advance(1)
        return drawn

    def make_cache(self, rows: int = 1, capacity: int | None = None) -> KVCache:
        """An empty cache; by default min(max_position_embeddings, 4096) tokens a row.

        Its dtype is cache_dtype; int8 has a scale for each token and head.
        """
        text = self.llm.config
        capacity = capacity or min(text.max_position_embeddings, OWNED_CAPACITY)
        return KVPool(text, rows, capacity, self.cache_dtype, self.kv_devices or self.device).take(rows)

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return self.home or super().device

    @property
    def cache_dtype(self) -> torch.dtype:
        """What a cache made now holds: kv_dtype, which the loader sets.

        Where it is None the model's dtype, or float16 where the CPU kernels read it and round activations anyway.
        """
        if self.kv_dtype is not None:
            return self.kv_dtype
        self._choose_way()
        return self.dtype if self._one_call is None else self._one_call.cache_dtype(self.dtype)

    def _step(self, inputs: Tensor, cache: KVCache, starts: list[int], want: str) -> Tensor | None:
        """Ids `[B, T]` or embeddings `[B, T, D]` into the cache -> logits of the "last" token, "every" or "none"."""
        cache.truncate(starts)
        cache.check_room(starts, inputs.shape[1])
        run = self._by_modules if self._one_call is None else self._one_call.forward
        logits = run(inputs, cache, starts, want)
        cache.advance(inputs.shape[1])
        return logits

    def _by_modules(self, inputs: Tensor, cache: KVCache, starts: list[int], want: str) -> Tensor | None:
        embeds = inputs if inputs.is_floating_point() else self.embed_text(inputs)
        hidden = self.llm.model(embeds, starts, cache).hidden
        if want == "none":
            return None
        return self.llm.logits(hidden[:, -1:] if want == "last" else hidden)

    @property
    def one_call(self) -> CpuDecoder | CudaDecoder | None:
        """The decoder as its device's kernels run it as a whole; None where its modules run."""
        self._choose_way()
        return self._one_call

    def _choose_way(self) -> None:
        """Whether kernels run the decoder as a whole: asked at each prefill, since modules may be changed."""
        if self._one_call is not None and self._one_call.is_current():
            return
        if self._one_call is None and self._refusal is not None and self._refusal.stands(self.llm):
            return
        way = CudaDecoder if self.device.type == "cuda" else CpuDecoder
        self._one_call, self._refusal, self.obstacle = None, None, split(self.llm.share.group)
        if self.obstacle is not None:
            return
        try:
            self._one_call = way.of(self.llm, self.llm.config)
        except Obstacle as error:
            self.obstacle = str(error)
            self._refusal = error if isinstance(error, Refusal) else None

    # The cache that the model owns: a plain attribute, outside state_dict, pickle and deepcopy.

    def owned_cache(self, rows: int, start: int | Tensor) -> KVCache:
        """The model's own cache, emptied where start is 0. Raises UsageError where it holds too little."""
        starts = start_positions(start, rows)
        if not any(starts) and not self._owns(rows):
            self._owned = self.make_cache(rows)
        if self._owned is None or len(self._owned) != rows:
            raise UsageError(f"there is no cache of {rows} rows to continue from {starts}", "prefill with start_pos=0")
        if any(start > length for start, length in zip(starts, self._owned.lengths, strict=True)):
            raise UsageError(
                f"start_pos is {starts}, the cache is filled to {self._owned.lengths}",
                "continue at the filled length; rows of unequal length take start_pos=torch.tensor([...])",
            )
        return self._owned

    def _owns(self, rows: int) -> bool:
        """Whether the owned cache has so many rows, and the dtype and device that one made now would have."""
        if self._owned is None or len(self._owned) != rows:
            return False
        keys = self._owned.layer(0).k
        return keys.dtype == self.cache_dtype and keys.device == (self.kv_devices or (self.device,))[0]

    def _apply(self, fn: Any, recurse: bool = True) -> VilaLlamaForCausalLM:
        self._one_call, self._refusal = None, None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owned": None, "_one_call": None, "_refusal": None}

    # What PreTrainedModel asks for.

    def get_model(self) -> VilaLlamaForCausalLM:
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.llm.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.llm.model.embed_tokens = value
        self.llm.tie_weights()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head

    @torch.no_grad()
    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Grow or shrink the vocabulary; new rows of embeddings and head are the mean of the old ones.

        Raises UsageError for mean_resizing=False, and where several ranks share the vocabulary.
        """
        if not mean_resizing:
            raise UsageError("new embeddings are the mean of the old ones", "leave mean_resizing out")
        if (ranks := self.llm.share.group.size()) > 1:
            raise UsageError(f"{ranks} ranks share the vocabulary", "resize it before the model is shared out")
        new_num_tokens = new_num_tokens or self.llm.config.vocab_size
        new_num_tokens += -new_num_tokens % (pad_to_multiple_of or 1)
        if new_num_tokens == self.llm.config.vocab_size:
            return self.get_input_embeddings()
        assert self.config.llm_cfg is not None
        self.config.llm_cfg["vocab_size"] = new_num_tokens
        old = self.llm
        new_text = self.config.text
        table = nn.Embedding(new_num_tokens, new_text.hidden_size, dtype=self.dtype, device=self.device)
        head = nn.Linear(new_text.hidden_size, new_num_tokens, bias=False, dtype=self.dtype, device=self.device)
        for new, was in ((table, old.model.embed_tokens), (head, old.lm_head)):
            keep = min(len(was.weight), new_num_tokens)
            new.weight[:keep] = was.weight[:keep]
            new.weight[keep:] = was.weight.mean(0)
            new.requires_grad_(was.weight.requires_grad)
        self._one_call = None
        old.take(Share.of(new_text))
        old.model.embed_tokens, old.lm_head = table, head
        old.tie_weights()
        return table

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Make the head share the embeddings where the config says so."""
        if hasattr(self, "llm"):
            self.llm.tie_weights()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> VilaLlamaForCausalLM:
        """A folder or a hub id of any layout; keywords are those of tinychat.load.load_model (dtype, device, ...)."""
        from tinychat.load import load_model

        return load_model(str(pretrained_model_name_or_path), **kwargs)

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]  # one format, no options
        """Write a VILA folder: config.json, llm/, vision_tower/, mm_projector/, safetensors in each."""
        from tinychat.models.vila_folder import save_folder

        save_folder(self, Path(save_directory))


def _dtype_of(config: VilaConfig, device: torch.device) -> torch.dtype:
    """config.dtype, or VILA's model_dtype (a string like "torch.float16"), or the device's default."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    name = str(config.dtype or getattr(config, "model_dtype", "") or "").removeprefix("torch.")
    if not name:
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in FLOAT_TYPES:
        raise ModelError(f"model_dtype {name!r} is not a float type", f"use one of {', '.join(FLOAT_TYPES)}")
    return FLOAT_TYPES[name]


__all__ = ["IMAGE_TOKEN_INDEX", "VilaLlamaForCausalLM"]
