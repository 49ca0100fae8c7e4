"""What the decoder on the CPU does between its linears, each alone, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tinychat_kernels import cpu, cpu_decoder

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)


@pytest.fixture(params=cpu.isas() if available else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def test_norm(isa: str):
    x, add, weight = (random(*shape, seed=i) for i, shape in enumerate(((3, 272), (3, 272), (272,))))
    total, out = cpu_decoder.norm(x * 100, weight, 1e-5, add)
    wide = (x * 100 + add).double()
    assert torch.equal(total, x * 100 + add)
    assert relative(out, wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight) < 3e-7


def test_norm_of_nothing_and_of_huge_values(isa: str):
    weight = torch.ones(64)
    assert not cpu_decoder.norm(torch.zeros(1, 64), weight, 1e-6)[1].any()
    assert relative(cpu_decoder.norm(torch.full((1, 64), 1e15), weight, 1e-6)[1], torch.ones(1, 64)) < 1e-6


def test_swiglu(isa: str):
    x = torch.cat([torch.linspace(-200, 200, 640)[None], random(1, 640, seed=0) * 3], 1)
    gate, up = x.double().chunk(2, 1)
    expected_values = torch.nn.functional.silu(gate) * up
    assert torch.allclose(cpu_decoder.swiglu(x).double(), expected_values, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dim", [16, 32, 48, 64, 80, 112, 128, 256])
def test_rotate(isa: str, dim: int):
    x, angle = random(5, dim, seed=0), random(5, dim // 2, seed=1).double()
    left, right = x.double().chunk(2, 1)
    exact = torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()), 1)
    assert relative(cpu_decoder.rotate(x, angle.cos().float(), angle.sin().float()), exact) < 2e-7
