"""Compensated rounding against the definition: rounding one input, and the best answer of all that are left to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq.compensate import BLOCK, DAMPING, Dependence, compensated
from awq.errors import CalibrationError
from awq.rounding import Rounding
from tinychat_kernels.layout import Logical, QuantSpec, dequantize


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs `[T, K]` of which a few directions hold the most."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, width // 8, generator=generator) @ torch.randn(width // 8, width, generator=generator)
    return few + 0.3 * torch.randn(tokens, width, generator=generator)


def weights(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(7)) * 0.1


def rounded(weight: Tensor, x: Tensor, spec: QuantSpec) -> tuple[Logical, Logical]:
    """To the nearest, and compensated."""
    rounding = Rounding(spec, torch.float16)
    grid = rounding.logical(weight)
    return grid, compensated(weight, Dependence.of(x.T @ x / len(x)), grid, rounding)


def by_definition(weight: Tensor, x: Tensor, grid: Logical, spec: QuantSpec) -> Tensor:
    """q `[K, N]`: after each rounding the inputs that are left solve for the least damped square error, in float64."""
    width = weight.shape[1]
    gram = (x.T @ x / len(x)).double()
    gram += DAMPING * gram.diagonal().mean() * torch.eye(width)
    left = torch.argsort((x.T @ x / len(x)).diagonal(), descending=True, stable=True).tolist()
    rest, q = weight.double().clone(), torch.zeros(width, len(weight))
    while left:
        at = left.pop(0)
        scale, zero = (part[at // spec.group(width)].double() for part in (grid.scale, grid.zero))
        q[at] = (rest[:, at] / scale + zero).round().clamp(0, spec.max_q)
        error = rest[:, at] - (q[at] - zero) * scale
        if left:
            rest[:, left] += error[:, None] * torch.linalg.solve(gram[left][:, left], gram[left, at])
    return q.to(torch.uint8)


def output_error(logical: Logical, weight: Tensor, x: Tensor) -> float:
    return float((x @ (dequantize(logical, torch.float32) - weight).T).square().mean())


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 32, zero_point=False), QuantSpec(4, -1)])
def test_it_is_what_the_definition_says(spec: QuantSpec) -> None:
    """Over more inputs than a block; a tie in float32 may fall the other way."""
    width = BLOCK + 64
    weight, x = weights(24, width), correlated(400, width)
    grid, found = rounded(weight, x, spec)
    expected = by_definition(weight, x, grid, spec)
    assert (found.q != expected).float().mean() < 0.01
    assert torch.equal(found.scale, grid.scale)
    assert torch.equal(found.zero, grid.zero)


@pytest.mark.parametrize("bits", [3, 4])
def test_inputs_that_go_together_make_up_for_each_other(bits: int) -> None:
    """On tokens that were not looked at."""
    weight, (x, unseen) = weights(32, 256), correlated(4000, 256).chunk(2)
    nearest, found = rounded(weight, x, QuantSpec(bits, 64))
    assert output_error(found, weight, unseen) < 0.5 * output_error(nearest, weight, unseen)


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest() -> None:
    weight = weights(16, 64)
    nearest, found = rounded(weight, torch.diag(torch.arange(1.0, 65.0)), QuantSpec(4, 32))
    assert torch.equal(found.q, nearest.q)


def test_silent_inputs_do_no_harm() -> None:
    weight, x = weights(16, 64), correlated(100, 64)
    x[:, 5:9] = 0
    nearest, found = rounded(weight, x, QuantSpec(4, 32))
    assert output_error(found, weight, x) < output_error(nearest, weight, x)
    silent, back = rounded(weight, torch.zeros(10, 64), QuantSpec(4, 32))
    assert torch.equal(back.q, silent.q)


def test_inputs_that_float32_cannot_tell_apart() -> None:
    """Fewer tokens than inputs, and an error that makes the factoring fail until it is damped enough."""
    weight, x = weights(16, 64), correlated(20, 64)
    products = x.T @ x / len(x)
    mean = products.diagonal().mean()
    broken = products - 1.5 * DAMPING * mean * torch.eye(64)
    assert bool(torch.linalg.cholesky_ex(broken + DAMPING * mean * torch.eye(64)).info)
    rounding = Rounding(QuantSpec(4, 32), torch.float16)
    grid = rounding.logical(weight)
    found = compensated(weight, Dependence.of(broken), grid, rounding)
    assert output_error(found, weight, x) < 0.5 * output_error(grid, weight, x)


def test_inputs_beyond_float32_are_refused() -> None:
    with pytest.raises(CalibrationError, match="squares of a linear's inputs are beyond float32; check"):
        Dependence.of(torch.full((4, 4), torch.inf))
