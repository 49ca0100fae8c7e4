"""Linears in floats: several of one input as one product, and on CPUs by oneDNN where torch takes a slower library.

What a module is, where its parameters lie and whether it is watched is read at every call: nothing has to be told when
a linear is moved, cast, filled, copied or replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tinychat.layers.one_call import is_watched

CPU_FACTS = Path("/proc/cpuinfo")
OPERATORS = ("_linear_pointwise", "_is_mkldnn_bf16_supported")
ONE_DNN: Mapping[str, tuple[str, str]] = {  # activation -> what oneDNN calls it
    "gelu": ("gelu", "none"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


def product(x: Tensor, module: nn.Module) -> Tensor:
    """x `[..., K]` -> what the linear gives of it `[..., N]`."""
    return _multiply(x, _weight(module), _bias(module)) if _are_free(x, (module,)) else module(x)


def activated(x: Tensor, module: nn.Module, act: nn.Module, name: str) -> Tensor:
    """x `[..., K]` -> the linear, then the activation of this name, in one where that is possible."""
    if name in ONE_DNN and not is_watched(act) and _are_free(x, (module,)) and _by_one_dnn(x, _weight(module)):
        return _one_dnn(x, _weight(module), _bias(module), *ONE_DNN[name])
    return act(product(x, module))


def products(x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
    """x `[..., K]` -> what each linear gives of it; of those whose parameters lie side by side with one product."""
    if not _are_free(x, linears):
        return [module(x) for module in linears]
    biases = [_bias(module) for module in linears]
    weight, bias = as_one([_weight(module) for module in linears]), as_one(biases)
    if weight is None or (bias is None and any(part is not None for part in biases)):
        return [product(x, module) for module in linears]
    return _multiply(x, weight, bias).split([len(_weight(module)) for module in linears], dim=-1)


def as_one(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensor `[sum N, ...]` whose parts these are, one after the other; None where they lie otherwise."""
    there = [part for part in parts if part is not None]
    if len(there) < len(parts) or not there[0].numel():
        return None
    first = there[0].detach()
    memory, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in there:
        same = part.dtype == first.dtype and part.untyped_storage().data_ptr() == memory
        if not same or not part.is_contiguous() or part.storage_offset() != end or part.shape[1:] != first.shape[1:]:
            return None
        end += part.numel()
    return first.as_strided((sum(len(part) for part in there), *first.shape[1:]), first.stride())


def _are_free(x: Tensor, linears: Sequence[nn.Module]) -> bool:
    """Whether the linears are torch's own, nothing watches them and no gradient is wanted."""
    if torch.compiler.is_compiling() or not all(map(_is_plain, linears)):
        return False
    if x.is_meta or torch.is_autocast_enabled(x.device.type):
        return False
    wanted = x.requires_grad or any(p.requires_grad for module in linears for p in module.parameters())
    return not (wanted and torch.is_grad_enabled())


def _is_plain(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear and "forward" not in vars(module) and not is_watched(module)
    return plain and type(_weight(module)) in (Tensor, nn.Parameter)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _one_dnn(x, weight, bias, "none", "") if _by_one_dnn(x, weight) else linear(x, weight, bias)


def _one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, kind: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], kind)


def _by_one_dnn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the faster one: it takes torch's bfloat16 anyway, and there activations come for nothing."""
    same = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype and x.numel() > 0
    return same and x.shape[-1] == weight.shape[-1] and x.dtype in _faster()


@functools.cache
def _faster() -> frozenset[torch.dtype]:
    """MKL, which torch takes for float32, runs the code of older processors on those that Intel has not made.

    None where torch has not the operators, which are its own affair.
    """
    if not all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS):
        return frozenset()
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return frozenset()
    foreign = CPU_FACTS.exists() and "AuthenticAMD" in CPU_FACTS.read_text("utf-8", "replace")
    halves = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32, *halves} if foreign else halves)


def _weight(module: Any) -> Tensor:
    return module.weight


def _bias(module: Any) -> Tensor | None:
    return module.bias
