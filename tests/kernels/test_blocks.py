"""What is packed for the CPU kernels comes back bit for bit."""

from __future__ import annotations

import pytest
import torch

from tinychat_kernels import blocks, cpu
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.int8 import Int8
from tinychat_kernels.layout import Logical, QuantSpec, from_logical

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)


def logical(inputs: int, outputs: int, spec: QuantSpec, dtype: torch.dtype) -> Logical:
    draw = torch.Generator().manual_seed(inputs + outputs)
    groups = spec.groups(inputs)
    q = torch.randint(0, 16, (inputs, outputs), generator=draw, dtype=torch.uint8)
    zero = torch.randint(0, 16, (groups, outputs), generator=draw, dtype=torch.uint8)
    return Logical(q, torch.randn((groups, outputs), generator=draw).to(dtype), zero)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group"),
    [(128, 16, 128), (256, 24, 128), (192, 40, 64), (96, 8, 32), (512, 48, -1), (320, 16, -1)],
)
def test_four_bits_come_back(inputs: int, outputs: int, group: int, dtype: torch.dtype):
    spec = QuantSpec(group_size=group)
    before = logical(inputs, outputs, spec, dtype)
    packed = cpu.pack(from_logical(before, spec), spec)
    for one, other in zip(blocks.unpack(packed, spec), before, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (40, 128), (7, 36), (33, 30)])
def test_eight_bits_come_back(outputs: int, inputs: int):
    draw = torch.Generator().manual_seed(outputs)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=draw, dtype=torch.int8)
    scale = torch.rand(outputs, generator=draw) + 0.1
    values, scales = blocks.unpack_int8(cpu.pack_int8(Int8(weight, scale)))
    assert torch.equal(values, weight) and torch.equal(scales[:, 0], scale)


def test_a_head_comes_back_to_half_a_step():
    weight = torch.randn((50, 256), generator=torch.Generator().manual_seed(0))
    values, scales = blocks.unpack_int8(cpu.quantize_head(weight))
    assert scales.shape == (50, 2) and scales.dtype == torch.float16
    found = values.float().unflatten(1, (2, 128)) * scales.float()[..., None]
    assert ((found.flatten(1) - weight).abs() <= 0.51 * scales.float().repeat_interleave(128, 1)).all()


@pytest.mark.parametrize("size", [1e-7, 1e-6, 3e-6, 1e-5, 1e-3, 1.0, 1e6])
def test_a_head_of_any_size_comes_back_to_half_a_step(size: float):
    weight = size * torch.randn((32, 128), generator=torch.Generator().manual_seed(0))
    values, scales = blocks.unpack_int8(cpu.quantize_head(weight))
    found = values.float() * scales.float()
    assert ((found - weight).abs() <= 0.58 * scales.float()).all()
    assert (scales.float() <= (weight.abs().amax(1, keepdim=True) / 127) * 1.001 + 2.0**-24).all()


def test_a_head_too_large_for_half_a_scale_is_refused():
    with pytest.raises(LayoutError, match=r"the weight holds values up to 1e\+08, too large for 8 bits"):
        cpu.quantize_head(torch.full((16, 64), 1e8))


def test_the_wrong_width_is_refused():
    spec = QuantSpec(group_size=32)
    four = cpu.pack(from_logical(logical(64, 16, spec, torch.float16), spec), spec)
    with pytest.raises(LayoutError, match="weights of 4 bits, not of 8"):
        blocks.unpack_int8(four)
    with pytest.raises(LayoutError, match="weights of 8 bits, not of 4"):
        blocks.unpack(cpu.quantize_head(torch.randn(16, 64)), spec)
