"""Linears with packed weights on CUDA: the launches of w4_gemv.cu and w4_gemm.cu, as cuda_ops has those of the others.

Every function takes the launcher first and computes into tensors that are there already. `gemv` serves up to 8 rows,
`gemm` any number; from some number of rows on, `dequantize` and a product of 16-bit numbers are faster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from tinychat_kernels.cuda_layout import TILE, UNIT, Packed
from tinychat_kernels.cuda_ops import DTYPES, WARP, Launch
from tinychat_kernels.errors import KernelError

GEMV_ROWS = 8  # at most
GEMV_WARPS = 8
GEMV_SHARED = 48 << 10  # bytes of a block: what every GPU gives without being asked
ROW_GAP = 8  # values between rows of x in shared memory
PANEL = 64  # inputs
GEMM_COLUMNS = 128  # outputs of a block
STAGES = 3
REDUCE_THREADS = 128
DEQUANTIZE_WARPS = 4


@dataclass(frozen=True, slots=True)
class Block:
    """A block of w4_gemm: its rows, how many panels of 64 inputs it takes a step, and its threads."""

    rows: int
    panels: int
    threads: int

    def shared(self, group: int) -> int:
        """Bytes of shared memory: x, tiles and scales of all stages."""
        inputs = self.panels * PANEL
        groups = max(1, inputs // group)
        return STAGES * (2 * self.rows * inputs + GEMM_COLUMNS * inputs // 2 + GEMM_COLUMNS * groups * 4)


BLOCKS = (Block(16, 2, 256), Block(32, 2, 256), Block(64, 1, 256), Block(128, 1, 256))
LEAST_STEPS = 4  # of a split: below, the copies are not under way long enough


def defines(entry: str) -> tuple[str, ...]:
    """What a compilation for one entry is limited to: its type and group, so that a tenth of the unit is compiled."""
    found = re.fullmatch(r"w[48]_\w+?_(f16|bf16)_g(\d+)(_[mr]\d+)?", entry)
    return (f"TINYCHAT_TYPE={found[1]}", f"TINYCHAT_GROUP={found[2]}") if found else ()


# Up to 8 rows


def gemv_chunk(units: int, rows: int) -> int:
    """Units of inputs that are staged at a time: all, or equal parts that give every warp as many."""
    fits = ((GEMV_SHARED - _gemv_sums(rows)) // (2 * rows) - ROW_GAP) // UNIT
    parts = -(-units // (fits // GEMV_WARPS * GEMV_WARPS))
    return units if units <= fits else -(-units // (parts * GEMV_WARPS)) * GEMV_WARPS


def gemv(launch: Launch, x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor) -> None:
    """x `[M, K]`, M up to 8, times packed weights, plus bias `[N]` -> out `[M, N]`, of x's dtype or fp32.

    Rows of x lie any multiple of 8 values apart. What a row gives depends on that row alone. A block has 16 outputs.
    w{4,8}_gemv_{t}_g{G}_m{1,8}(const T* x, const uint4* words, const uint2* scales, const T* bias, void* out,
                                int rows, int inputs, int outputs, int x_stride, int chunk, int wide)
    """
    rows = len(x)
    if not 1 <= rows <= GEMV_ROWS:
        raise KernelError(f"gemv takes 1 to {GEMV_ROWS} rows, not {rows}")
    _check(x, packed, out)
    chunk = gemv_chunk(packed.units, rows)
    entry = f"w{packed.bits}_gemv_{_of(packed, x)}_m{1 if rows == 1 else GEMV_ROWS}"
    if out.dtype not in (x.dtype, torch.float32):
        raise KernelError(f"gemv gives {x.dtype} or float32, out is {out.dtype}")
    launch(
        "w4_gemv", entry, (packed.words.shape[0], 1, 1), WARP * GEMV_WARPS,
        _gemv_sums(rows) + 2 * rows * (chunk * UNIT + ROW_GAP),
        x, packed.words, packed.scales, bias, out, rows, packed.inputs, packed.outputs, x.stride(0), chunk,
        int(out.dtype == torch.float32),
    )  # fmt: skip


def _gemv_sums(rows: int) -> int:
    return 4 * GEMV_WARPS * TILE * (1 if rows == 1 else GEMV_ROWS)


# Any number of rows


def gemm_block(rows: int) -> Block:
    """The smallest block that takes all rows, or the largest."""
    return next((block for block in BLOCKS if block.rows >= rows), BLOCKS[-1])


def gemm_splits(packed: Packed, rows: int, processors: int) -> int:
    """Parts that the inputs are cut into so that no processor idles; 1 where there are rows and outputs enough.

    The largest blocks leave room for no second one on many GPUs; of the others every processor is given two.
    """
    block = gemm_block(rows)
    blocks = -(-rows // block.rows) * -(-packed.words.shape[0] * TILE // GEMM_COLUMNS)
    steps = packed.units * UNIT // (PANEL * block.panels)
    wanted = processors if block is BLOCKS[-1] else 2 * processors
    return max(1, min(wanted // blocks, steps // LEAST_STEPS))


def gemm_parts(packed: Packed, rows: int, processors: int) -> tuple[int, int, int]:
    """The shape of the fp32 tensor that `gemm` needs beside its inputs; without splits it is empty."""
    splits = gemm_splits(packed, rows, processors)
    return (splits if splits > 1 else 0, rows, packed.words.shape[0] * TILE)


def gemm(
    launch: Launch, x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor, parts: Tensor | None = None
) -> None:
    """x `[M, K]` times packed 4-bit weights, plus bias `[N]` -> out `[M, N]`; parts is fp32 of gemm_parts' shape.

    Without parts the inputs are not split, which leaves processors idle where rows and outputs are few.

    w4_gemm_{t}_g{G}_r{rows}(const T* x, const uint4* words, const uint2* scales, const T* bias, T* out, float* parts,
                             int rows, int inputs, int outputs, int x_stride); grid: rows, outputs, splits
    w4_reduce_{t}_g{G}(const float* parts, const T* bias, T* out, int rows, int outputs, int splits), after splits
    """
    _check(x, packed, out)
    if packed.bits != 4:
        raise KernelError(f"gemm takes weights of 4 bits, not of {packed.bits}")
    rows, kind = len(x), _of(packed, x)
    if out.dtype != x.dtype:
        raise KernelError(f"gemm gives {x.dtype}, out is {out.dtype}")
    splits = 1 if parts is None else max(1, len(parts))
    if parts is not None and tuple(parts.shape[1:]) != (rows, packed.words.shape[0] * TILE):
        raise KernelError(f"parts is {list(parts.shape)}, gemm_parts says what is needed")
    block = gemm_block(rows)
    columns = -(-packed.words.shape[0] * TILE // GEMM_COLUMNS)
    launch(
        "w4_gemm", f"w4_gemm_{kind}_r{block.rows}", (-(-rows // block.rows), columns, splits), block.threads,
        block.shared(packed.group), x, packed.words, packed.scales, bias, out, parts, rows, packed.inputs,
        packed.outputs, x.stride(0),
    )  # fmt: skip
    if splits > 1:
        blocks = -(-packed.outputs // (4 * REDUCE_THREADS))
        launch(
            "w4_gemm", f"w4_reduce_{kind}", (blocks, rows, 1), REDUCE_THREADS, 0, parts, bias, out, rows,
            packed.outputs, splits,
        )  # fmt: skip


def dequantize(launch: Launch, packed: Packed, out: Tensor) -> None:
    """The weight `[N, K]` that packed ones stand for, in f16 or bf16. A warp for 16 outputs of 128 inputs.

    w{4,8}_dequantize_{t}_g{G}(const uint4* words, const uint2* scales, T* out, int inputs, int outputs)
    """
    if tuple(out.shape) != (packed.outputs, packed.inputs) or not out.is_contiguous() or packed.inputs % 8:
        raise KernelError(f"out is {list(out.shape)}, the weights are {packed.outputs}x{packed.inputs}")
    launch(
        "w4_gemm", f"w{packed.bits}_dequantize_{_of(packed, out)}",
        (-(-packed.units // DEQUANTIZE_WARPS), packed.words.shape[0], 1), WARP * DEQUANTIZE_WARPS,
        2 * DEQUANTIZE_WARPS * TILE * (UNIT + ROW_GAP), packed.words, packed.scales, out, packed.inputs,
        packed.outputs,
    )  # fmt: skip


def _of(packed: Packed, x: Tensor) -> str:
    """The part of an entry's name that says the type and the group."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise KernelError(f"x is {x.dtype}; the CUDA kernels take float16 and bfloat16")
    return f"{DTYPES[x.dtype]}_g{packed.group}"


def _check(x: Tensor, packed: Packed, out: Tensor) -> None:
    if x.shape[1] != packed.inputs or tuple(out.shape) != (len(x), packed.outputs):
        shapes = f"x is {list(x.shape)} and out {list(out.shape)}"
        raise KernelError(f"{shapes}, the weights have {packed.inputs} inputs and {packed.outputs} outputs")
    if packed.inputs % 8 or x.stride(0) % 8 or x.stride(1) != 1 or x.data_ptr() % 16:
        raise KernelError(f"rows of x must be whole vectors of 8 values, aligned to 16 bytes; strides are {x.stride()}")
