"""SmoothQuant (arXiv 2211.10438) for the layers of an encoder: 8-bit weights, and activations rounded token by token.

A few inputs with large values leave the others few of the 8 bits. Inputs are divided by a scale and the weights
multiplied by it, so that both are easy to round; what comes before does the division, and nothing is computed later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from awq.calibrate import Emit, Inputs, Run, square_error
from awq.errors import CalibrationError, OptionsError, RecipeError, WeightsError
from awq.recipes import Recipe, ScaleGroup
from awq.scale import Factors, frozen
from tinychat_kernels.int8 import Int8, quantize_rows
from tinychat_kernels.ref import w8a8_linear

SMALLEST = 1e-5  # of a magnitude that a scale is made from


@dataclass(frozen=True)
class SmoothOptions:
    """How to search.

    grid: exponents 0, 1/grid, ..., 1 are tried besides no scale at all; the paper's is 1/2 everywhere
    tokens: about so many judge a scale, spread over all sequences; whole sequences of as many judge the layer
    bound: a linear whose output's mean squared error is more than this part of its mean square stays as it was
    """

    grid: int = 10
    tokens: int = 1024
    bound: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("grid", "tokens"):
            if getattr(self, name) < 1:
                raise OptionsError(f"{name} is {getattr(self, name)}, it must be 1 or more", f"give a {name} of 1 on")
        if not self.bound > 0:
            raise OptionsError(f"bound is {self.bound}, it must be above 0", "a thousandth is usual")


class Errors(NamedTuple):
    """Mean squared error of an output in parts of its mean square: rounded as it is, and smoothed."""

    plain: float
    smooth: float


class Scale(NamedTuple):
    """`[K]` that `previous` divides by and the linears multiply by, from an exponent of the grid."""

    previous: str
    linears: tuple[str, ...]
    exponent: float
    values: Tensor


@dataclass(frozen=True)
class SmoothResult:
    """A rounded layer. `weights` are its 8-bit linears; `tensors` all its other parameters as they must be stored.

    `errors` are those of each linear's output, `block_error` is that of the layer on whole sequences, with the linears
    of `spared` (too far off in 8 bits) left as they were in both. `scales` are none where kept is "plain".
    """

    weights: dict[str, Int8]
    tensors: dict[str, Tensor]
    scales: list[Scale]
    errors: dict[str, Errors]
    block_error: Errors
    kept: str
    spared: tuple[str, ...]


@dataclass
class _Seen:
    """The inputs of linears: the largest magnitude of each over all tokens, and rows from every sequence."""

    largest: Tensor
    rows: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, count: int, first: int) -> None:
        """x `[..., K]`; about `count` rows are kept, evenly spread, beginning at `first`."""
        x = x.detach().flatten(0, -2).float()
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        step = max(1, len(x) // count)
        self.rows.append(x[first % step :: step][:count].clone())

    @property
    def sample(self) -> Tensor:
        """[T, K]."""
        return torch.cat(self.rows)


class _Rounded(nn.Module):
    """What a linear becomes."""

    def __init__(self, packed: Int8, bias: Tensor | None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias

    def forward(self, x: Tensor) -> Tensor:
        out = w8a8_linear(x.flatten(0, -2), self.packed, self.bias)
        return out.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class _Stored:
    """A layer's parameters as a checkpoint would hold them."""

    weights: dict[str, Int8]
    tensors: dict[str, Tensor]


