"""What a block's linears see: sums over all calibration tokens, and a few whole sequences to run modules on.

An error that is linear in the weights is a quadratic form: sum over tokens of (x . d)^2 = d^T (sum of x x^T) d. Sums
therefore replace the activations, wherever no module has to be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from awq.errors import CalibrationError

Run = Callable[[nn.Module, Tensor], Tensor]
Emit = Callable[[int, Tensor], None]


class Inputs(Protocol):
    """Hidden states, one sequence `[T, D]` a tensor, without padding."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...


class Gram:
    """Sums of x x^T of each group of inputs: errors over all tokens, exactly."""

    def __init__(self, groups: int, width: int, device: torch.device) -> None:
        self.total = torch.zeros(groups, width, width, device=device)

    def add(self, x: Tensor) -> None:
        """x fp32 `[T, B, G]`."""
        self.total.baddbmm_(x.permute(1, 2, 0), x.transpose(0, 1))

    def error(self, delta: Tensor) -> Tensor:
        """[N, B, G] -> `[N, B]`: sum over tokens of (x . delta)^2."""
        d = delta.transpose(0, 1)
        return (torch.bmm(d, self.total) * d).sum(2).clamp_(min=0).T


class Sketch:
    """`rows` sums of tokens with random signs (a count sketch): errors over all tokens without bias.

    The sums stand for the tokens because products of different signs are zero on average. Up to `rows` tokens each has
    its own sum, and errors are exact. It costs rows x K numbers where a Gram matrix would cost K x K.
    """

    def __init__(self, rows: int, groups: int, width: int, signs: torch.Generator, device: torch.device) -> None:
        self.sums = torch.zeros(rows, groups, width, device=device)
        self.signs = signs
        self.next = 0

    def add(self, x: Tensor) -> None:
        """x fp32 `[T, B, G]`."""
        while len(x):
            piece, x = x[: len(self.sums) - self.next], x[len(self.sums) - self.next :]
            sign = torch.randint(0, 2, (len(piece), 1, 1), generator=self.signs).mul_(2).sub_(1)
            self.sums[self.next : self.next + len(piece)] += piece * sign.to(piece)
            self.next = (self.next + len(piece)) % len(self.sums)

    def error(self, delta: Tensor) -> Tensor:
        """[N, B, G] -> `[N, B]`: an estimate of the sum over tokens of (x . delta)^2."""
        return torch.bmm(delta.transpose(0, 1), self.sums.permute(1, 2, 0)).square_().sum(2).T


class Moments:
    """Sums over the inputs `[T, K]` of a linear: mean magnitudes, and what its error is for any change of weights."""

    def __init__(
        self, features: int, width: int, rows: int, seed: int, device: torch.device, pairs: bool = False
    ) -> None:
        """`pairs`: sums of the products of all inputs are kept as well, however many there are."""

        def form(groups: int, size: int) -> Gram | Sketch:
            if size <= rows:
                return Gram(groups, size, device)
            return Sketch(rows, groups, size, torch.Generator().manual_seed(seed), device)

        self.count = 0
        self.magnitude = torch.zeros(features, device=device)
        self.whole = form(1, features)
        self.grouped = form(features // width, width) if width < features else self.whole
        needed = pairs and not isinstance(self.whole, Gram)
        self.pairs = Gram(1, features, device) if needed else self.whole

    def add(self, x: Tensor) -> None:
        """x `[..., K]`."""
        x = x.detach().flatten(0, -2).float()
        self.count += len(x)
        self.magnitude += x.abs().sum(0)
        for form in {id(form): form for form in (self.whole, self.grouped, self.pairs)}.values():
            form.add(x.unflatten(1, _shape(form)))

    def mean_magnitude(self) -> Tensor:
        """[K]: mean |x| of each input."""
        return self.magnitude / self.count

    def group_errors(self, delta: Tensor) -> Tensor:
        """[N, B, G] -> `[N, B]`: mean over tokens of (x . delta)^2, each group by itself."""
        return self.grouped.error(delta) / self.count

    def products(self, scale: Tensor) -> Tensor:
        """`[K, K]`: mean of x x^T of the inputs divided by scale `[K]`. Only with `pairs`."""
        assert isinstance(self.pairs, Gram)
        return self.pairs.total[0] / (scale[:, None] * scale).mul_(self.count)

    def error(self, delta: Tensor) -> float:
        """[N, K] -> mean square of the output's change when the weights change by delta."""
        return float(self.whole.error(delta.float()[:, None]).mean()) / self.count


def _shape(form: Gram | Sketch) -> tuple[int, ...]:
    return tuple(form.total.shape[:2] if isinstance(form, Gram) else form.sums.shape[1:])


@dataclass(frozen=True)
class Call:
    """How a module was called, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass
class Sample:
    """Some sequences with the block's output of each, and the calls of the modules that they ran through."""

    hidden: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(len(hidden) for hidden in self.hidden)


def collect(
    block: nn.Module, run: Run, inputs: Inputs, moments: Mapping[str, Moments], inspected: Mapping[str, nn.Module],
    budget: int | None, emit: Emit | None,
) -> Sample:  # fmt: skip
    """Run every sequence once: sums for each linear of `moments`, and a sample of about `budget` tokens, evenly spread.

    Linears that share an input share one Moments. `emit(i, output)` is given the block's output of sequence i.
    Raises CalibrationError for no inputs, for other shapes than `[T, D]`, and for NaN or Inf.
    """
    if not len(inputs):
        raise CalibrationError("there are no calibration inputs", "give at least one sequence")
    first = {id(sums): name for name, sums in reversed(list(moments.items()))}
    sample = Sample(calls={name: [] for name in inspected})
    for i, hidden in enumerate(inputs):
        _check_shape(hidden, i)
        chosen = budget is None or sample.tokens < budget * (i + 1) / len(inputs)
        with ExitStack() as hooks:
            for name in first.values():
                count = partial(_count, moments[name], name, i)
                hooks.callback(block.get_submodule(name).register_forward_pre_hook(count).remove)
            for name, module in inspected.items() if chosen else ():
                record = partial(_record, sample.calls[name])
                hooks.callback(module.register_forward_hook(record, with_kwargs=True).remove)
            output = run(block, hidden)
        if chosen:
            sample.hidden.append(hidden.clone())  # emit may write over the inputs
            sample.output.append(output)
        if emit is not None:
            emit(i, output)
    return sample


def _check_shape(hidden: Tensor, i: int) -> None:
    if hidden.ndim != 2 or not len(hidden):
        raise CalibrationError(f"calibration sequence {i} has shape {list(hidden.shape)}", "give [T, D] with T > 0")


def _count(moments: Moments, name: str, i: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if not torch.isfinite(args[0]).all():
        raise CalibrationError(
            f"calibration sequence {i} gives {name} inputs that are NaN or Inf",
            "check the weights before it, or calibrate in float32 or bfloat16",
        )
    moments.add(args[0])


def _record(calls: list[Call], _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    calls.append(Call(args, kwargs, first_tensor(out)))


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def square_error(a: Tensor, b: Tensor) -> float:
    """Sum of squared differences, taken in fp32."""
    return float((a.float() - b.float()).square_().sum())
