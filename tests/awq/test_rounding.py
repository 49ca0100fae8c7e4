"""Rounding inside the search gives the numbers of tinychat_kernels.layout, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awq.rounding import Rounding
from tinychat_kernels import layout
from tinychat_kernels.layout import QuantSpec

SPECS = st.builds(QuantSpec, st.sampled_from([3, 4, 8]), st.sampled_from([32, 64, 128, -1]), st.booleans())


def weight(seed: int, shift: float = 0.0, size: float = 1.0) -> Tensor:
    return torch.randn(16, 256, generator=torch.Generator().manual_seed(seed)) * size + shift


@given(SPECS, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.integers(0, 99), st.floats(-9, 9))
def test_the_same_as_the_layouts_rounding(spec: QuantSpec, dtype: torch.dtype, seed: int, shift: float) -> None:
    w, rounding = weight(seed, shift).to(dtype), Rounding(spec, dtype)
    expected, found = layout.quantize(w, spec), rounding.logical(w)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    stands_for = layout.dequantize(found, torch.float32)
    assert torch.equal(rounding.nearest(rounding.groups(w)).flatten(1), stands_for)


@given(SPECS, st.integers(0, 99), st.sampled_from([5.5, -5.5, 0.0, 0.3]), st.sampled_from([1e-3, 0.5, 30.0]))
def test_errors_are_half_a_step_at_most(spec: QuantSpec, seed: int, shift: float, size: float) -> None:
    """Whatever side of zero a group lies on. The stored zero is rounded: the far end may lose another half step."""
    rounding = Rounding(spec, torch.float32)
    groups = rounding.groups(weight(seed, shift, size))
    scale, _ = rounding.grid(groups)
    steps = (rounding.nearest(groups) - groups).abs() / scale
    assert float(steps.max()) <= 1 + 1e-3
    assert float(steps.median()) <= 0.5 + 1e-3


def test_an_all_zero_group_stays_zero() -> None:
    rounding = Rounding(QuantSpec(4, 32), torch.float16)
    assert not rounding.nearest(torch.zeros(2, 3, 32)).any()


@pytest.mark.parametrize("rows", [1, 3000])
def test_rows_are_rounded_by_themselves(rows: int) -> None:
    """Chunks of rows are invisible."""
    rounding = Rounding(QuantSpec(4, 64), torch.float16)
    w = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    last = rounding.logical(w[-1:])
    for whole, row in zip(rounding.logical(w), last, strict=True):
        assert torch.equal(whole[:, -1:], row)
