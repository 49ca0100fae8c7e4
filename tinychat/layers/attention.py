"""Attention: one function that all models share, and the decoder's and the encoder's modules around it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tinychat.layers.kv_cache import KVCache
from tinychat.layers.parallel import ALONE, Group, total
from tinychat.layers.rotary import rotate


@dataclass(frozen=True)
class Span:
    """Where a forward's tokens stand: rotary tables, each row's start, and the cache that holds what came before.

    cos and sin `[B, 1, T, D]`; `starts[i]` is the first position that row i writes (0 without a cache).
    """

    cos: Tensor
    sin: Tensor
    starts: list[int]
    cache: KVCache | None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _elsewhere: dict[torch.device, Span] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Tokens a row."""
        return self.cos.shape[2]

    @property
    def length(self) -> int:
        """Keys that the longest row has to look at."""
        return max(self.starts) + self.count

    def to(self, device: torch.device) -> Span:
        """The same on another device, made once for all layers there."""
        if device == self.cos.device:
            return self
        if device not in self._elsewhere:
            cos, sin = self.cos.to(device), self.sin.to(device)
            self._elsewhere[device] = replace(self, cos=cos, sin=sin, _masks={}, _elsewhere={})
        return self._elsewhere[device]

    def mask(self, window: int | None) -> Tensor:
        """The causal mask of a window, made once for all layers."""
        if window not in self._masks:
            self._masks[window] = causal_mask(self.starts, self.count, self.length, window, self.cos.device)
        return self._masks[window]


class DecoderShape(Protocol):
    """The sizes of a decoder's attention (tinychat.config.TextConfig has them)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def out_bias(self) -> bool: ...


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """q `[B, Hq, T, D]`, k and v `[B, Hkv, S, D]`, mask bool (True = look), or causal with T = S -> `[B, Hq, T, D]`."""
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def attend_with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `attend`, and the attention weights `[B, Hq, T, S]`, which cost T x S numbers a head."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


def causal_mask(starts: list[int], count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """bool `[B or 1, 1, T, S]`: token t of row i looks at positions up to starts[i] + t, at most `window` of them."""
    same = len(set(starts)) == 1
    first = torch.tensor(starts[:1] if same else starts, device=device)
    query = first[:, None] + torch.arange(count, device=device)
    key = torch.arange(length, device=device)
    seen = key <= query[..., None]
    if window is not None:
        seen &= key > query[..., None] - window
    return seen[:, None]


class CausalSelfAttention(nn.Module):
    """[B, T, D] -> [B, T, D]: rotary positions, grouped key and value heads, an optional sliding window.

    The heads are those of one rank of the group, of which `config` tells the number.
    """

    def __init__(self, config: DecoderShape, layer: int, window: int | None, group: Group = ALONE) -> None:
        super().__init__()
        self.group = group
        self.layer = layer
        self.window = window
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.out_bias)

    def forward(self, x: Tensor, span: Span, want_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """The output, and the attention weights where they are wanted."""
        rows, count = x.shape[:2]
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, span.cos, span.sin), rotate(k, span.cos, span.sin)
        if span.cache is not None:
            span.cache.write(self.layer, k, v, span.starts)
            k, v = (part.to(q.dtype) for part in span.cache.view(self.layer, span.length))
        out, weights = self._attend(q, k, v, span, want_weights)
        return total(self.o_proj(out.transpose(1, 2).reshape(rows, count, -1)), self.group), weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span, want_weights: bool) -> tuple[Tensor, Tensor | None]:
        window = self.window if self.window is not None and self.window < span.length else None
        if want_weights:
            return attend_with_weights(q, k, v, span.mask(window))
        if window is None:
            if span.count == 1 and len(set(span.starts)) == 1:
                return attend(q, k, v, None), None
            if span.count == span.length:
                return attend(q, k, v, None, causal=True), None
        return attend(q, k, v, span.mask(window)), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
