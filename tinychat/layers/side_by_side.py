"""Linears of one input whose parameters lie side by side in memory are one product.

Whether they lie so is read from the parameters at every call: nothing has to be told when a linear is moved, cast,
filled, copied or replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tinychat.layers.one_call import is_watched


def products(x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
    """x `[..., K]` -> what each linear gives of it."""
    if not _are_plain(linears) or _wants_gradient(x, linears):
        return [module(x) for module in linears]
    plain: Sequence[Any] = linears
    weight, bias = as_one([module.weight for module in plain]), as_one([module.bias for module in plain])
    if weight is None or (bias is None and plain[0].bias is not None):
        return [module(x) for module in linears]
    return linear(x, weight, bias).split([module.out_features for module in plain], dim=-1)


def as_one(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensor `[sum N, ...]` whose parts these are, one after the other; None where they lie otherwise."""
    there = [part for part in parts if part is not None]
    if len(there) < len(parts) or not there[0].numel():
        return None
    first = there[0].detach()
    memory, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in there:
        same = part.dtype == first.dtype and part.untyped_storage().data_ptr() == memory
        if not same or not part.is_contiguous() or part.storage_offset() != end:
            return None
        end += part.numel()
    return first.as_strided((sum(len(part) for part in there), *first.shape[1:]), first.stride())


def _are_plain(linears: Sequence[nn.Module]) -> bool:
    """Whether the linears are torch's own and nothing watches them."""
    if not all(type(module) is nn.Linear and not is_watched(module) for module in linears):
        return False
    made: Sequence[Any] = linears
    return len({(module.in_features, module.bias is None) for module in made}) == 1 and not made[0].weight.is_meta


def _wants_gradient(x: Tensor, linears: Sequence[nn.Module]) -> bool:
    if torch.compiler.is_compiling():  # which takes the modules as they are
        return True
    wanted = x.requires_grad or any(p.requires_grad for module in linears for p in module.parameters())
    return wanted and torch.is_grad_enabled()
