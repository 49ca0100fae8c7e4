"""PackedLinear: what it computes, what it stands for, and where it cannot go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tinychat.errors import UsageError
from tinychat.layers.packed_linear import PackedLinear
from tinychat_kernels import cpu, cpu_tower

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(bias: bool = True) -> nn.Linear:
    made = nn.Linear(96, 40, bias=bias)
    made.load_state_dict({"weight": noise(40, 96) / 10, **({"bias": noise(40, seed=2)} if bias else {})})
    return made.requires_grad_(False)


def packed(linear: nn.Linear, inputs: int = 96, outputs: int = 40) -> PackedLinear:
    return PackedLinear(
        cpu_tower.round_linear(linear.weight, inputs, outputs), lambda: linear.weight.detach(), linear.bias
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96)])
def test_it_computes_what_the_float_one_does_within_its_rounding(bias: bool, shape: tuple[int, ...]) -> None:
    expected, found = plain(bias)(noise(*shape)), packed(plain(bias))(noise(*shape))
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 2e-2
    assert packed(plain(bias))(noise(*shape).bfloat16()).dtype == torch.bfloat16


def test_exact_activations_leave_the_weights_rounding() -> None:
    ours, x = packed(plain()), noise(5, 96)
    rounded = ours(x)
    ours.exact = True
    expected = plain()(x)
    assert float((ours(x) - expected).norm()) < float((rounded - expected).norm())


def test_zeros_beyond_its_sizes_change_nothing() -> None:
    """Groups are those of 96 inputs (32) and of 128."""
    wide, x = packed(plain(), 128, 48), noise(4, 96)
    assert wide(x).shape == (4, 40)
    assert float((wide(x) - plain()(x)).norm() / plain()(x).norm()) < 2e-2


def test_a_state_dict_and_a_copy_have_the_float_weight() -> None:
    ours = packed(plain())
    assert torch.equal(ours.state_dict()["weight"], plain().weight) and set(ours.state_dict()) == {"weight", "bias"}
    other = copy.deepcopy(ours)
    assert type(other) is nn.Linear and torch.equal(other(noise(2, 96)), plain()(noise(2, 96)))
    assert set(packed(plain(bias=False)).state_dict()) == {"weight"}


def test_gradients_flow_through_the_float_weight() -> None:
    x = noise(3, 96).requires_grad_()
    packed(plain())(x).sum().backward()
    torch.testing.assert_close(x.grad, plain().weight.sum(0).expand(3, -1))


def test_it_stays_on_the_cpu_and_says_what_it_is() -> None:
    ours = packed(plain())
    with pytest.raises(UsageError, match="the linear is packed for the CPU, x is on meta; load the model for that"):
        ours(torch.empty(1, 96, device="meta"))
    assert repr(ours) == "PackedLinear(96, 40, bits=8, group_size=32)"
