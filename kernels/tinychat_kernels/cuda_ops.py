"""The CUDA kernels' launches: what each entry takes, in order, and how many threads run it.

Every function takes the launcher first: that of a GPU (tinychat_kernels.cuda), or the emulator's (kernels/emu), which
runs the same entries on tensors of the CPU. A function computes into tensors that are there already, reads nothing
back and allocates nothing, so that a CUDA graph can hold it. Entries end in the activations' dtype, `f16` or `bf16`.

Arguments of an entry: a tensor is its address (None: a null pointer), an int is a C `int`, a float is a C `float`.
Positions, slots and tokens are int32 tensors, as `tinychat_kernels.ref` says what each op computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tinychat_kernels.errors import KernelError

Argument = Tensor | int | float | None
Grid = tuple[int, int, int]

DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
WARP = 32
VECTOR = 8  # 16-bit values that a thread loads at once
MOST_THREADS = 1024
MOST_GRID_ROWS = 65535  # of a grid's second dimension
SCRATCH = 4 * WARP  # bytes of shared memory in which the warps of a block join a number each
HEAD_DIMS = (32, 64, 80, 96, 128, 256)


class Launch(Protocol):
    """Runs one entry of a unit (csrc/cuda/<unit>.cu); `shared` is its dynamic shared memory in bytes."""

    def __call__(self, unit: str, entry: str, grid: Grid, block: int, shared: int, *args: Argument) -> None: ...


class Layer(NamedTuple):
    """One layer of a cache: keys and values `[slots, Hkv, capacity, D]`, of the activations' dtype or int8.

    int8 ones have a scale a token and head: fp32 `[slots, Hkv, capacity]`.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Where:
    """For each of R query rows, int32 `[R]`: its slot in the cache, its position, and the first position it may see.

    Rows of one sequence may stand beside each other (a chunk): all of them are written before any is read.
    """

    slots: Tensor
    positions: Tensor
    begins: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention, its sliding window (0: none), and the scale of its scores."""

    queries: int
    keys: int
    dim: int
    window: int = 0

    @property
    def width(self) -> int:
        """Channels of q, k and v together."""
        return (self.queries + 2 * self.keys) * self.dim

    @property
    def scale(self) -> float:
        return self.dim**-0.5


# norm.cu


def add_rms_norm(launch: Launch, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """x `[R, D]` += delta, in place; out = its RMS norm times weight `[D]`. D is a multiple of 8, 16,384 at most.

    add_rms_norm_{t}(T* x, const T* delta, const T* weight, T* out, int width, float eps); a block a row.
    """
    rows, width = x.shape
    launch(
        "norm", f"add_rms_norm_{kind_of(x)}", (rows, 1, 1), row_threads(width), SCRATCH,
        x, delta, weight, out, width, float(eps),
    )  # fmt: skip


def swiglu(launch: Launch, gate_up: Tensor, out: Tensor) -> None:
    """gate_up `[R, 2N]` -> out `[R, N]` = silu(gate) * up. N is a multiple of 8.

    swiglu_{t}(const T* gate_up, T* out, int inner); 8 values a thread, blocks x over the row, y over rows.
    """
    rows, inner = out.shape
    check_multiple("intermediate size", inner, VECTOR)
    blocks = -(-inner // (VECTOR * 256))
    for part in _grid_rows(rows):
        own = out[part]
        launch("norm", f"swiglu_{kind_of(out)}", (blocks, len(own), 1), 256, 0, gate_up[part], own, inner)


def _grid_rows(rows: int) -> Iterator[slice]:
    """Rows, as many at a time as a grid's second dimension takes."""
    return (slice(at, min(at + MOST_GRID_ROWS, rows)) for at in range(0, rows, MOST_GRID_ROWS))


