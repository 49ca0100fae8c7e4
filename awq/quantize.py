"""One decoder block through AWQ: statistics, scales, clips, rounding, and the proof that it was worth it.

Nothing here knows a runtime: a block is any module whose linears a recipe names, `run` runs it on a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from awq.calibrate import Emit, Inputs, Moments, Run, Sample, collect, square_error
from awq.clip import clipped, search_clip
from awq.compensate import Dependence, compensated
from awq.errors import RecipeError, WeightsError
from awq.options import Options
from awq.recipes import Recipe, ScaleGroup
from awq.rounding import Rounding
from awq.scale import Factors, Inspection, Layer, frozen, search_scale
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import Logical, dequantize

__all__ = ["BlockResult", "LinearLoss", "Options", "quantize_block"]


class LinearLoss(NamedTuple):
    """Mean squared error of an output over the calibration tokens: rounded to nearest, and by AWQ."""

    rtn: float
    awq: float


@dataclass(frozen=True)
class BlockResult:
    """A quantized block. `weights` are its linears; `tensors` its other parameters as they must be stored now.

    `scales` (previous, linears, `[K]`) and `clips` (`[N, K/G]` by linear) are what was applied: none where kept is
    "rtn". `losses` are those of each linear's output, `block_loss` that of the block on the sample.
    """

    weights: dict[str, Logical]
    tensors: dict[str, Tensor]
    scales: list[tuple[str, tuple[str, ...], Tensor]]
    clips: dict[str, Tensor]
    losses: dict[str, LinearLoss]
    block_loss: LinearLoss
    kept: str


@dataclass(frozen=True)
class _Rounded:
    """A block's parameters as a checkpoint would hold them, and the error of each linear's output."""

    weights: dict[str, Logical]
    tensors: dict[str, Tensor]
    clips: dict[str, Tensor]
    errors: dict[str, float]


@torch.no_grad()
def quantize_block(
    block: nn.Module, run: Run, inputs: Inputs, recipe: Recipe, options: Options, *, seed: int,
    emit: Emit | None = None, stored: Mapping[str, torch.dtype] | None = None,
) -> BlockResult:  # fmt: skip
    """Search, round and keep what is better on the inputs; the block then holds the weights that it was rounded to.

    inputs: hidden states, a sequence `[T, D]` a tensor, no padding; run(block, `[T, D]`) -> `[T, D]`. They are read
    once. emit(i, `[T, D]`) is given the block's outputs before rounding, which the next block is to be fitted to.
    `stored` names the dtypes that parameters are stored in, other than options.dtype, where they stay floats.
    Raises RecipeError, WeightsError and CalibrationError, before the block is changed.
    """
    layers, rounding = _prepare(block, recipe, options, seed)
    original = {name: parameter.detach() for name, parameter in block.named_parameters()}
    groups = [group for group in recipe.groups if _fits(block, group)]
    inspected = {g.inspect: block.get_submodule(g.inspect) for g in groups if g.linears != (g.inspect,)}
    moments = {name: layer.moments for name, layer in layers.items()}
    sample = collect(block, run, inputs, moments, inspected, options.loss_tokens, emit)
    factors, scales = _search_scales(groups, layers, inspected, sample, rounding, options)

    kinds = dict.fromkeys(original, rounding.dtype) | dict(stored or {})
    nearest = _round(original, kinds, layers, Factors(), rounding, None)
    rtn = _try(block, run, sample, nearest)
    searched = _round(original, kinds, layers, factors, rounding, options)
    awq = _try(block, run, sample, searched)
    kept = "awq" if awq < rtn else "rtn"  # false for NaN as well
    if kept == "rtn":
        _install(block, nearest)
    result = searched if kept == "awq" else replace(nearest, clips={})
    losses = {name: LinearLoss(nearest.errors[name], searched.errors[name]) for name in layers}
    applied = scales if kept == "awq" else []
    return BlockResult(result.weights, result.tensors, applied, result.clips, losses, LinearLoss(rtn, awq), kept)


def _prepare(block: nn.Module, recipe: Recipe, options: Options, seed: int) -> tuple[dict[str, Layer], Rounding]:
    """The linears with empty sums, all checked. Those of a group share their sums."""
    linears = {name: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    _check_recipe(block, recipe, linears)
    for name, parameter in block.named_parameters():
        if not torch.isfinite(parameter).all():
            raise WeightsError(f"{name} holds NaN or Inf values", "check the checkpoint's weights")
    dtype = options.dtype or next(iter(linears.values())).weight.dtype
    rounding = Rounding(options.spec, dtype)
    inputs_of = {name: group.linears[0] for group in recipe.groups for name in group.linears}
    sums: dict[str, Moments] = {}
    layers = {}
    for name, linear in linears.items():
        width = _group(name, linear, options)
        shared = inputs_of.get(name, name)
        if shared not in sums:
            size, place = (linear.in_features, width, options.sketch_rows), linear.weight.device
            sums[shared] = Moments(*size, seed, place, pairs=options.compensate)
        clips = options.clip and name not in recipe.unclipped
        layers[name] = Layer(name, linear, linear.weight.detach(), sums[shared], clips)
    return layers, rounding


def _check_recipe(block: nn.Module, recipe: Recipe, linears: Mapping[str, nn.Linear]) -> None:
    modules = dict(block.named_modules())
    named = {name for group in recipe.groups for name in (group.previous, group.inspect)}
    wanted = {name for group in recipe.groups for name in group.linears}
    if missing := sorted((named - modules.keys()) | (wanted - linears.keys())):
        raise RecipeError(f"the block has no {', '.join(missing)}", "use the recipe of its architecture")


def _group(name: str, linear: nn.Linear, options: Options) -> int:
    try:
        return options.spec.group(linear.in_features)
    except LayoutError as error:
        raise WeightsError(f"{name} cannot be quantized: {error}", "choose another group size") from error


def _fits(block: nn.Module, group: ScaleGroup) -> bool:
    """Whether `previous` puts out just what the linears take in: not so for the values of grouped-query attention."""
    width = block.get_submodule(group.linears[0]).in_features
    return block.get_parameter(f"{group.previous}.weight").shape[0] == width


def _search_scales(
    groups: list[ScaleGroup], layers: Mapping[str, Layer], inspected: Mapping[str, nn.Module], sample: Sample,
    rounding: Rounding, options: Options,
) -> tuple[Factors, list[tuple[str, tuple[str, ...], Tensor]]]:  # fmt: skip
    """Each group by itself: a scale leaves the block's function alone, so that the order does not matter."""
    factors, scales = Factors(), []
    for group in groups:
        module = inspected.get(group.inspect)
        inspection = Inspection(module, sample.calls.pop(group.inspect)) if module else None
        scale = search_scale([layers[name] for name in group.linears], inspection, rounding, options)
        if scale is not None:
            factors.add(group.previous, group.linears, scale)
            scales.append((group.previous, group.linears, scale))
    return factors, scales


