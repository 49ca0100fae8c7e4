"""The decoder of a model on the CUDA kernels: a step of up to 8 rows is one CUDA graph, a chunk is a run of launches.

It stands for the modules where all their linears are prepared 4-bit ones (tinychat.layers.linear) on one GPU and
nothing watches them; `CudaDecoder.of` says so. The weights are shared with the modules: q, k and v, and gate and up,
become views of what the kernels read as one linear.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tinychat.layers.attention import causal_mask
from tinychat.layers.cpu_decoder import ATTENTION, MLP, Config
from tinychat.layers.head import PackedHead
from tinychat.layers.kv_cache import KVCache, KVPool
from tinychat.layers.linear import QuantLinear
from tinychat.layers.norm import RMSNorm
from tinychat.layers.one_call import Obstacle, linears_of, refused
from tinychat.layers.rotary import cos_sin
from tinychat_kernels import cuda
from tinychat_kernels.cuda_decoder import MOST_ROWS, Decoder, Layer, Linear, Step, Weights, check, examine
from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.cuda_ops import Heads, Launch, Where
from tinychat_kernels.cuda_ops import Layer as Cached
from tinychat_kernels.errors import KernelError

Drawn = tuple[list[int], list[float]]  # a token and its log-probability for each row
LARGEST = 1 - 2**-24  # below 1, of a random number in fp32


class Refusal(Obstacle):
    """An Obstacle that stands until parts of the decoder change: nothing is packed or compared again before."""

    def __init__(self, reason: str, llm: nn.Module) -> None:
        super().__init__(reason)
        self._parts = list(_everything(llm))
        self._watched = _watched(llm)

    def stands(self, llm: nn.Module) -> bool:
        """Whether the modules are those that were refused, and are watched as they were."""
        return _same(self._parts, list(_everything(llm))) and _watched(llm) == self._watched


class CudaDecoder:
    """One model's decoder behind the kernels' launches, as its modules are now."""

    def __init__(self, llm: nn.Module, config: Config, launch: Launch, processors: int) -> None:
        self._llm = llm
        self._config = config
        self._lock = threading.Lock()
        self._pool: weakref.ref[KVPool] | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self._steps: dict[tuple[int, bool], Step] = {}
        self._left: tuple[weakref.ref[Step], Tensor] | None = None  # what a step left for the next
        model: Any = llm.model
        layers = [_layer(layer, window) for layer, window in zip(model.layers, config.windows, strict=True)]
        self.kernel = Decoder(_weights(llm, config, layers), launch, processors)
        self._parts = list(_parts(llm))

    @classmethod
    def of(cls, llm: nn.Module, config: Config) -> CudaDecoder:
        """Raises Refusal where `obstacle` names one, the kernels do not take the model's sizes, or one is wrong."""
        try:
            return cls._of(llm, config)
        except Obstacle as error:
            raise Refusal(str(error), llm) from error

    @classmethod
    def _of(cls, llm: nn.Module, config: Config) -> CudaDecoder:
        if (reason := obstacle(llm, config)) is not None:
            raise Obstacle(reason)
        from tinychat_kernels.cuda_gpu import gpu

        with refused():
            device = gpu(_device(llm).index or 0)
            sample = _weights(llm, config, _one_of_each(llm))
            check(sample)
            examine(device, sample)
            return cls(llm, config, device, device.processors)

    def is_current(self) -> bool:
        """Whether the modules are those that this was made from, and nothing watches them."""
        return _same(self._parts, list(_parts(self._llm))) and not _watched(self._llm)

    def cache_dtype(self, model: torch.dtype) -> torch.dtype:
        """What a cache for a model of this dtype holds."""
        return model

    @torch.no_grad()
    def forward(self, inputs: Tensor, cache: KVCache, starts: list[int], want: str) -> Tensor | None:
        """Token ids `[B, T]` or embeddings `[B, T, D]` -> fp32 logits of each row's last token, of "every", or "none".

        Keys and values are written from `starts` on; lengths stay. There must be room for them.
        """
        rows, count = inputs.shape[:2]
        with self._lock:
            self._open(cache.pool)
            if inputs.is_floating_point() or rows * count > MOST_ROWS:
                return self._chunk(inputs, cache, starts, want)
            step = self._step(rows * count, draws=False)
            self._check_tokens(inputs)
            step.inputs[0].copy_(inputs.flatten())
            step.inputs[1:].copy_(_places(cache, starts, count), non_blocking=True)
            step.run()
            if want == "none":
                return None
            logits = step.logits.float().view(rows, count, -1)
            return logits[:, -1:].clone() if want == "last" else logits.clone()

    @torch.no_grad()
    def draw(self, tokens: list[int], cache: KVCache, temperatures: list[float], uniform: list[float]) -> Drawn:
        """The newest token of each row, written at its length -> the next, drawn on the device: one synchronization.

        Temperature 0 takes the likeliest; else the distribution is inverted at `uniform`, in [0, 1). Lengths stay.
        """
        with self._lock:
            self._open(cache.pool)
            step = self._step(len(tokens), draws=True)
            self._give(step, torch.cat((torch.tensor([tokens], dtype=torch.int32), _places(cache, cache.lengths, 1))))
            chances = torch.tensor([temperatures, uniform]).clamp(max=LARGEST)
            if any(temperatures) or not step.greedy:
                step.chances.copy_(chances, non_blocking=True)
                step.greedy = not any(temperatures)
            step.run()
            left = step.state.cpu()
            self._left = (weakref.ref(step), left[:3])
            return left[0].tolist(), left[3].view(torch.float32).tolist()

    def _give(self, step: Step, inputs: Tensor) -> None:
        """Tokens, positions and slots, where the step before has not left them there already."""
        if self._left is None or self._left[0]() is not step or not torch.equal(self._left[1], inputs):
            step.inputs.copy_(inputs, non_blocking=True)

    def _open(self, pool: KVPool) -> None:
        """Graphs hold the addresses of one pool: another one begins anew. Raises KernelError for an unknown dtype."""
        if self._pool is None or self._pool() is not pool:
            held, own = pool.layers[0][0].dtype, self.kernel.weights.embeddings.dtype
            if held not in (own, torch.int8):
                raise KernelError(f"the cache holds {held}, the CUDA kernels read {own} and int8 beside such weights")
            self._steps = steps = {}
            self._pool = weakref.ref(pool, lambda _: steps.clear())  # steps hold its tensors: they go with it
            self._tables = self._angles(pool.capacity)

    def _angles(self, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin fp32 `[count, head_dim / 2]`."""
        positions = torch.arange(count, device=self.kernel.weights.norm.device)[None]
        with torch.inference_mode(False):
            tables = cos_sin(self._config.rope, self._config.head_dim, positions, torch.float32)
            cos, sin = (table[0, 0, :, : self._config.head_dim // 2].contiguous() for table in tables)
        return cos, sin

    def _step(self, rows: int, *, draws: bool) -> Step:
        pool = self._pool() if self._pool is not None else None
        assert pool is not None and self._tables is not None
        key = rows, draws
        if key not in self._steps:
            self._steps[key] = Step(self.kernel, _cached(pool), self._tables, rows, draws=draws)
        return self._steps[key]

    def _check_tokens(self, ids: Tensor) -> None:
        """Raises KernelError for a token that is none, where asking costs no synchronization."""
        count = len(self.kernel.weights.embeddings)
        if not ids.is_cuda and not 0 <= int(ids.min()) <= int(ids.max()) < count:
            raise KernelError(f"a token is none of the {count} that there are")

    def _chunk(self, inputs: Tensor, cache: KVCache, starts: list[int], want: str) -> Tensor | None:
        """A forward of any size, launch by launch."""
        rows, count = inputs.shape[:2]
        embeds = inputs if inputs.is_floating_point() else self._embedded(inputs)
        work = self.kernel.work(rows * count)
        work.x.copy_(embeds.reshape(rows * count, -1))
        positions, slots = _places(cache, starts, count).to(work.x.device)
        where = Where(slots, positions)
        assert self._tables is not None
        attend = self._attend(cache, starts, count)
        self.kernel.layers(work, where, self._tables, _cached(cache.pool), attend)
        if want == "none":
            return None
        hidden = work.normed.view(rows, count, -1)
        hidden = hidden[:, -1:] if want == "last" else hidden
        logits = self.kernel.logits(hidden.shape[0] * hidden.shape[1])
        self.kernel.head(hidden.reshape(len(logits), -1), logits)
        return logits.float().view(*hidden.shape[:2], -1)

    def _embedded(self, ids: Tensor) -> Tensor:
        self._check_tokens(ids)
        return nn.functional.embedding(ids, self.kernel.weights.embeddings)

    def _attend(self, cache: KVCache, starts: list[int], count: int) -> Callable[[Tensor, Cached, Heads, Tensor], None]:
        """Attention of a chunk by torch, over the keys that the cache holds once the chunk is written."""
        length = max(starts) + count
        masks: dict[int, Tensor] = {}
        rows = _span(cache.rows)

        def attend(qkv: Tensor, cached: Cached, heads: Heads, out: Tensor) -> None:
            shape = (len(cache), count, heads.queries, heads.dim)
            q = qkv[:, : heads.queries * heads.dim].reshape(shape).transpose(1, 2)
            k, v = _floats(cached, rows, length, q.dtype)
            window = heads.window if 0 < heads.window < length else 0
            if window == 0 and count == length:
                found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            elif window == 0 and len(set(starts)) == 1:
                found = _lower_right(q, k, v)
            else:
                if window not in masks:
                    masks[window] = causal_mask(starts, count, length, window or None, q.device)
                found = scaled_dot_product_attention(q, k, v, attn_mask=masks[window], enable_gqa=True)
            out.view(shape).copy_(found.transpose(1, 2))

        return attend


def _floats(cached: Cached, rows: slice | list[int], length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, length, D]`; those of int8 times their scales."""
    keys, values = cached.keys[rows, :, :length], cached.values[rows, :, :length]
    if cached.key_scales is None or cached.value_scales is None:
        return keys, values
    scales = (part[rows, :, :length, None] for part in (cached.key_scales, cached.value_scales))
    k, v = ((part * scale).to(dtype) for part, scale in zip((keys, values), scales, strict=True))
    return k, v


def _places(cache: KVCache, starts: Sequence[int], count: int) -> Tensor:
    """Positions and slots of a chunk, int32 `[2, B * count]`."""
    positions = [start + i for start in starts for i in range(count)]
    return torch.tensor([positions, [slot for slot in cache.rows for _ in range(count)]], dtype=torch.int32)


def _lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last tokens: query t sees the keys up to its own. torch's is_causal would begin at the first."""
    from torch.nn.attention.bias import causal_lower_right

    bias: Any = causal_lower_right(q.shape[2], k.shape[2])
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def _span(rows: list[int]) -> slice | list[int]:
    """Rows as a slice where they lie side by side, so that nothing is copied."""
    first = rows[0]
    return slice(first, first + len(rows)) if rows == list(range(first, first + len(rows))) else rows


def obstacle(llm: nn.Module, config: Config) -> str | None:
    """Why a decoder (tinychat.models.llama.LlamaForCausalLM) cannot run on the kernels; None where nothing is known."""
    model: Any = llm.model
    linears = list(linears_of(model.layers, ATTENTION, MLP))
    if any(not isinstance(one, QuantLinear) or not isinstance(one.packed, Packed) for one in linears):
        return "its linears are not 4-bit ones that the CUDA kernels hold"
    devices = {str(tensor.device) for tensor in (model.embed_tokens.weight, *(one.packed.words for one in linears))}
    plain = type(llm.lm_head) is nn.Linear and llm.lm_head.bias is None
    packed = isinstance(llm.lm_head, PackedHead) and isinstance(llm.lm_head.packed, Packed)
    for wrong, reason in (
        (len(devices) > 1, f"its parts are on {', '.join(sorted(devices))}"),
        (config.hidden_act != "silu", f"its activation is {config.hidden_act}"),
        (config.rope.type == "dynamic", "its rotary angles grow with the length"),
        (not (plain or packed), "its head is none that the CUDA kernels read"),
        (_watched(llm), "hooks watch its modules"),
    ):
        if wrong:
            return reason
    return None


def _device(llm: nn.Module) -> torch.device:
    model: Any = llm.model
    return model.embed_tokens.weight.device


def _parts(llm: nn.Module) -> Iterator[object]:
    """What a CudaDecoder is made from."""
    model: Any = llm.model
    for linear in linears_of(model.layers, ATTENTION, MLP):
        prepared = isinstance(linear, QuantLinear) and linear.prepared
        yield from (linear.packed if prepared else linear, linear.bias)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            yield module.weight
    head: Any = llm.lm_head
    yield from (model.embed_tokens.weight, head.packed if isinstance(head, PackedHead) else head.weight)


def _everything(llm: nn.Module) -> Iterator[object]:
    """What any module is made of, whatever it is."""
    for module in llm.modules():
        yield module
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        if isinstance(module, QuantLinear) and module.prepared:
            yield module.packed


def _same(before: Sequence[object], now: Sequence[object]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _watched(llm: nn.Module) -> bool:
    """Whether hooks want to see what the modules do, or have taken over."""
    return any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in llm.modules())


def _head(head: Any) -> Packed | Tensor:
    if isinstance(head, PackedHead):
        assert isinstance(head.packed, Packed)
        return head.packed
    return head.weight.detach()


def _cached(pool: KVPool) -> list[Cached]:
    return [Cached(*parts) for parts in pool.layers]


def _weights(llm: nn.Module, config: Config, layers: list[Layer]) -> Weights:
    model: Any = llm.model
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    return Weights(
        layers, model.norm.weight.detach(), _head(llm.lm_head), model.embed_tokens.weight.detach(), heads,
        config.rms_norm_eps,
    )  # fmt: skip


def _one_of_each(llm: nn.Module) -> list[Layer]:
    """A layer of each kind, joined beside the modules, which keep what they hold."""
    model: Any = llm.model
    kinds: dict[object, Any] = {}
    for layer in model.layers:
        packed = [one.packed for one in linears_of(nn.ModuleList([layer]), ATTENTION, MLP)]
        kinds.setdefault(tuple((p.inputs, p.outputs, p.group, p.bits, p.scale) for p in packed), layer)
    return [_layer(layer, None, keep=False) for layer in kinds.values()]


def _layer(layer: Any, window: int | None, *, keep: bool = True) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, out = (getattr(attention, name) for name in ATTENTION)
    gate, up, down = (getattr(mlp, name) for name in MLP)
    return Layer(
        qkv=_joined([q, k, v], keep=keep),
        out=_linear(out),
        gate_up=_joined([gate, up], keep=keep),
        down=_linear(down),
        attention_norm=layer.input_layernorm.weight.detach(),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        window=window or 0,
    )


def _linear(linear: QuantLinear) -> Linear:
    assert isinstance(linear.packed, Packed)
    bias: Any = linear.bias
    return Linear(linear.packed, None if bias is None else bias.detach())


def _joined(linears: Sequence[QuantLinear], *, keep: bool) -> Linear:
    """Linears as one. With `keep`, what they hold are parts of it from now on, so that nothing is held twice."""
    parts = [_linear(linear) for linear in linears]
    fused = cuda.join([part.weight for part in parts])
    own = cuda.split(fused, [part.weight.outputs for part in parts]) if keep else []
    for linear, part in zip(linears, own, strict=False):
        linear.prepare(part)
    if all(part.bias is None for part in parts):
        return Linear(fused)
    like = next(part.bias for part in parts if part.bias is not None)
    return Linear(
        fused,
        torch.cat([like.new_zeros(part.weight.outputs) if part.bias is None else part.bias for part in parts]),
    )
