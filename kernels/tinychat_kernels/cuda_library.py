"""The CUDA ops that torch knows: `torch.ops.tinychat.*`, with what torch.compile and CUDA graphs need of them.

On tensors of another device the same ops are computed by plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.int8 import Int8


@torch.library.custom_op("tinychat::linear", mutates_args=())
def linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    inputs: int,
    outputs: int,
    group: int,
    scale: torch.dtype,
) -> Tensor:
    """x `[M, K]` times the weights of cuda_layout.Packed, plus bias `[N]` -> `[M, N]`."""
    from tinychat_kernels import cuda

    return cuda.compute(x, Packed(words, scales, inputs, outputs, group, scale), bias)


@linear.register_fake
def _(  # the same arguments
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    inputs: int,
    outputs: int,
    group: int,
    scale: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


@torch.library.custom_op("tinychat::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x `[M, K]`, through an activation, times int8 weight `[N, K]` with fp32 scales `[N]`, plus bias -> `[M, N]`."""
    from tinychat_kernels import cuda

    return cuda.compute_int8(x, Int8(weight, scale), bias, activation)


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