@torch.no_grad()
def smooth_block(
    block: nn.Module, run: Run, inputs: Inputs, recipe: Recipe, options: SmoothOptions, emit: Emit | None = None,
    stored: Mapping[str, torch.dtype] | None = None,
) -> SmoothResult:  # fmt: skip
    """Search the scales of a layer, round its linears, and keep what is better on the inputs.

    inputs: hidden states, a sequence `[T, D]` a tensor; run(block, `[T, D]`) -> `[T, D]`. They are read once. emit(i,
    `[T, D]`) is given the layer's outputs before rounding. `stored` names the dtypes of parameters on the disk, where
    they stay floats and have another one there. The layer is left unfit for use: its linears are replaced.
    Raises RecipeError, WeightsError and CalibrationError, before it is changed.
    """
    linears = _linears(block, recipe)
    original = {name: parameter.detach() for name, parameter in block.named_parameters()}
    seen, sequences = _look(block, run, inputs, _inputs_of(linears, recipe), options.tokens, emit)
    scales = list(_search(linears, recipe, seen, options))
    factors = Factors()
    for scale in scales:
        factors.add(scale.previous, scale.linears, scale.values)

    errors = {name: _errors(linear, seen[name], factors.columns.get(name)) for name, linear in linears.items()}
    kinds = {name: parameter.dtype for name, parameter in original.items()} | dict(stored or {})
    spared = tuple(name for name, error in errors.items() if not min(error) <= options.bound)
    chosen = [name for name in linears if name not in spared]
    plain, smooth = (_store(original, chosen, found, kinds) for found in (Factors(), factors))
    error = Errors(*(_try(block, run, sequences, original, stored) for stored in (plain, smooth)))
    kept = "smooth" if error.smooth < error.plain else "plain"  # false for NaN as well
    result, applied = (smooth, scales) if kept == "smooth" else (plain, [])
    return SmoothResult(result.weights, result.tensors, applied, errors, error, kept, spared)


def candidates(x: Tensor, w: Tensor, grid: int) -> Iterator[tuple[float, Tensor]]:
    """(exponent, scale `[K]`) for each exponent of the grid, from the largest |x| and |w| of each input.

    max|x|^a / max|w|^(1-a), with the geometric middle of its range at 1. Inputs without values or weights keep theirs.
    """
    silent = (x == 0) | (w == 0)
    for i in range(grid + 1):
        a = i / grid
        scale = x.clamp(min=SMALLEST).pow(a) / w.clamp(min=SMALLEST).pow(1 - a)
        heard = scale[~silent] if bool((~silent).any()) else torch.ones_like(scale)
        scale = scale / (heard.max() * heard.min()).sqrt()
        yield a, torch.where(silent, 1.0, scale)


def _linears(block: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """The layer's linears by name, all checked."""
    modules = dict(block.named_modules())
    linears = {name: part for name, part in modules.items() if isinstance(part, nn.Linear)}
    named = {group.previous for group in recipe.groups} | {name for group in recipe.groups for name in group.linears}
    if missing := sorted(named - modules.keys()):
        raise RecipeError(f"the block has no {', '.join(missing)}", "use the recipe of its architecture")
    for name, parameter in block.named_parameters():
        if not torch.isfinite(parameter).all():
            raise WeightsError(f"{name} holds NaN or Inf values", "check the checkpoint's weights")
    return linears


def _inputs_of(linears: Mapping[str, nn.Linear], recipe: Recipe) -> dict[str, str]:
    """Linear -> the one whose inputs it shares."""
    shared = {name: group.linears[0] for group in recipe.groups for name in group.linears}
    return {name: shared.get(name, name) for name in linears}


@dataclass
class _Sequences:
    """Some whole sequences, with the layer's outputs."""

    hidden: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(hidden) for hidden in self.hidden)


def _look(
    block: nn.Module, run: Run, inputs: Inputs, inputs_of: Mapping[str, str], tokens: int, emit: Emit | None
) -> tuple[dict[str, _Seen], _Sequences]:
    """Run every sequence once: what each linear sees, and some sequences for the layer as a whole."""
    if not len(inputs):
        raise CalibrationError("there are no calibration inputs", "give at least one sequence")
    each = -(-tokens // len(inputs))
    seen = {name: _Seen(torch.zeros((), device=_device(block))) for name in dict.fromkeys(inputs_of.values())}
    sequences, at = _Sequences(), [0]

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.isfinite(args[0]).all():
            message = f"calibration sequence {at[0]} gives {name} inputs that are NaN or Inf"
            raise CalibrationError(message, "check the weights before it")
        seen[name].add(args[0], each, at[0])

    hooks = [block.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in seen]
    try:
        for i, hidden in enumerate(inputs):
            at[0] = i
            output = run(block, hidden)
            if sequences.tokens < tokens * (i + 1) / len(inputs):
                sequences.hidden.append(hidden.clone())  # emit may write over the inputs
                sequences.output.append(output)
            if emit is not None:
                emit(i, output)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: seen[shared] for name, shared in inputs_of.items()}, sequences


