"""8-bit linears on CUDA: the launches of int8_linear.cu, as cuda_ops has those of the others.

Rows are rounded to int8 as they come, behind an activation where one is asked for; products of int8 are exact, and
scaled in fp32. The weights are read as they lie on disk (tinychat_kernels.int8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinychat_kernels.cuda_ops import SCRATCH, Launch, check_multiple, kind_of, row_threads
from tinychat_kernels.errors import KernelError
from tinychat_kernels.int8 import Int8

VECTOR = 16  # int8 values that are copied at once: what inputs are a multiple of
MOST_INPUTS = 16384
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3}
SIDES = (64, 128)  # rows, and outputs, of a block
GEMM_THREADS = 128
STAGES, DEPTH = 3, 64  # that inputs are copied in, and bytes of a row in one


def takes(inputs: int) -> bool:
    """Whether rows of so many values fit the kernels."""
    return inputs % VECTOR == 0 and inputs <= MOST_INPUTS


def activated(x: Tensor, activation: str) -> Tensor:
    """What the kernels round, by plain torch: fp32 behind an activation, x itself where there is none."""
    _check_activation(activation)
    if activation == "none":
        return x
    wide = x.float()
    if activation == "quick_gelu":
        return wide * torch.sigmoid(1.702 * wide)
    return torch.nn.functional.gelu(wide, approximate="tanh" if activation == "gelu_tanh" else "none")


def quantize_rows(launch: Launch, x: Tensor, values: Tensor, scales: Tensor, activation: str = "none") -> None:
    """x `[M, K]`, through an activation -> int8 `[M, K]` and fp32 scales `[M]`, as int8.quantize_tokens.

    K is a multiple of 16, 16,384 at most. A block a row.
    quantize_rows_{t}(const T* x, signed char* values, float* scales, int width, int activation)
    """
    rows, width = x.shape
    check_multiple("width", width, VECTOR)
    _check_activation(activation)
    launch(
        "int8_linear", f"quantize_rows_{kind_of(x)}", (rows, 1, 1), row_threads(width), SCRATCH,
        x, values, scales, width, ACTIVATIONS[activation],
    )  # fmt: skip


def gemm_side(rows: int, outputs: int, processors: int) -> int:
    """The larger of two blocks, which reads less, where there are enough of them for every processor."""
    small, large = SIDES
    return large if -(-rows // large) * -(-outputs // large) >= processors else small


def gemm(launch: Launch, x: Int8, weight: Int8, bias: Tensor | None, out: Tensor, side: int = SIDES[0]) -> None:
    """x int8 `[M, K]` times weight int8 `[N, K]`, both with fp32 scales a row, plus bias `[N]` -> out `[M, N]`.

    Any M and N; K is a multiple of 16.
    int8_gemm_{t}_{side}(const signed char* x, const float* x_scales, const signed char* weight, const float* scales,
                         const T* bias, T* out, int rows, int inputs, int outputs); grid: outputs, rows
    """
    (rows, inputs), outputs = x.weight.shape, len(weight.weight)
    check_multiple("number of inputs", inputs, VECTOR)
    if weight.weight.shape[1] != inputs or tuple(out.shape) != (rows, outputs):
        shapes = f"x is {list(x.weight.shape)} and out {list(out.shape)}"
        raise KernelError(f"{shapes}, the weights are {list(weight.weight.shape)}")
    if {x.scale.dtype, weight.scale.dtype} != {torch.float32}:
        raise KernelError(f"scales are {x.scale.dtype} and {weight.scale.dtype}; the CUDA kernels take float32")
    launch(
        "int8_linear", f"int8_gemm_{kind_of(out)}_{side}", (-(-outputs // side), -(-rows // side), 1), GEMM_THREADS,
        STAGES * 2 * side * DEPTH, *x, *weight, bias, out, rows, inputs, outputs,
    )  # fmt: skip


def linear(
    launch: Launch, x: Tensor, weight: Int8, bias: Tensor | None, out: Tensor, activation: str = "none",
    processors: int = 1,
) -> None:  # fmt: skip
    """x `[M, K]`, through an activation, times 8-bit weights, plus bias `[N]` -> out `[M, N]`."""
    rows = Int8(torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32))
    quantize_rows(launch, x, *rows, activation)
    gemm(launch, rows, weight, bias, out, gemm_side(len(out), out.shape[1], processors))


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise KernelError(f"there is no activation {name!r}; known are {', '.join(ACTIVATIONS)}")
