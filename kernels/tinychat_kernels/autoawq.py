"""The autoawq backend: the kernels of the package autoawq-kernels, where it is installed and fits torch.

They take AWQ's GEMM layout as it lies on disk. Optional, by the extra `autoawq`; they have not run on a GPU here.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from tinychat_kernels.errors import KernelError
from tinychat_kernels.layout import AwqGemm, QuantSpec

SPLITS = 8  # parts of the inputs that AutoAWQ adds up
OUTPUTS = 64  # of a block: what outputs are multiples of


def available() -> tuple[bool, str]:
    """Whether the package imports and there is a GPU for it, or why not."""
    try:
        _extension()
    except KernelError as error:
        return False, str(error)
    if not torch.cuda.is_available():
        return False, "autoawq-kernels imports, but torch finds no CUDA device"
    return True, "the kernels of autoawq-kernels, for float16"


@functools.cache
def _extension() -> ModuleType:
    try:
        return importlib.import_module("awq_ext")
    except ModuleNotFoundError as error:
        raise KernelError("autoawq-kernels is not installed: pip install 'tinychat[autoawq]'") from error
    except ImportError as error:  # made for another torch or CUDA
        raise KernelError(f"autoawq-kernels does not import: {error}") from error


def obstacle(dtype: torch.dtype, packed: AwqGemm, spec: QuantSpec) -> str | None:
    """Why these kernels do not take such a linear; None where they do."""
    outputs = packed.scales.shape[1]
    if dtype != torch.float16 or packed.scales.dtype != torch.float16:
        return f"autoawq-kernels take float16, not {dtype} with scales of {packed.scales.dtype}"
    if outputs % OUTPUTS or spec.bits != 4:
        return f"autoawq-kernels take 4 bits and multiples of {OUTPUTS} outputs, not {spec.bits} bits and {outputs}"
    return None


def w4_linear(x: Tensor, packed: AwqGemm, spec: QuantSpec, bias: Tensor | None = None) -> Tensor:
    """x float16 `[M, K]` times 4-bit weights -> `[M, N]`. Raises KernelError for what the kernels do not take."""
    if (reason := obstacle(x.dtype, packed, spec)) is not None:
        raise KernelError(reason)
    out = _extension().gemm_forward_cuda(x.contiguous(), packed.qweight, packed.scales, packed.qzeros, SPLITS)
    return out if bias is None else out + bias.to(out.dtype)