def _device(block: nn.Module) -> torch.device:
    return next(block.parameters()).device


class _Judge:
    """The error of one linear's output on its sample."""

    def __init__(self, linear: nn.Linear, seen: _Seen) -> None:
        self.weight, self.x = linear.weight.float(), seen.sample
        self.exact = self.x @ self.weight.T
        self.energy = max(float(self.exact.square().sum()), torch.finfo(torch.float32).tiny)

    def error(self, scale: Tensor | None) -> float:
        """What rounding changes in the output, bias aside, squared, in parts of its square."""
        x, weight = (self.x, self.weight) if scale is None else (self.x / scale, self.weight * scale)
        return square_error(w8a8_linear(x, quantize_rows(weight)), self.exact) / self.energy


def _search(
    linears: Mapping[str, nn.Linear], recipe: Recipe, seen: Mapping[str, _Seen], options: SmoothOptions
) -> Iterator[Scale]:
    """The best scale of each group, where it is better than none; each linear's error counts in parts of its output.

    The groups do not touch each other: a scale leaves what a linear puts out alone, and rounding by rows does not see
    that the rows of a previous linear are divided.
    """
    for group in recipe.groups:
        parts = [linears[name] for name in group.linears]
        if not _fits(linears, group):
            continue
        found = seen[group.linears[0]]
        judges = [_Judge(part, found) for part in parts]
        weights = torch.stack([part.weight.float().abs().amax(0) for part in parts]).amax(0)
        best, least = None, sum(judge.error(None) for judge in judges)
        for exponent, scale in candidates(found.largest, weights, options.grid):
            error = sum(judge.error(scale) for judge in judges)
            if error < least:
                best, least = Scale(group.previous, group.linears, exponent, scale), error
        if best is not None:
            yield best


def _fits(linears: Mapping[str, nn.Linear], group: ScaleGroup) -> bool:
    """Whether `previous`, where it is a linear, puts out just what the linears take in."""
    previous = linears.get(group.previous)
    return previous is None or previous.out_features == linears[group.linears[0]].in_features


def _errors(linear: nn.Linear, seen: _Seen, scale: Tensor | None) -> Errors:
    judge = _Judge(linear, seen)
    plain = judge.error(None)
    return Errors(plain, plain if scale is None else judge.error(scale))


def _store(
    original: Mapping[str, Tensor], chosen: list[str], factors: Factors, kinds: Mapping[str, torch.dtype]
) -> _Stored:
    """The parameters with their factors: the weights of the chosen linears in 8 bits, all others in their `kinds`."""
    out = _Stored({}, {})
    for name, parameter in original.items():
        wide, module = factors.apply(name, parameter), name.rpartition(".")[0]
        if module in chosen and name.endswith(".weight"):
            out.weights[module] = quantize_rows(wide)
        else:
            out.tensors[name] = wide.to(kinds[name])
    return out


def _try(block: nn.Module, run: Run, sequences: _Sequences, original: Mapping[str, Tensor], stored: _Stored) -> float:
    """The relative error of the layer's output, less what goes past it unchanged: the hidden states themselves."""
    for name in original:
        module, _, kind = name.rpartition(".")
        if name in stored.tensors and not isinstance(block.get_submodule(module), _Rounded):
            setattr(block.get_submodule(module), kind, frozen(stored.tensors[name].to(original[name].dtype)))
    for name, packed in stored.weights.items():
        bias = stored.tensors.get(f"{name}.bias")
        block.set_submodule(name, _Rounded(packed, None if bias is None else bias.to(original[f"{name}.bias"].dtype)))
    noise = signal = 0.0
    for hidden, output in zip(sequences.hidden, sequences.output, strict=True):
        noise += square_error(run(block, hidden), output)
        signal += square_error(output, hidden)
    return noise / max(signal, torch.finfo(torch.float32).tiny)
