"""Layers whose weights are split over the ranks of a group (Megatron-LM, arXiv 1909.08053); a group of one is plain.

A linear that is split by outputs ("column") gives a rank's part of the channels; one that is split by inputs ("row")
takes such a part and gives one addend of a sum: `total` adds them up. A row linear's bias is rank 0's alone.

`weights` is a tinychat.checkpoint.Weights, from which a layer takes its part of the named tensors at once; without it,
or with `Later`, the parameters stay empty for a loader to fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tinychat.errors import ModelError
from tinychat.layers.local_ranks import LocalRanks

MOST_NAMED = 64  # ranks, in an error


class Group(Protocol):
    """The ranks that share a layer: torch.distributed's ProcessGroup, or LocalRanks."""

    def rank(self) -> int: ...
    def size(self) -> int: ...


class Alone:
    """The group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


ALONE: Group = Alone()


class WeightSource(Protocol):
    """What the layers ask of tinychat.checkpoint.Weights."""

    @property
    def group(self) -> Group | None: ...
    def get(self, name: str) -> Tensor: ...
    def get_sharded(self, name: str, dim: int) -> Tensor: ...
    def get_multi_sharded(self, names: Sequence[str], dim: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Later:
    """No weights yet: parameters have the sizes of a rank's share."""

    group: Group = ALONE


Source = WeightSource | Later | None


def group_of(weights: Source) -> Group:
    return (weights.group if weights is not None else None) or ALONE


def column_linear(prefix: str, inputs: int, outputs: int, weights: Source, bias: bool = True) -> nn.Linear:
    """A linear split by output rows (dimension 0 of weight and bias). Raises ModelError for outputs that do not divide.

    Its result is this rank's part of the channels.
    """
    linear = _linear(inputs, share(outputs, group_of(weights), f"outputs of {prefix}"), weights, bias)
    fill(linear.weight, weights, f"{prefix}.weight", 0)
    if bias:
        fill(linear.bias, weights, f"{prefix}.bias", 0)
    return linear


def column_linears(
    prefix: str, names: Sequence[str], inputs: int, outputs: int, weights: Source, bias: bool = True
) -> list[nn.Linear]:
    """Linears of one input, each split by output rows; filled from a checkpoint, their parts lie side by side."""
    part = share(outputs, group_of(weights), f"outputs of {prefix}.{names[0]}")
    linears = [_linear(inputs, part, weights, bias) for _ in names]
    if weights is None or isinstance(weights, Later):
        return linears
    for kind in ("weight", "bias") if bias else ("weight",):
        whole = weights.get_multi_sharded([f"{prefix}.{name}.{kind}" for name in names], 0)
        for linear, name, own in zip(linears, names, whole.chunk(len(names)), strict=True):
            _put(getattr(linear, kind), own, f"{prefix}.{name}.{kind}")
    return linears


def row_linear(prefix: str, inputs: int, outputs: int, weights: Source, bias: bool = True) -> nn.Linear:
    """A linear split by input columns (dimension 1 of the weight). Raises ModelError for inputs that do not divide.

    Its result is an addend: `total` gives the sum. The bias is added on rank 0, the others hold zeros.
    """
    group = group_of(weights)
    linear = _linear(share(inputs, group, f"inputs of {prefix}"), outputs, weights, bias)
    fill(linear.weight, weights, f"{prefix}.weight", 1)
    if bias and group.rank() == 0:
        fill(linear.bias, weights, f"{prefix}.bias")
    elif bias:
        nn.init.zeros_(linear.bias)
    return linear


def replicated(module: nn.Module, prefix: str, weights: Source) -> nn.Module:
    """A module whose own parameters every rank holds whole."""
    for name, parameter in module.named_parameters(recurse=False):
        fill(parameter, weights, f"{prefix}.{name}")
    return module


def fill(parameter: Tensor, weights: Source, name: str, dim: int | None = None) -> None:
    """Make a named tensor, or this rank's part of it along `dim`, the data of a parameter, in the source's dtype.

    Raises ModelError where it has another shape.
    """
    if weights is None or isinstance(weights, Later):
        return
    _put(parameter, weights.get(name) if dim is None else weights.get_sharded(name, dim), name)


def dotted(prefix: str, name: str) -> str:
    """A name under a prefix, which may be empty."""
    return f"{prefix}.{name}" if prefix else name


def share(length: int, group: Group, what: str) -> int:
    """A rank's equal part of a length. Raises ModelError where the ranks do not divide it."""
    if length % group.size():
        fitting = ", ".join(str(n) for n in range(1, min(length, MOST_NAMED) + 1) if length % n == 0)
        raise ModelError(f"{group.size()} ranks do not divide the {length} {what}", f"take one of {fitting}")
    return length // group.size()


def total(x: Tensor, group: Group) -> Tensor:
    """The sum of every rank's x, on every rank. Over several ranks it carries no gradient, and x is overwritten."""
    if group.size() == 1:
        return x
    x = x.detach().contiguous()
    if isinstance(group, LocalRanks) and group.takes(x):
        group.sum(x)
        return x
    import torch.distributed as dist

    dist.all_reduce(x, group=_process_group(group))
    return x


def joined(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """Every rank's `[..., n]`, n its own of `sizes`, side by side `[..., N]` on every rank, without a gradient."""
    if group.size() == 1:
        return x
    if isinstance(group, LocalRanks) and group.takes(x):
        return group.gather(x.detach().contiguous(), sizes)
    import torch.distributed as dist

    widest = max(sizes)
    own = nn.functional.pad(x.detach(), (0, widest - x.shape[-1])).contiguous()
    parts = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(parts, own, group=_process_group(group))
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)


def _process_group(group: Group) -> Any:
    return group.process_group if isinstance(group, LocalRanks) else group


def _linear(inputs: int, outputs: int, weights: Source, bias: bool) -> nn.Linear:
    """An nn.Linear; no numbers are drawn for parameters that are filled at once."""
    if weights is None or isinstance(weights, Later):
        return nn.Linear(inputs, outputs, bias=bias)
    linear = skip_init(nn.Linear, inputs, outputs, bias=bias)
    assert isinstance(linear, nn.Linear)
    return linear


def _put(parameter: Tensor, tensor: Tensor, name: str) -> None:
    if tensor.shape != parameter.shape:
        message = f"{name} is {list(tensor.shape)}, {list(parameter.shape)} is needed"
        raise ModelError(message, "check that config.json and the weights belong together")
    parameter.data = tensor
