"""A whole decoder on the CPU, one C call a forward: between the first layer and the logits no torch op runs.

A row's logits have the same bits whatever stands beside it, however its tokens are cut into chunks, and for any number
of threads. The structures are those of csrc/cpu/decoder.h.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinychat_kernels import cpu
from tinychat_kernels.cpu import SCALES, Packed
from tinychat_kernels.errors import KernelError, LayoutError

CACHES = {**SCALES, torch.int8: 3}  # how keys and values may be stored
LANES = 16  # outputs of a block: what fused linears, widths and head sizes are multiples of
MOST_HEAD_DIM = 256
STAGES = ("norm", "qkv", "rotary", "attention", "out", "gate_up", "swiglu", "down", "head")

_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


@dataclass(frozen=True, slots=True)
class Linear:
    """Packed weights, and a float32 bias."""

    weight: Packed
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """qkv has the outputs of q, k and v, gate_up those of gate and up; the norms are weights, float32 `[D]`.

    A token sees `window` keys at most, its own included; None: all.
    """

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    attention_norm: Tensor
    mlp_norm: Tensor
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """A Llama-shaped decoder. The head is packed, or a float table `[V, D]` as the embeddings are."""

    layers: Sequence[Layer]
    norm: Tensor
    head: Packed | Tensor
    embeddings: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin float32 `[angles, head_dim / 2]`; angles int32 `[B, T]` are a token's row, None: its position."""

    cos: Tensor
    sin: Tensor
    angles: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The cache rows that a forward writes: slots and first positions.

    A layer is keys and values `[slots, Hkv, capacity, D]`; int8 ones are followed by their scales, float32
    `[slots, Hkv, capacity]` each.
    """

    layers: Sequence[tuple[Tensor, ...]]
    slots: Sequence[int]
    starts: Sequence[int]


class _Table(ctypes.Structure):
    _fields_ = (("values", _POINTER), ("kind", _INT32))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, cpu._Weights) for name in ("qkv", "out", "gate_up", "down")),
        *((f"{name}_bias", _POINTER) for name in ("qkv", "out", "gate_up", "down")),
        ("attention_norm", _POINTER),
        ("mlp_norm", _POINTER),
        ("window", _INT64),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, _INT64) for name in ("layer_count", "width", "inner", "heads", "kv_heads", "head_dim", "vocabulary")),
        ("norm", _POINTER),
        ("head", cpu._Weights),
        ("head_table", _Table),
        ("embeddings", _Table),
        ("eps", _FLOAT),
        ("exact", _INT32),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.POINTER(_POINTER)) for name in ("keys", "values", "key_scales", "value_scales")),
        ("capacity", _INT64),
        ("kind", _INT32),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("hidden", "tokens", "slots", "starts", "cos", "sin", "angles")),
        ("rows", _INT64),
        ("count", _INT64),
        ("every", _INT32),
        *((name, _POINTER) for name in ("logits", "memory", "nanoseconds")),
    )


class _AttentionShape(ctypes.Structure):
    _fields_ = (
        ("slots", _POINTER),
        ("starts", _POINTER),
        *((name, _INT64) for name in ("rows", "count", "heads", "kv_heads", "head_dim", "capacity", "window")),
        ("scale", _FLOAT),
        ("kind", _INT32),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = cpu.library()
    for name, result, arguments in (
        ("tc_step_memory", ctypes.c_size_t, (_POINTER, _INT64, _INT64, _INT64)),
        ("tc_forward", ctypes.c_int, (_POINTER, _POINTER, _POINTER)),
        ("tc_attention", ctypes.c_int, (_POINTER,) * 7),
        ("tc_norm", None, (_POINTER, _POINTER, _POINTER, _FLOAT, _INT64, _INT64, _POINTER)),
        ("tc_swiglu", None, (_POINTER, _INT64, _INT64, _POINTER)),
        ("tc_rotate", None, (_POINTER, _POINTER, _POINTER, _INT64, _INT64)),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def fuse(parts: Sequence[Linear]) -> Linear:
    """Linears of the same inputs as one, whose outputs are theirs in order. Raises LayoutError where blocks differ."""
    first = parts[0].weight
    same = {(p.weight.in_features, p.weight.group, p.weight.bits, p.weight.scale) for p in parts}
    uneven = [p.weight.out_features for p in parts[:-1] if p.weight.out_features % LANES]
    if len(same) > 1 or uneven:
        raise LayoutError(f"linears with blocks of {sorted(map(str, same))}, outputs {uneven}, cannot be joined")
    blocks = _joined([p.weight.blocks for p in parts])
    outputs = sum(p.weight.out_features for p in parts)
    weight = Packed(blocks, first.in_features, outputs, first.group, first.bits, first.scale)
    if all(p.bias is None for p in parts):
        return Linear(weight)
    return Linear(weight, torch.cat([torch.zeros(p.weight.out_features) if p.bias is None else p.bias for p in parts]))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Bytes behind each other: as they lie, where they do already, else copied."""
    first, size = parts[0], sum(part.numel() for part in parts)
    ends = itertools.accumulate((part.numel() for part in parts), initial=first.data_ptr())
    storage = first.untyped_storage()
    in_place = all(p.data_ptr() == end for p, end in zip(parts, ends, strict=False))
    if in_place and all(p.untyped_storage().data_ptr() == storage.data_ptr() for p in parts):
        return first.as_strided((size,), (1,))
    return torch.cat(list(parts), out=cpu.empty(size))


