"""8-bit linears: rounding against its definition, sums against int64, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tinychat_kernels import ref, registry
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.int8 import Int8, dequantize_rows, quantize_rows, quantize_tokens


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(rows: int, columns: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, columns), generator=draw, dtype=torch.int8)


def exact(x: Tensor, packed: Int8, bias: Tensor | None) -> Tensor:
    """The definition in numpy's words: rint(x / scale) in int64, scaled in float64."""
    step = x.float().abs().amax(1) / 127
    tokens = torch.round(x.float() / step[:, None]).long().clamp(-127, 127)
    out = (tokens @ packed.weight.long().T).double() * step[:, None].double() * packed.scale.double()
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 8), (3, 33, 17), (65, 192, 48), (2, 4096, 24)])
def test_the_op_is_its_definition(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    packed, bias = quantize_rows(noise(outputs, inputs)), noise(outputs, seed=3).to(dtype)
    x = noise(rows, inputs, seed=1).to(dtype)
    for b in (None, bias):
        out, wanted = ref.w8a8_linear(x, packed, b), exact(x, packed, b)
        assert out.dtype == dtype and out.shape == (rows, outputs)
        assert float((out.double() - wanted).norm() / wanted.norm()) <= (1e-6 if dtype == torch.float32 else 5e-3)


def test_it_is_near_the_float_product() -> None:
    weight, x = noise(64, 512), noise(16, 512, seed=1)
    out, plain = ref.w8a8_linear(x, quantize_rows(weight)), x @ weight.T
    assert 1e-4 < float((out - plain).norm() / plain.norm()) < 2e-2


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 8), (40, 70000, 3), (33, 129, 65)])
def test_sums_of_integers_are_exact(monkeypatch, multiplies: bool, rows: int, inputs: int, outputs: int) -> None:
    """70000 products of 128 * 128 are more than float32 counts, and less than int32 does."""
    if not multiplies:
        monkeypatch.setattr(ref, "_multiplies_integers", lambda device: False)
    x, weight = integers(rows, inputs), integers(outputs, inputs, 1)
    x[0], weight[0] = -128, -128
    found = ref._integer_sums(x, weight)
    assert torch.equal(found.long(), x.long() @ weight.long().T)


def test_a_product_that_saturates_is_not_used(monkeypatch) -> None:
    def saturating(a: Tensor, b: Tensor) -> Tensor:
        return (a.long() @ b.long()).clamp(max=2**15 - 1).int()

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not ref._multiplies_integers.__wrapped__("cpu")
    monkeypatch.delattr(torch, "_int_mm")
    assert not ref._multiplies_integers.__wrapped__("cpu")


@given(st.integers(1, 5), st.integers(1, 40), st.floats(1e-30, 1e30), st.integers(0, 99))
def test_rounding_is_within_half_a_step(rows: int, columns: int, size: float, seed: int) -> None:
    weight = noise(rows, columns, seed=seed) * size
    packed = quantize_rows(weight)
    error = (dequantize_rows(packed, torch.float32) - weight).abs()
    assert packed.weight.dtype == torch.int8 and int(packed.weight.min()) >= -127
    assert bool((error <= packed.scale[:, None] * 0.5001).all())
    assert bool((packed.weight.abs().amax(1) == 127).all())


def test_rows_of_zeros() -> None:
    weight = torch.stack((torch.zeros(8), noise(8)))
    packed = quantize_rows(weight)
    assert packed.scale[0] == 1 and not packed.weight[0].any()
    out = ref.w8a8_linear(torch.stack((noise(8), torch.zeros(8))), packed, torch.ones(2))
    assert out[0, 0] == 1 and out[1].tolist() == [1, 1]


def test_what_is_not_finite_is_refused_in_weights_and_passes_in_tokens() -> None:
    weight = noise(4, 8)
    for bad in (float("nan"), float("inf")):
        wrong = weight.clone()
        wrong[1, 2] = bad
        with pytest.raises(LayoutError, match="holds NaN or Inf values"):
            quantize_rows(wrong)
        x = noise(3, 8)
        x[1, 2] = bad
        out = ref.w8a8_linear(x, quantize_rows(weight))
        assert not torch.isfinite(out[1]).any() and torch.isfinite(out[[0, 2]]).all()


def test_a_token_depends_on_itself_alone() -> None:
    packed, x = quantize_rows(noise(24, 96)), noise(9, 96, seed=1)
    x[3] *= 1000
    whole = ref.w8a8_linear(x, packed)
    assert all(torch.equal(whole[i : i + 1], ref.w8a8_linear(x[i : i + 1], packed)) for i in range(9))


def test_the_registry_has_it() -> None:
    assert registry.pick("w8a8_linear", "ref") is ref.w8a8_linear
    assert quantize_tokens(torch.tensor([[1.0, -2.0]])).weight.tolist() == [[64, -127]]
