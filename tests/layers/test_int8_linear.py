"""Int8Linear: what it holds, what it computes, and what it stands for."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tinychat.layers import int8_linear
from tinychat.layers.int8_linear import Int8Linear
from tinychat_kernels import cpu, registry
from tinychat_kernels.errors import KernelError, LayoutError


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 24, bias=bias).to(dtype)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_float_linear_is_rounded_to_the_nearest(dtype: torch.dtype, bias: bool) -> None:
    plain = linear(dtype, bias)
    ours, x = Int8Linear.from_linear(plain), noise(2, 3, 64).to(dtype)
    expected, found = plain(x).detach().double(), ours(x)
    assert found.dtype == dtype and found.shape == (2, 3, 24)
    assert 1e-4 < float((found.double() - expected).norm() / expected.norm()) < 2e-2
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_names_shapes_and_dtypes_are_those_on_disk() -> None:
    state = Int8Linear.from_linear(linear(torch.float16)).state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "weight": ((24, 64), torch.int8),
        "weight_scale": ((24, 1), torch.float32),
        "bias": ((24,), torch.float16),
    }
    assert set(Int8Linear(64, 24, bias=False).state_dict()) == {"weight", "weight_scale"}


def test_an_empty_one_takes_a_state_dict() -> None:
    full, empty = Int8Linear.from_linear(linear()), Int8Linear(64, 24)
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty(noise(1, 64)), full(noise(1, 64)))


def test_the_float_linear_that_it_stands_for() -> None:
    ours = Int8Linear.from_linear(linear())
    back = ours.to_linear(torch.bfloat16)
    assert back.weight.dtype == back.bias.dtype == torch.bfloat16
    wide = ours.to_linear(torch.float32)
    torch.testing.assert_close(wide.weight, linear().weight, atol=float(ours.weight_scale.max()) * 0.51, rtol=0)
    again = Int8Linear.from_linear(wide)
    assert torch.equal(again.weight, ours.weight)


def test_a_cast_leaves_the_integers_alone() -> None:
    before = Int8Linear.from_linear(linear())
    after = copy.deepcopy(before).to(torch.bfloat16)
    assert torch.equal(after.weight, before.weight) and after.bias.dtype == torch.bfloat16
    assert after(noise(1, 64).bfloat16()).dtype == torch.bfloat16


def test_what_cannot_be_held_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = linear()
    wrong.weight.data[0, 0] = float("nan")
    with pytest.raises(LayoutError, match="holds NaN or Inf values"):
        Int8Linear.from_linear(wrong)
    monkeypatch.setenv("TINYCHAT_BACKEND", "nowhere")
    with pytest.raises(KernelError, match="there is no backend 'nowhere'"):
        Int8Linear(64, 24)(noise(1, 64))


def test_it_says_what_it_is() -> None:
    assert repr(Int8Linear(64, 24)) == "Int8Linear(64, 24, bias=True)"


needs_kernels = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_one_gives_the_same_and_holds_it_once(dtype: torch.dtype, bias: bool) -> None:
    plain = Int8Linear.from_linear(linear(dtype, bias))
    ours = copy.deepcopy(plain)
    ours.prepare()
    assert ours.prepared and not list(ours.buffers())
    assert torch.equal(ours.packed.weight, plain.packed.weight) and torch.equal(ours.packed.scale, plain.packed.scale)
    x = noise(2, 3, 64).to(dtype)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    assert ours(x).dtype == dtype


@needs_kernels
def test_a_prepared_one_saves_and_copies_as_on_disk() -> None:
    plain = Int8Linear.from_linear(linear())
    ours = copy.deepcopy(plain)
    ours.prepare()
    for other in (ours.state_dict(), copy.deepcopy(ours).state_dict()):
        assert set(other) == set(plain.state_dict())
        assert all(torch.equal(other[name], tensor) for name, tensor in plain.state_dict().items())
    assert not copy.deepcopy(ours).prepared and not copy.deepcopy(ours).to("meta").prepared
    assert torch.equal(ours.to_linear(torch.float32).weight, plain.to_linear(torch.float32).weight)


def test_which_backend_a_gpu_has_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(registry, "chosen", lambda device: asked.append(device) or registry.Backend("cuda", True, ""))
    int8_linear._on_kernels.cache_clear()
    layer, x = Int8Linear(16, 16), SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    assert [layer._backend_of_form(x) for _ in range(3)] == ["cuda"] * 3  # type: ignore[arg-type]
    int8_linear._on_kernels.cache_clear()
    assert asked == ["cuda"] and layer._backend_of_form(torch.zeros(1)) == "ref"