class Decoder:
    """The weights behind one C structure, and the memory that a forward needs. Not for several threads at once."""

    def __init__(self, weights: Weights, *, exact: bool = False) -> None:
        _check(weights)
        self.weights = weights
        self.nanoseconds: Tensor | None = None
        self._layers = (_Layer * len(weights.layers))(*map(_layer, weights.layers))
        self._struct = self._decoder(exact)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._cache: tuple[Any, _Cache] | None = None

    @property
    def exact(self) -> bool:
        """Whether linears take float32 activations, instead of int8 ones with a scale for each row and group."""
        return bool(self._struct.exact)

    @exact.setter
    def exact(self, value: bool) -> None:
        self._struct.exact = int(value)
        self._memory = torch.empty(0, dtype=torch.uint8)

    def forward(self, inputs: Tensor, rows: Rows, rotary: Rotary, want: str = "last") -> Tensor | None:
        """Tokens `[B, T]` or embeddings `[B, T, D]` -> float32 logits, keys and values written to the cache.

        want: "last" gives `[B, 1, V]`, "every" `[B, T, V]`, "none" None.
        """
        batch, count = inputs.shape[:2]
        self._check_rows(rows, batch, count)
        lengths = [start + count for start in rows.starts]
        is_tokens = not inputs.is_floating_point()
        if is_tokens and not 0 <= int(inputs.min()) <= int(inputs.max()) < len(self.weights.embeddings):
            raise KernelError(f"a token is none of the {len(self.weights.embeddings)} that there are")
        given = inputs.to(torch.int64 if is_tokens else torch.float32).contiguous()
        angles = None if rotary.angles is None else rotary.angles.to(torch.int32).contiguous()
        if (needed := max(lengths) if angles is None else int(angles.max()) + 1) > len(rotary.cos):
            raise KernelError(f"{len(rotary.cos)} angles came for {needed}")
        slots, starts = ((_INT32 * batch)(*numbers) for numbers in (rows.slots, rows.starts))
        every = want == "every"
        vocabulary = self._struct.vocabulary
        logits = None if want == "none" else torch.empty((batch, count if every else 1, vocabulary))
        step = _Step(
            None if is_tokens else given.data_ptr(), given.data_ptr() if is_tokens else None,
            ctypes.addressof(slots), ctypes.addressof(starts),
            rotary.cos.data_ptr(), rotary.sin.data_ptr(), _address(angles),
            batch, count, int(every), _address(logits), self._room(batch, count, max(lengths)),
            _address(self.nanoseconds),
        )  # fmt: skip
        failed = _library().tc_forward(
            ctypes.addressof(self._struct), ctypes.addressof(self._cache_of(rows.layers)), ctypes.addressof(step)
        )
        cpu.check_memory(failed, f"{batch} rows of {count} tokens")
        return logits

    def profile(self) -> dict[str, float]:
        """Seconds spent in each stage since `nanoseconds` was set to zeros."""
        spent = torch.zeros(len(STAGES)) if self.nanoseconds is None else self.nanoseconds / 1e9
        return dict(zip(STAGES, spent.tolist(), strict=True))

    def start_profile(self) -> None:
        """Measure what follows, from zero."""
        self.nanoseconds = torch.zeros(len(STAGES), dtype=torch.int64)

    def _decoder(self, exact: bool) -> _Decoder:
        w = self.weights
        sizes = len(w.layers), len(w.norm), w.layers[0].down.weight.in_features, w.heads, w.kv_heads, w.head_dim
        no_weights, no_table = cpu._Weights(), _Table()
        head = (no_weights, _table(w.head)) if isinstance(w.head, Tensor) else (_packed(w.head), no_table)
        return _Decoder(
            self._layers, *sizes, len(w.embeddings), w.norm.data_ptr(), *head, _table(w.embeddings), w.eps, int(exact)
        )

    def _check_rows(self, rows: Rows, batch: int, count: int) -> None:
        keys, _, *scales = rows.layers[0]
        w = self.weights
        shape = (w.kv_heads, keys.shape[2], w.head_dim)
        fits = tuple(keys.shape[1:]) == shape and len(rows.layers) == len(w.layers)
        fits &= [part.shape for part in scales] == ([keys.shape[:3]] * 2 if keys.dtype == torch.int8 else [])
        if not fits or keys.dtype not in CACHES or keys.device.type != "cpu" or not keys.is_contiguous():
            found = f"{len(rows.layers)} layers of a cache {list(keys.shape)} of {keys.dtype} on {keys.device}"
            raise KernelError(f"{found} came for {len(w.layers)} of {list(shape)} a slot")
        if not batch or not count:
            raise KernelError(f"a step of {batch} rows of {count} tokens computes nothing")
        longest = max(rows.starts, default=0) + count
        if len(rows.slots) != batch or len(rows.starts) != batch or longest > keys.shape[2]:
            raise KernelError(f"{len(rows.slots)} rows up to {longest} came for {batch}, of {keys.shape[2]} at most")
        if min(rows.starts) < 0 or not 0 <= min(rows.slots) <= max(rows.slots) < len(keys):
            raise KernelError(f"starts {list(rows.starts)} in slots {list(rows.slots)} came for {len(keys)} slots")

    def _room(self, batch: int, count: int, longest: int) -> int:
        """The address of enough memory for such a step."""
        needed = _library().tc_step_memory(ctypes.addressof(self._struct), batch, count, longest)
        if needed > self._memory.numel():
            self._memory = cpu.empty(needed)
        return self._memory.data_ptr()

    def _cache_of(self, layers: Sequence[tuple[Tensor, ...]]) -> _Cache:
        """The structure of a cache, kept for the next step of the same one."""
        if self._cache is None or self._cache[0] is not layers:
            _check_same(layers)
            pointers = [
                (_POINTER * len(layers))(*(part.data_ptr() for part in parts)) for parts in zip(*layers, strict=True)
            ]
            keys = layers[0][0]
            scales = [] if len(pointers) == 4 else [None, None]
            self._cache = (layers, _Cache(*pointers, *scales, keys.shape[2], CACHES[keys.dtype]))
        return self._cache[1]


