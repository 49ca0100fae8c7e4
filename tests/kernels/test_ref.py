"""The reference of every op against float64, and that it never holds a whole float weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinychat_kernels import ref
from tinychat_kernels.layout import AwqGemm, QuantSpec, dequantize, from_logical, quantize, to_logical


def layer(inputs: int, outputs: int, spec: QuantSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> AwqGemm:
    weight = torch.randn((outputs, inputs), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return from_logical(quantize(weight, spec), spec)


def exact(x: Tensor, packed: AwqGemm, spec: QuantSpec, bias: Tensor | None = None) -> Tensor:
    out = x.double() @ dequantize(to_logical(packed, spec), torch.float64).T
    return out if bias is None else out + bias.double()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 64), (16, 8), (5, 1024), (3, 1032), (2, 2056)])
def test_w4_linear_against_float64(dtype: torch.dtype, group: int, rows: int, outputs: int) -> None:
    spec = QuantSpec(group_size=group)
    packed = layer(256, outputs, spec, dtype)
    x, bias = noise(rows, 256).to(dtype), noise(outputs).to(dtype)
    for b in (None, bias):
        out = ref.w4_linear(x, packed, spec, b)
        assert out.dtype == dtype and out.shape == (rows, outputs)
        assert relative(out, exact(x, packed, spec, b)) <= (1e-5 if dtype == torch.float32 else 5e-3)


def test_scales_of_half_precision_serve_a_bfloat16_input() -> None:
    spec = QuantSpec(group_size=64)
    packed, x = layer(256, 64, spec, torch.float16), noise(4, 256).bfloat16()
    assert relative(ref.w4_linear(x, packed, spec), exact(x, packed, spec)) <= 5e-3


def test_no_whole_float_weight_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(logical, dtype):
        out = dequantize(logical, dtype)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(ref, "dequantize", counted)
    spec = QuantSpec(group_size=128)
    ref.w4_linear(noise(2, 128), layer(128, 4000, spec), spec)
    assert sizes == [1024 * 128] * 3 + [928 * 128]