def row_threads(width: int) -> int:
    """Threads of a block that holds a row of 16-bit values, 8 or 16 a thread. Raises KernelError: no such block."""
    check_multiple("width", width, VECTOR)
    if width > 2 * VECTOR * MOST_THREADS:
        raise KernelError(f"a row of {width} values is too wide: {2 * VECTOR * MOST_THREADS} are supported")
    return min(MOST_THREADS, -(-width // (VECTOR * WARP)) * WARP)


# rope_kv.cu


def rope_kv(
    launch: Launch, qkv: Tensor, tables: tuple[Tensor, Tensor], where: Where, heads: Heads, to: Layer,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    """qkv `[R, (Hq + 2 Hkv) D]` + bias: q is turned in place, k turned and stored, v stored, at each row's position.

    cos and sin are fp32 `[positions, D/2]`, for every position of the cache; pairs are (i, i + D/2). A row whose
    position is not in the cache is left alone. Neighbouring lanes share a head, 16 channels each.
    rope_kv_{t}(T* qkv, const T* bias, const float* cos, const float* sin, const int* positions, const int* slots,
                T* keys, T* values, int heads, int kv_heads, int head_dim, int capacity)
    rope_kv_{t}_kv8: int8_t* keys and values, and after them float* key_scales, float* value_scales: amax / 127.
    """
    _check_heads(heads)
    capacity = to.keys.shape[2]
    lanes = 1 << (heads.dim // 16 - 1).bit_length()
    blocks = -(-(heads.queries + 2 * heads.keys) * lanes // 128)
    for part in _grid_rows(len(qkv)):
        own = qkv[part]
        launch(
            "rope_kv", f"rope_kv_{kind_of(qkv)}{_cached(to)}", (blocks, len(own), 1), 128, 0,
            own, bias, *tables, where.positions[part], where.slots[part], *_parts(to), heads.queries, heads.keys,
            heads.dim, capacity,
        )  # fmt: skip


# attn_decode.cu


class Partial(NamedTuple):
    """What splits of an attention leave: fp32 sums `[R, Hq, S, D]`, and (maximum, sum of weights) `[R, Hq, S, 2]`."""

    sums: Tensor
    stats: Tensor


MOST_SPLITS = 128
BLOCK_HEADS = 8  # query heads of a block of attn_decode, at most
ATTENTION_WARPS = 4
COMBINE_SHARED = 4 * (2 * WARP + MOST_SPLITS + 4 * ATTENTION_WARPS * WARP)  # bytes


def attention_splits(kv_heads: int, capacity: int, processors: int) -> int:
    """Parts that a row's keys are cut into: two blocks a processor, and no part below 64 keys. Rows do not count."""
    return max(1, min(-(-2 * processors // kv_heads), -(-capacity // 64), MOST_SPLITS))


def attention_shared(heads: Heads) -> int:
    """Bytes of shared memory of a block of attn_decode: what its warps know of each query head."""
    together = min(heads.queries // heads.keys, BLOCK_HEADS)
    return 4 * ATTENTION_WARPS * (2 * BLOCK_HEADS + together * heads.dim)


def attn_decode(
    launch: Launch, q: Tensor, where: Where, heads: Heads, cached: Layer, partial: Partial, out: Tensor
) -> None:
    """q, the first Hq D channels of rows `[R, stride]`, over the keys up to each row's position -> out `[R, Hq D]`.

    A block is a split, a key head with up to 8 of its query heads, and a row. The keys of a row are cut evenly into
    gridDim.x parts (rounded up to 32 keys); a part without keys leaves a maximum of -inf and a sum of 0. A row without
    keys gives zeros.
    attn_decode_{t}_d{D}(const T* q, const T* keys, const T* values, const int* positions, const int* slots,
                         const int* begins, float* sums, float* stats, int q_stride, int heads, int kv_heads,
                         int capacity, int window, float scale)
    attn_decode_{t}_d{D}_kv8: int8_t* keys, values, and after stats const float* key_scales, value_scales.
    attn_combine_{t}_d{D}(const float* sums, const float* stats, T* out, int splits); a block a head (x) and row (y).
    """
    _check_heads(heads)
    rows, splits = len(q), partial.sums.shape[2]
    if splits > MOST_SPLITS:
        raise KernelError(f"the keys are in {splits} parts: {MOST_SPLITS} are supported")
    name = f"{kind_of(q)}_d{heads.dim}"
    groups = heads.keys * -(-heads.queries // heads.keys // BLOCK_HEADS)
    threads = ATTENTION_WARPS * WARP
    launch(
        "attn_decode", f"attn_decode_{name}{_cached(cached)}", (splits, groups, rows), threads, attention_shared(heads),
        q, *_parts(cached)[:2], where.positions, where.slots, where.begins, *partial, *_parts(cached)[2:],
        q.stride(0), heads.queries, heads.keys, cached.keys.shape[2], heads.window, heads.scale,
    )  # fmt: skip
    launch(
        "attn_decode", f"attn_combine_{name}", (heads.queries, rows, 1), threads, COMBINE_SHARED,
        *partial, out, splits,
    )  # fmt: skip


# sample.cu

SAMPLE_BLOCKS = 32  # that share a row of logits


class Draw(NamedTuple):
    """What a draw takes and leaves, a value a row: fp32 temperature (0: the likeliest token) and uniform in [0, 1);
    int32 token, fp32 its log-probability before the temperature; fp32 scratch `[R, SAMPLE_BLOCKS, 4]`."""

    temperature: Tensor
    uniform: Tensor
    tokens: Tensor
    logprobs: Tensor
    scratch: Tensor


def sample(launch: Launch, logits: Tensor, draw: Draw, positions: Tensor) -> None:
    """logits `[R, V]`, f16, bf16 or f32 -> a token a row, and positions += 1: the next step's inputs.

    The first of equal logits counts as the likeliest; a draw inverts the distribution at `uniform`. Where logits hold
    NaN or no finite maximum, the log-probability is NaN.
    sample_parts_{t}(const T* logits, const float* temperature, float4* parts, int vocabulary); x blocks a row, y rows
    sample_pick_{t}(const T* logits, const float* temperature, const float* uniform, const float4* parts, int* tokens,
                    float* logprobs, int* positions, int vocabulary, int blocks); a block a row
    """
    rows, vocabulary = logits.shape
    kind = kind_of(logits)
    launch(
        "sample", f"sample_parts_{kind}", (SAMPLE_BLOCKS, rows, 1), 256, 4 * SCRATCH,
        logits, draw.temperature, draw.scratch, vocabulary,
    )  # fmt: skip
    launch(
        "sample", f"sample_pick_{kind}", (rows, 1, 1), 256, 16 * SAMPLE_BLOCKS + 2 * SCRATCH,
        logits, draw.temperature, draw.uniform, draw.scratch, draw.tokens, draw.logprobs, positions, vocabulary,
        SAMPLE_BLOCKS,
    )  # fmt: skip


def _check_heads(heads: Heads) -> None:
    if heads.dim not in HEAD_DIMS:
        raise KernelError(f"heads of {heads.dim} channels: {', '.join(map(str, HEAD_DIMS))} are supported")
    if heads.queries % heads.keys:
        raise KernelError(f"{heads.queries} query heads cannot share {heads.keys} key heads evenly")


def kind_of(x: Tensor) -> str:
    if x.dtype not in DTYPES:
        raise KernelError(f"activations are {x.dtype}; the CUDA kernels take {', '.join(map(str, DTYPES))}")
    return DTYPES[x.dtype]


def _cached(layer: Layer) -> str:
    return "_kv8" if layer.keys.dtype == torch.int8 else ""


def _parts(layer: Layer) -> Sequence[Tensor]:
    return [part for part in layer if part is not None]


def check_multiple(name: str, size: int, of: int) -> None:
    if size % of:
        raise KernelError(f"a {name} of {size} is no multiple of {of}")
