"""The decoder of a model in one call of the CPU kernels: tokens or embeddings in, logits out.

It stands for the modules where all their linears are prepared 4-bit ones (tinychat.layers.linear) and nothing watches
them; `CpuDecoder.of` says so. The weights are shared with the modules: q, k and v, and gate and up, become views of
what the kernels read as one linear.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinychat.layers.head import PackedHead
from tinychat.layers.kv_cache import KVCache
from tinychat.layers.linear import QuantLinear
from tinychat.layers.norm import RMSNorm
from tinychat.layers.one_call import Obstacle, Sizes, is_watched, linears_of, refused
from tinychat.layers.rotary import Rope, cos_sin
from tinychat_kernels.cpu import SCALES, Packed

FIRST_ANGLES = 4096  # positions that the first rotary table holds
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Config(Sizes, Protocol):
    """The fields of tinychat.config.TextConfig that matter here."""

    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope(self) -> Rope: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...


class CpuDecoder:
    """One model's decoder behind the kernels' structure, as its modules are now."""

    def __init__(self, llm: nn.Module, config: Config) -> None:
        from tinychat_kernels import cpu_decoder

        cpu_decoder.check_sizes(
            config.hidden_size, config.intermediate_size, config.head_dim
        )  # before weights are joined
        self._llm = llm
        self._config = config
        self._lock = threading.Lock()
        self._angles: tuple[Tensor, Tensor] | None = None
        model: Any = llm.model
        layers = [_layer(layer, window) for layer, window in zip(model.layers, config.windows, strict=True)]
        head = _head(llm.lm_head)
        assert head is not None
        weights = cpu_decoder.Weights(
            layers, _float(model.norm.weight), head.detach() if isinstance(head, Tensor) else head,
            model.embed_tokens.weight.detach(),
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps,
        )  # fmt: skip
        exact = next(linears_of(model.layers, ATTENTION, MLP)).exact
        self.kernel = cpu_decoder.Decoder(weights, exact=exact)
        self._parts = list(_parts(llm))

    def cache_dtype(self, model: torch.dtype) -> torch.dtype:
        """What a cache for a model of this dtype holds: float16 where activations are rounded anyway."""
        return torch.float16 if model == torch.float32 and not self.kernel.exact else model

    @classmethod
    def of(cls, llm: nn.Module, config: Config) -> CpuDecoder:
        """Raises Obstacle where `obstacle` names one, or the kernels do not take the model's sizes."""
        if (reason := obstacle(llm, config)) is not None:
            raise Obstacle(reason)
        with refused():
            return cls(llm, config)

    def is_current(self) -> bool:
        """Whether the modules are those that this was made from, and nothing watches them."""
        now = list(_parts(self._llm))
        same = len(now) == len(self._parts) and all(a is b for a, b in zip(now, self._parts, strict=True))
        return same and not is_watched(self._llm)

    def forward(self, inputs: Tensor, cache: KVCache, starts: list[int], want: str) -> Tensor | None:
        """Token ids `[B, T]` or embeddings `[B, T, D]` -> fp32 logits of each row's last token, of "every", or "none".

        Keys and values are written from `starts` on; lengths stay. There must be room for them.
        """
        from tinychat_kernels.cpu_decoder import Rows

        with self._lock:
            rotary = self._rotary(starts, inputs.shape[1])
            return self.kernel.forward(inputs, Rows(cache.pool.layers, cache.rows, starts), rotary, want)

    def _rotary(self, starts: list[int], count: int) -> Any:
        from tinychat_kernels.cpu_decoder import Rotary

        if self._config.rope.type == "dynamic":  # a row's angles depend on its length
            positions = torch.tensor(starts)[:, None] + torch.arange(count)
            angles = torch.arange(positions.numel()).view(positions.shape)
            return Rotary(*self._tables(positions), angles)
        longest = max(starts) + count
        if self._angles is None or longest > len(self._angles[0]):
            self._angles = self._tables(torch.arange(max(FIRST_ANGLES, 2 * longest))[None])
        return Rotary(*self._angles)

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[positions, head_dim / 2]`."""
        tables = cos_sin(self._config.rope, self._config.head_dim, positions, torch.float32)
        cos, sin = (table[..., : self._config.head_dim // 2].flatten(0, 2).contiguous() for table in tables)
        return cos, sin


def obstacle(llm: nn.Module, config: Config) -> str | None:
    """Why a decoder (tinychat.models.llama.LlamaForCausalLM) cannot run in one call; None where nothing is known."""
    model: Any = llm.model
    linears = linears_of(model.layers, ATTENTION, MLP)
    if any(not isinstance(one, QuantLinear) or not isinstance(one.packed, Packed) for one in linears):
        return "its linears are not 4-bit ones that the CPU kernels hold"
    packed = (*linears_of(model.layers, ATTENTION, MLP), llm.lm_head)
    exact = {one.exact for one in packed if isinstance(one, QuantLinear | PackedHead)}
    for wrong, reason in (
        (config.hidden_act != "silu", f"its activation is {config.hidden_act}"),
        (len(exact) > 1, "some of its linears are exact, others not"),
        (_head(llm.lm_head) is None, "its head is none that the CPU kernels read"),
        (not _is_table(model.embed_tokens.weight), "its embeddings are none that the CPU kernels read"),
        (is_watched(llm), "hooks watch its modules"),
    ):
        if wrong:
            return reason
    return None


def _parts(llm: nn.Module) -> Iterator[object]:
    """What a CpuDecoder is made from."""
    model: Any = llm.model
    for linear in linears_of(model.layers, ATTENTION, MLP):
        prepared = isinstance(linear, QuantLinear) and linear.prepared
        yield from (linear.packed if prepared else linear, linear.bias, prepared and linear.exact)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            yield module.weight
    yield from (model.embed_tokens.weight, _head(llm.lm_head), getattr(llm.lm_head, "exact", None))


def _head(head: Any) -> Packed | Tensor | None:
    if isinstance(head, PackedHead):
        return head.packed if isinstance(head.packed, Packed) else None
    plain = type(head) is nn.Linear and head.bias is None and _is_table(head.weight)
    return head.weight if plain else None


def _is_table(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in SCALES and weight.is_contiguous()


def _float(tensor: Any) -> Tensor:
    return tensor.detach().float().contiguous()


def _layer(layer: Any, window: int | None) -> Any:
    from tinychat_kernels import cpu_decoder

    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, out = (getattr(attention, name) for name in ATTENTION)
    gate, up, down = (getattr(mlp, name) for name in MLP)
    return cpu_decoder.Layer(
        qkv=_joined([q, k, v]),
        out=_linear(out),
        gate_up=_joined([gate, up]),
        down=_linear(down),
        attention_norm=_float(layer.input_layernorm.weight),
        mlp_norm=_float(layer.post_attention_layernorm.weight),
        window=window,
    )


def _linear(linear: QuantLinear) -> Any:
    from tinychat_kernels import cpu_decoder

    assert isinstance(linear.packed, Packed)
    return cpu_decoder.Linear(linear.packed, None if linear.bias is None else _float(linear.bias))


def _joined(linears: Sequence[QuantLinear]) -> Any:
    """Linears as one; what they hold are parts of it from now on, so that nothing is held twice."""
    from tinychat_kernels import cpu_decoder

    fused, start = cpu_decoder.fuse([_linear(linear) for linear in linears]), 0
    for linear in linears:
        packed = linear.packed
        assert isinstance(packed, Packed)
        end = start + packed.blocks.numel()
        linear.prepare(dataclasses.replace(packed, blocks=fused.weight.blocks[start:end]), exact=linear.exact)
        start = end
    return fused
