"""Packed linears for tests of the CUDA kernels: random ones, what they stand for, and a kernel's check against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from emulated import GuardedLaunch, numbers, relative
from torch import Tensor

from tinychat_kernels import cuda_layout, cuda_linear
from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.layout import QuantSpec, dequantize, quantize

TOLERANCE = 5e-3
ROUNDED = 3e-3  # of weights that are products in 16 bits
PROCESSORS = 16


@dataclass(frozen=True)
class Linear:
    """Packed weights, and what they stand for, `[N, K]` in float64."""

    packed: Packed
    weight: Tensor


def linear(outputs: int, inputs: int, group: int, scale: torch.dtype = torch.float16, seed: int = 0) -> Linear:
    spec = QuantSpec(group_size=group)
    logical = quantize(numbers(outputs, inputs, dtype=scale, seed=seed), spec)
    return Linear(cuda_layout.pack(logical, spec), dequantize(logical, torch.float64))


def linear8(outputs: int, inputs: int, groups: int = 1) -> Linear:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scales = numbers(outputs, groups).abs() + 0.01
    return Linear(cuda_layout.pack_int8(q, scales), q.double() * scales.double().repeat_interleave(inputs // groups, 1))


def check_gemv(
    launch: GuardedLaunch, of: Linear, rows: int, dtype: torch.dtype, heavy: bool = False, wide: bool = False
) -> Tensor:
    outputs, inputs = of.weight.shape
    x, bias = numbers(rows, inputs, dtype=dtype, heavy=heavy), numbers(outputs, dtype=dtype, seed=1)
    out = torch.full((rows, outputs), float("nan"), dtype=torch.float32 if wide else dtype)
    cuda_linear.gemv(launch, x, of.packed, bias, out)
    assert relative(out, x.double() @ of.weight.T + bias) <= (1e-6 if wide else TOLERANCE)
    return out


def check_gemm(launch: GuardedLaunch, of: Linear, rows: int, dtype: torch.dtype, heavy: bool = False) -> Tensor:
    outputs, inputs = of.weight.shape
    x, bias = numbers(rows, inputs, dtype=dtype, heavy=heavy), numbers(outputs, dtype=dtype, seed=1)
    out = torch.full((rows, outputs), float("nan"), dtype=dtype)
    parts = torch.full(cuda_linear.gemm_parts(of.packed, rows, PROCESSORS), float("nan"))
    cuda_linear.gemm(launch, x, of.packed, bias, out, parts)
    assert relative(out, x.double() @ of.weight.T + bias) <= TOLERANCE
    return out


def check_dequantize(launch: GuardedLaunch, of: Linear, dtype: torch.dtype) -> Tensor:
    out = torch.full(of.weight.shape, float("nan"), dtype=dtype)
    cuda_linear.dequantize(launch, of.packed, out)
    assert relative(out, of.weight) <= ROUNDED
    return out