def _round(
    original: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype], layers: Mapping[str, Layer], factors: Factors,
    rounding: Rounding, options: Options | None,
) -> _Rounded:  # fmt: skip
    """The parameters with their factors, rounded; with options the linears are clipped first. Floats become `kinds`."""
    out, inputs = _Rounded({}, {}, {}, {}), dict[int, Dependence]()
    for name, parameter in original.items():
        wide, module = factors.apply(name, parameter), name.rpartition(".")[0]
        if module not in layers or not name.endswith(".weight"):
            out.tensors[name] = wide.to(kinds[name])
            continue
        layer = layers[module]
        scale = factors.columns.get(module, torch.ones_like(layer.moments.magnitude))
        within = wide
        if options and layer.clips:
            out.clips[module] = search_clip(wide, scale, layer.moments, rounding, options)
            within = clipped(wide, out.clips[module])
        out.weights[module] = rounding.logical(within)
        if options and options.compensate:
            if id(layer.moments) not in inputs:  # else the linear reads the same as the one before it
                inputs = {id(layer.moments): Dependence.of(layer.moments.products(scale))}
            depend = inputs[id(layer.moments)]
            out.weights[module] = compensated(wide, depend, out.weights[module], rounding)
        effective = factors.undo(module, dequantize(out.weights[module], torch.float32))
        out.errors[module] = layer.moments.error(effective - layer.weight)
    return out


def _install(block: nn.Module, rounded: _Rounded) -> None:
    """Let the block's parameters be what the rounded ones stand for."""
    for name, parameter in list(block.named_parameters()):
        module, _, kind = name.rpartition(".")
        if name in rounded.tensors:
            value = rounded.tensors[name].to(parameter.dtype)
        else:
            value = dequantize(rounded.weights[module], parameter.dtype).contiguous()
        setattr(block.get_submodule(module), kind, frozen(value))


def _try(block: nn.Module, run: Run, sample: Sample, rounded: _Rounded) -> float:
    """Mean squared error of the block's output on the sample, with rounded parameters installed."""
    _install(block, rounded)
    pairs = zip(sample.hidden, sample.output, strict=True)
    total = sum(square_error(run(block, hidden), output) for hidden, output in pairs)
    return total / sum(output.numel() for output in sample.output)
