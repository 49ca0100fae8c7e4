"""The CUDA ops that torch knows: `torch.ops.tinychat.*`, with what torch.compile and CUDA graphs need of them.

On tensors of another device the same ops are computed by plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinychat_kernels.cuda_layout import Packed


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
