"""Weights for the CUDA kernels: a loaded model's 4-bit linears, one after the other, and its head in 8 bits.

They are packed on the GPU that they were loaded to, where that takes moments; at no time are two forms of more than one
linear held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinychat.errors import ModelError
from tinychat_kernels import registry
from tinychat_kernels.errors import LayoutError

if TYPE_CHECKING:
    from tinychat.load import Source
    from tinychat.placement import Placement

HEAD, EMBEDDINGS = "llm.lm_head", "llm.model.embed_tokens"
HALF = (torch.float16, torch.bfloat16)


def applies(source: Source, placement: Placement) -> bool:
    """Whether the CUDA kernels have a part in a model that is placed like this.

    Raises KernelError for a TINYCHAT_BACKEND that does not run there.
    """
    from tinychat_kernels.cuda_gpu import current

    if placement.main_device.type != "cuda" or placement.dequantize or source.spec is None:
        return False
    with current(placement.main_device):
        return registry.chosen("cuda").name == "cuda"


def prepare(model: nn.Module, source: Source, placement: Placement) -> None:
    """Pack what the kernels take; what they do not take stays as it is. Raises ModelError for a head of NaN or Inf."""
    from tinychat.layers.linear import QuantLinear
    from tinychat_kernels import cuda

    head: Any = model.get_submodule(HEAD)
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.scales.is_cuda and _takes(head.weight.dtype, module):
            _pack(module)
    on_gpu = isinstance(head, nn.Linear) and head.bias is None and head.weight.is_cuda
    if on_gpu and placement.head == "int8" and cuda.obstacle(head.weight.dtype, head.weight.device) is None:
        model.set_submodule(HEAD, _rounded(model, head, source))


def _takes(dtype: torch.dtype, linear: Any) -> bool:
    from tinychat_kernels import cuda

    return cuda.obstacle(dtype, linear.scales.device) is None


def _pack(linear: Any) -> None:
    """Scales that 16 bits do not hold keep a linear as it is."""
    try:
        linear.prepare()
    except LayoutError:
        return


def _rounded(model: nn.Module, head: nn.Linear, source: Source) -> nn.Module:
    """The head in 8 bits. Its float weight is the embeddings', or is read from the files where it is asked for."""
    from tinychat.layers.head import PackedHead
    from tinychat_kernels import cuda

    try:
        packed = cuda.quantize_head(head.weight.detach())
    except LayoutError as error:
        raise ModelError(f"{HEAD}: {error}", "check the weights, or keep them with --head float") from error
    table: Any = model.get_submodule(EMBEDDINGS)
    tied = head.weight is table.weight
    read: Callable[[], Tensor] = functools.partial(_weight, table)
    if not tied:
        read = functools.partial(_read, source, head.weight.dtype, head.weight.device)
    return PackedHead(packed, read)


def _weight(table: Any) -> Tensor:
    return table.weight


def _read(source: Source, dtype: torch.dtype, device: torch.device) -> Tensor:
    return source.index.get(f"{HEAD}.weight").to(device, dtype)