def attention(q: Tensor, rows: Rows, *, window: int | None = None) -> Tensor:
    """q float32 `[B, T, H, D]` over one layer of a cache that holds the keys of these tokens already -> the same."""
    batch, count, heads, head_dim = q.shape
    keys, values, *scales = rows.layers[0]
    slots, starts = ((_INT32 * batch)(*numbers) for numbers in (rows.slots, rows.starts))
    shape = _AttentionShape(
        ctypes.addressof(slots), ctypes.addressof(starts), batch, count, heads, keys.shape[1], head_dim, keys.shape[2],
        window or 0, head_dim**-0.5, CACHES[keys.dtype],
    )  # fmt: skip
    q = q.contiguous()
    out = torch.empty_like(q)
    addresses = [part.data_ptr() for part in (keys, values, *scales)]
    addresses += [None] * (4 - len(addresses))
    failed = _library().tc_attention(ctypes.addressof(shape), q.data_ptr(), *addresses, out.data_ptr())
    cpu.check_memory(failed, f"attention of {batch * count} tokens")
    return out


def norm(x: Tensor, weight: Tensor, eps: float, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x float32 `[M, D]`, plus `add` -> that sum, and its RMS norm."""
    x, out = x.clone(), torch.empty_like(x)
    _library().tc_norm(x.data_ptr(), _address(add), weight.data_ptr(), eps, *x.shape, out.data_ptr())
    return x, out


def swiglu(gate_up: Tensor) -> Tensor:
    """float32 `[M, 2N]`, gate and up -> silu(gate) * up `[M, N]`."""
    out = torch.empty((len(gate_up), gate_up.shape[1] // 2))
    _library().tc_swiglu(gate_up.data_ptr(), *out.shape, out.data_ptr())
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x float32 `[M, D]` turned by the angles of cos and sin `[M, D/2]`, pairs (i, i + D/2)."""
    out = x.clone()
    _library().tc_rotate(out.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape)
    return out


def check_sizes(width: int, inner: int, head_dim: int) -> None:
    """Raise KernelError for a decoder that the kernels do not take."""
    if head_dim % LANES or head_dim > MOST_HEAD_DIM:
        raise KernelError(f"heads of {head_dim} channels: multiples of {LANES} up to {MOST_HEAD_DIM} are supported")
    for name, size in (("hidden", width), ("intermediate", inner)):
        if size % LANES:
            raise KernelError(f"the {name} size {size} is no multiple of {LANES}")


def _check(w: Weights) -> None:
    """Raise KernelError for sizes or tables that the kernels do not take."""
    check_sizes(len(w.norm), w.layers[0].down.weight.in_features, w.head_dim)
    tables = [w.embeddings, w.head] if isinstance(w.head, Tensor) else [w.embeddings]
    for table in tables:
        if table.dtype not in SCALES or not table.is_contiguous() or table.device.type != "cpu":
            raise KernelError(f"a table {list(table.shape)} of {table.dtype} on {table.device} cannot be read")


def _check_same(layers: Sequence[tuple[Tensor, ...]]) -> None:
    """Raise KernelError for layers of a cache that are not as the first is."""

    def form(layer: tuple[Tensor, ...]) -> list[object]:
        return [(list(part.shape), part.dtype, part.device.type, part.is_contiguous()) for part in layer]

    for number, layer in enumerate(layers):
        if form(layer) != [form(layers[0][:1])[0]] * 2 + form(layers[0])[2:]:
            raise KernelError(f"layer {number} of a cache holds {form(layer)}, unlike the first")


def _layer(layer: Layer) -> _Layer:
    linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
    return _Layer(
        *(_packed(linear.weight) for linear in linears),
        *(_address(linear.bias) for linear in linears),
        layer.attention_norm.data_ptr(),
        layer.mlp_norm.data_ptr(),
        layer.window or 0,
    )


def _packed(p: Packed) -> cpu._Weights:
    return cpu._Weights(p.blocks.data_ptr(), p.in_features, p.out_features, p.group, p.bits, SCALES[p.scale])


def _table(values: Tensor) -> _Table:
    return _Table(values.data_ptr(), SCALES[values.dtype])


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
