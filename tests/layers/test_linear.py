"""QuantLinear: what it holds, what it computes, and what a cast leaves alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from tinychat.layers.linear import QuantLinear
from tinychat_kernels import cpu
from tinychat_kernels.errors import KernelError, LayoutError
from tinychat_kernels.layout import QuantSpec, dequantize, quantize

SPEC = QuantSpec(group_size=32)


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 24, bias=bias).to(dtype)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float_linear_is_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    plain = linear(dtype)
    ours = QuantLinear.from_linear(plain, SPEC)
    for one, other in zip(ours.logical(), quantize(plain.weight.detach(), SPEC), strict=True):
        assert torch.equal(one, other)
    weight = dequantize(ours.logical(), torch.float64)
    x = noise(2, 3, 64).to(dtype)
    expected = x.double() @ weight.T + plain.bias.detach().double()
    found = ours(x)
    assert found.dtype == dtype and found.shape == (2, 3, 24)
    assert float((found.double() - expected).norm() / expected.norm()) <= (1e-5 if dtype == torch.float32 else 5e-3)
    assert not any(parameter.requires_grad for parameter in ours.parameters()) and not ours.scales.requires_grad


def test_names_shapes_and_dtypes_are_the_checkpoints() -> None:
    state = QuantLinear.from_linear(linear(torch.float16), SPEC).state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "qweight": ((64, 3), torch.int32),
        "qzeros": ((2, 3), torch.int32),
        "scales": ((2, 24), torch.float16),
        "bias": ((24,), torch.float16),
    }
    assert set(QuantLinear(64, 24, SPEC).state_dict()) == {"qweight", "qzeros", "scales"}


def test_an_empty_one_takes_a_state_dict() -> None:
    full = QuantLinear.from_linear(linear(), SPEC)
    empty = QuantLinear(64, 24, SPEC, bias=True)
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty(noise(1, 64)), full(noise(1, 64)))


def test_logical_weights_are_taken_over_and_the_bias_stays() -> None:
    ours, other = QuantLinear.from_linear(linear(), SPEC), linear().weight.detach() * 2
    bias = ours.bias.clone()
    ours.load_logical(quantize(other, SPEC))
    assert torch.equal(ours.logical().scale, quantize(other, SPEC).scale) and torch.equal(ours.bias, bias)


def test_a_cast_changes_scales_and_bias_but_no_word() -> None:
    before = QuantLinear.from_linear(linear(), SPEC)
    after = copy.deepcopy(before).to(torch.bfloat16)
    assert torch.equal(after.qweight, before.qweight) and torch.equal(after.qzeros, before.qzeros)
    assert after.qweight.dtype == torch.int32
    assert torch.equal(after.scales, before.scales.bfloat16()) and after.bias.dtype == torch.bfloat16
    assert after(noise(1, 64).bfloat16()).dtype == torch.bfloat16


def test_what_cannot_be_held_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LayoutError, match="in_features=60 is not a multiple of group_size=32"):
        QuantLinear(60, 24, SPEC)
    with pytest.raises(LayoutError, match="out_features=20 is not a multiple of 8"):
        QuantLinear.from_linear(nn.Linear(64, 20), SPEC)
    monkeypatch.setenv("TINYCHAT_BACKEND", "nowhere")
    with pytest.raises(KernelError, match="there is no backend 'nowhere'"):
        QuantLinear(64, 24, SPEC)(noise(1, 64))


def test_it_says_what_it_is() -> None:
    assert repr(QuantLinear(64, 24, SPEC)) == "QuantLinear(64, 24, bits=4, group_size=32)"


needs_kernels = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_prepared_one_holds_the_same_weights_and_none_of_the_words(dtype: torch.dtype, bias: bool) -> None:
    plain = QuantLinear.from_linear(linear(dtype, bias), SPEC)
    ours = copy.deepcopy(plain)
    ours.prepare(exact=True)
    assert ours.prepared and isinstance(ours.packed, cpu.Packed)
    assert [name for name, buffer in ours.named_buffers()] == (["bias"] if bias else [])
    for one, other in zip(ours.logical(), plain.logical(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    x = noise(2, 3, 64).to(dtype)
    found, expected = ours(x), plain(x)
    assert found.dtype == dtype and found.shape == expected.shape
    assert float((found.double() - expected.double()).norm() / expected.double().norm()) <= 5e-3
    rounded = copy.deepcopy(plain)
    rounded.prepare()
    assert not torch.equal(rounded(noise(1, 64)), ours(noise(1, 64)))
    assert float((rounded(x).double() - expected.double()).norm() / expected.double().norm()) <= 2e-2


@needs_kernels
def test_a_prepared_one_saves_and_loads_as_on_disk() -> None:
    plain = QuantLinear.from_linear(linear(torch.float16), SPEC)
    ours = copy.deepcopy(plain)
    ours.prepare()
    state = ours.state_dict()
    assert set(state) == set(plain.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    other = QuantLinear.from_linear(nn.Linear(64, 24).half(), SPEC)
    ours.load_state_dict(other.state_dict())
    assert not ours.prepared and torch.equal(ours.logical().q, other.logical().q)


@needs_kernels
def test_copies_of_a_prepared_one_have_the_words() -> None:
    plain = QuantLinear.from_linear(linear(), SPEC)
    ours = copy.deepcopy(plain)
    ours.prepare()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # noqa: S301
        assert ours.prepared and not other.prepared
        assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in other.state_dict().items())


@needs_kernels
def test_a_cast_restores_the_words_and_what_changes_nothing_does_not() -> None:
    ours = QuantLinear.from_linear(linear(), SPEC)
    ours.prepare()
    assert ours.float().prepared and ours.to("cpu").prepared
    words = ours.logical().q
    assert not ours.to(torch.bfloat16).prepared
    assert ours.scales.dtype == torch.bfloat16 and torch.equal(ours.logical().q, words)
    moved = QuantLinear.from_linear(linear(), SPEC)
    moved.prepare()
    assert moved.to("meta").qweight.is_meta


@needs_kernels
def test_a_prepared_one_becomes_a_float_one() -> None:
    plain = QuantLinear.from_linear(linear(), SPEC)
    ours = copy.deepcopy(plain)
    ours.prepare()
    assert torch.equal(ours.to_linear(torch.float32).weight, plain.to_linear(torch.float32).weight)


@needs_kernels
def test_a_wrong_backend_is_refused_by_a_prepared_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = QuantLinear.from_linear(linear(), SPEC)
    ours.prepare()
    monkeypatch.setenv("TINYCHAT_BACKEND", "nowhere")
    with pytest.raises(KernelError, match="there is no backend 'nowhere'"):
        ours(noise(1, 64))
