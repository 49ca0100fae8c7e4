"""The decoder of Llama, Mistral and Qwen2: they differ by biases and sliding windows, which are config fields."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.configuration_utils import PretrainedConfig

from tinychat.config import TextConfig
from tinychat.layers.attention import CausalSelfAttention, Span
from tinychat.layers.kv_cache import KVCache
from tinychat.layers.norm import RMSNorm
from tinychat.layers.parallel import ALONE, Group, joined, total
from tinychat.layers.rotary import cos_sin
from tinychat.models.shares import Share


class DecoderOutput(NamedTuple):
    """hidden `[B, T, D]` after the last norm; where asked for: the states before each layer and after the last
    (`layers + 1` of them, the last one normed), and each layer's attention weights `[B, H, T, S]`."""

    hidden: Tensor
    states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class MLP(nn.Module):
    """[..., D] -> [..., D]: gated (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: TextConfig, group: Group = ALONE) -> None:
        super().__init__()
        self.group = group
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*reversed(sizes), bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return total(self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x)), self.group)


class DecoderLayer(nn.Module):
    """[B, T, D] -> [B, T, D]: attention and MLP, each behind a norm and a residual sum."""

    def __init__(self, config: TextConfig, layer: int, group: Group = ALONE) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = CausalSelfAttention(config, layer, config.windows[layer], group)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, group)

    def forward(self, x: Tensor, span: Span, want_weights: bool) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.self_attn(self.input_layernorm(x), span, want_weights)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), weights


class LlamaModel(nn.Module):
    """Embeddings `[B, T, D]` -> hidden states; reads and writes the KV cache that it is given."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share
        self.config = config = share.config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, share.group) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, ids: Tensor) -> Tensor:
        """ids of any shape -> embeddings `[..., D]`; each rank looks its own part of the vocabulary up."""
        if self.share.group.size() == 1:
            return self.embed_tokens(ids)
        own = ids - self.share.vocabulary.start
        mine = (own >= 0) & (own < len(self.share.vocabulary))
        return total(self.embed_tokens(own.masked_fill(~mine, 0)) * mine[..., None], self.share.group)

    def forward(
        self,
        embeds: Tensor,
        starts: list[int],
        cache: KVCache | None = None,
        position_ids: Tensor | None = None,
        want_states: bool = False,
        want_weights: bool = False,
    ) -> DecoderOutput:
        """starts: the first position that each row writes; position_ids `[B, T]` replace the rotary positions."""
        span = self._span(embeds, starts, cache, position_ids)
        states: list[Tensor] = []
        attentions: list[Tensor] = []
        x = embeds
        for layer in self.layers:
            if want_states:
                states.append(x)
            x, weights = layer(x, span, want_weights)
            if weights is not None:
                attentions.append(weights)
        x = self.norm(x)
        return DecoderOutput(x, (*states, x) if want_states else None, tuple(attentions) if want_weights else None)

    def _span(self, embeds: Tensor, starts: list[int], cache: KVCache | None, position_ids: Tensor | None) -> Span:
        if cache is not None:
            cache.check_room(starts, embeds.shape[1])
        if position_ids is None:
            first = torch.tensor(starts, device=embeds.device)
            position_ids = first[:, None] + torch.arange(embeds.shape[1], device=embeds.device)
        cos, sin = cos_sin(self.config.rope, self.config.head_dim, position_ids, embeds.dtype)
        return Span(cos, sin, starts, cache)


class LlamaForCausalLM(nn.Module):
    """The decoder with its head. Takes our TextConfig or a transformers Llama, Mistral or Qwen2 config.

    With a `share` it is one rank's part: all ranks are called alike, and each gets the whole logits.
    """

    def __init__(self, config: TextConfig | PretrainedConfig, share: Share | None = None) -> None:
        super().__init__()
        share = share or Share.of(TextConfig.of(config))
        self.model = LlamaModel(share)
        self.take(share)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.tie_weights()

    def take(self, share: Share) -> None:
        """Have these sizes from now on."""
        self.share = self.model.share = share
        self.config = self.model.config = share.config

    def tie_weights(self) -> None:
        """Make the head share the embeddings' parameter where the config says so; a packed head is one for itself."""
        if self.config.tie_word_embeddings and isinstance(self.lm_head, nn.Linear):
            self.lm_head.weight = self.model.embed_tokens.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `[B, T, D]` -> fp32 `[B, T, V]`."""
        return joined(self.lm_head(hidden).float(), [len(part) for part in self.share.vocabularies], self.share.group)
