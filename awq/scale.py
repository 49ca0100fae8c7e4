"""The scale search of AWQ (arXiv 2306.00978): inputs that matter get finer weights, and smaller activations.

A linear's weights are multiplied by s before rounding and its inputs divided by s: the function stays, the error moves.
The division is done by whatever comes before, so that nothing is computed at inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from awq.calibrate import Call, Moments, first_tensor, square_error
from awq.options import Options
from awq.rounding import Rounding, row_chunks


@dataclass(frozen=True)
class Layer:
    """A linear under search: its module, its weight `[N, K]` as it came, and what its inputs are."""

    name: str
    module: nn.Linear
    weight: Tensor
    moments: Moments
    clips: bool


@dataclass(frozen=True)
class Inspection:
    """The module that judges a group's scales, and its calls with the weights as they came."""

    module: nn.Module
    calls: Sequence[Call]


@dataclass
class Factors:
    """What the scales make of a block's parameters: rows of a module's output, columns of its input."""

    rows: dict[str, Tensor] = field(default_factory=dict)  # what they are divided by
    columns: dict[str, Tensor] = field(default_factory=dict)

    def add(self, previous: str, linears: Sequence[str], scale: Tensor) -> None:
        """`previous` gives 1/scale of what it gave, and the linears take it back. A module is in one group a side."""
        self.rows[previous] = scale
        self.columns.update(dict.fromkeys(linears, scale))

    def apply(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter `module.weight` or `module.bias` with its factors, in fp32 at least."""
        module, _, kind = name.rpartition(".")
        wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        if module in self.columns and kind == "weight":
            wide = wide * self.columns[module].to(wide)
        if module in self.rows:
            rows = self.rows[module].to(wide)
            wide = wide / (rows[:, None] if wide.ndim == 2 else rows)
        return wide

    def undo(self, module: str, weight: Tensor) -> Tensor:
        """What a weight `[N, K]` with factors does in the units of the block as it came."""
        if module in self.columns:
            weight = weight / self.columns[module]
        return weight * self.rows[module][:, None] if module in self.rows else weight


def search_scale(
    layers: Sequence[Layer], inspection: Inspection | None, rounding: Rounding, options: Options
) -> Tensor | None:
    """The best scale `[K]` of linears that share an input, or None where none is better than leaving them alone.

    Without an inspection the error of the linears' own outputs is taken, over all tokens.
    """
    best, least = None, torch.inf
    for scale in candidates(layers, options, rounding):
        weights = [stand_in(layer, scale, rounding) for layer in layers]
        loss = _replayed(layers, weights, inspection, least) if inspection else _summed(layers, weights)
        if loss < least:
            best, least = scale, loss
    return None if best is None or bool((best == 1).all()) else best


def candidates(layers: Sequence[Layer], options: Options, rounding: Rounding) -> Iterator[Tensor]:
    """The scales `[K]` to try: all ones first, then mean |x| to the power of each ratio of the grid.

    Weight-aware scales divide by the weights' relative magnitude to the power of what is left of 1.
    """
    x = layers[0].moments.mean_magnitude()
    yield torch.ones_like(x)
    if options.scale_grid == 1:
        return
    w = relative_magnitude([layer.weight for layer in layers], rounding) if options.duo else torch.ones_like(x)
    for i in range(0 if options.duo else 1, options.scale_grid):
        ratio = i / options.scale_grid
        scale = (x.pow(ratio) / (w.pow(1 - ratio) + (1e-4 if options.duo else 0))).clamp(min=1e-4)
        yield scale / (scale.max() * scale.min()).sqrt()


def relative_magnitude(weights: Sequence[Tensor], rounding: Rounding) -> Tensor:
    """[N, K] each -> `[K]`: mean over all rows of |w| in parts of its group's largest."""
    total, rows = torch.zeros(weights[0].shape[1], device=weights[0].device), 0
    for weight in weights:
        for piece in row_chunks(weight):
            groups = rounding.groups(piece).abs()
            total += (groups / groups.amax(2, keepdim=True).clamp(min=1e-6)).flatten(1).sum(0)
        rows += len(weight)
    return total / rows


def stand_in(layer: Layer, scale: Tensor, rounding: Rounding) -> Tensor:
    """fp32 `[N, K]`: Q(W s) / s."""
    wide = scale.unflatten(0, (-1, rounding.spec.group(len(scale))))
    out = torch.empty(layer.weight.shape, device=layer.weight.device)
    done = 0
    for rows in row_chunks(layer.weight):
        groups = rounding.groups(rows) * wide
        out[done : done + len(rows)] = rounding.nearest(groups).div_(wide).flatten(1)
        done += len(rows)
    return out


def _summed(layers: Sequence[Layer], weights: Sequence[Tensor]) -> float:
    return sum(layer.moments.error(w.sub_(layer.weight)) for layer, w in zip(layers, weights, strict=True))


def _replayed(layers: Sequence[Layer], weights: Sequence[Tensor], inspection: Inspection, bound: float) -> float:
    """Squared error of the inspected module's output; what is over the bound is over it, and need not be known."""
    for layer, weight in zip(layers, weights, strict=True):
        layer.module.weight = frozen(weight.to(layer.weight.dtype))
    loss = 0.0
    for call in inspection.calls:
        loss += square_error(first_tensor(inspection.module(*call.args, **call.kwargs)), call.output)
        if loss > bound:
            break
    for layer in layers:
        layer.module.weight = frozen(layer.weight)
    return loss


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that shares the tensor's memory and is not trained."""
    return nn.Parameter(tensor, requires_grad=False)
