"""The clip search against loops that follow the paper's words, over all tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq.calibrate import Moments
from awq.clip import clipped, search_clip
from awq.options import Options
from awq.rounding import Rounding
from tinychat_kernels.layout import QuantSpec, dequantize, quantize


def errors_of_limits(w: Tensor, x: Tensor, spec: QuantSpec) -> list[tuple[float, float]]:
    """(limit, mean over tokens of (x q(w) - x w)^2) of a group `[G]` with inputs `[T, G]`, in the paper's order."""
    out = []
    for i in range(10):
        limit = float((1 - i / 20) * w.abs().max())
        row = w.clamp(-limit, limit).reshape(1, -1).expand(8, -1)
        rounded = dequantize(quantize(row.contiguous(), QuantSpec(spec.bits, len(w), spec.zero_point)))[0]
        out.append((limit, float((x.double() @ (rounded - w).double()).square().mean())))
    return out


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 32), QuantSpec(4, 64), QuantSpec(4, 32, False)])
@pytest.mark.parametrize("tokens", [3, 700])
def test_every_group_gets_its_best_limit(spec: QuantSpec, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 64, generator=generator)
    w[0, 0], w[1] = 9.0, w[1].abs() + 1  # an outlier, and a row above zero
    x = torch.randn(tokens, 64, generator=generator) * torch.linspace(0.1, 3, 64)
    sums = Moments(64, spec.group_size, 1024, 0, torch.device("cpu"))
    sums.add(x)
    limits = search_clip(w, torch.ones(64), sums, Rounding(spec, torch.float32), Options(spec))
    assert limits.shape == (8, 64 // spec.group_size)
    for row in range(8):
        for group in range(limits.shape[1]):
            part = slice(group * spec.group_size, (group + 1) * spec.group_size)
            tried = errors_of_limits(w[row, part], x[:, part], spec)
            limit, error = min(tried, key=lambda pair: abs(pair[0] - float(limits[row, group])))
            assert limit == pytest.approx(float(limits[row, group]), rel=1e-5)
            assert error <= min(error for _, error in tried) * (1 + 1e-4)
    assert limits[0, 0] < 9
    assert limits.unique().numel() == limits.numel()


@settings(max_examples=25)
@given(st.integers(0, 999), st.sampled_from([3, 4]), st.booleans(), st.floats(0.1, 10))
def test_clipping_never_makes_a_group_worse(seed: int, bits: int, zero_point: bool, loudness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(bits, 32, zero_point)
    w, x = torch.randn(8, 64, generator=generator), torch.randn(9, 64, generator=generator)
    scale = torch.rand(64, generator=generator) * loudness + 0.1
    sums = Moments(64, 32, 1024, 0, torch.device("cpu"))
    sums.add(x)
    rounding = Rounding(spec, torch.float32)
    limits = search_clip(w * scale, scale, sums, rounding, Options(spec))

    def errors(weight: Tensor) -> Tensor:
        rounded = rounding.nearest(rounding.groups(weight)) / scale.unflatten(0, (-1, 32))
        return sums.group_errors(rounded - rounding.groups(w))

    assert (errors(clipped(w * scale, limits)) <= errors(w * scale) * (1 + 1e-4) + 1e-6).all()


def test_clipped_holds_each_group_within_its_limit() -> None:
    out = clipped(torch.tensor([[1.0, -5.0, 3.0, -4.0]]), torch.tensor([[2.0, 3.5]]))
    assert out.tolist() == [[1.0, -2.0, 3.0, -3.5]]


def test_without_shrinking_there_is_one_limit() -> None:
    spec = QuantSpec(4, 32)
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    sums = Moments(32, 32, 1024, 0, torch.device("cpu"))
    sums.add(torch.ones(1, 32))
    limits = search_clip(w, torch.ones(32), sums, Rounding(spec, torch.float32), Options(spec, max_shrink=0.0))
    assert torch.equal(limits, w.abs().amax(1, keepdim=True))
