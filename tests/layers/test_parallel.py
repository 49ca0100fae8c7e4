"""The sums and joins over ranks, against the same layer on one rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_pool import Rank, RankPool
from torch import Tensor, nn

from tinychat.errors import ModelError
from tinychat.layers.parallel import ALONE, Group, Later, column_linear, joined, replicated, row_linear, share, total

WIDTH, INNER = 8, 12


class Tensors:
    """A source of weights, as tinychat.checkpoint.Weights is one."""

    def __init__(self, tensors: dict[str, Tensor], group: Group) -> None:
        self.tensors, self.group = tensors, group

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_sharded(self, name: str, dim: int) -> Tensor:
        return self.tensors[name].chunk(self.group.size(), dim)[self.group.rank()]

    def get_multi_sharded(self, names: Sequence[str], dim: int) -> Tensor:
        return torch.cat([self.get_sharded(name, dim) for name in names], dim)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = {"up.weight": (INNER, WIDTH), "up.bias": (INNER,), "down.weight": (WIDTH, INNER), "down.bias": (WIDTH,)}
    return {name: torch.randn(size) for name, size in sizes.items()}


def mlp(group: Group, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int]]:
    source = Tensors(tensors(), group)
    up = column_linear("up", WIDTH, INNER, source).to(dtype)
    down = row_linear("down", INNER, WIDTH, source).to(dtype)
    hidden = up(x.to(dtype))
    out = total(down(hidden.relu()), group)
    return out.detach(), joined(hidden, [INNER // group.size()] * group.size(), group).detach(), [*up.weight.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_sum_over_ranks_is_the_layer_on_one(ranks: RankPool, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, WIDTH)
    out, hidden, _ = mlp(ALONE, x, dtype)
    for other, other_hidden, shape in ranks.run(size, mlp, x, dtype):
        spread = float(out.float().abs().max())
        torch.testing.assert_close(other, out, atol=2 * torch.finfo(dtype).eps * spread, rtol=0)
        torch.testing.assert_close(other_hidden, hidden)
        assert shape == [INNER // size, WIDTH]


def unequal(group: Group) -> Tensor:
    own = torch.full((2, group.rank() + 1), float(group.rank()))
    return joined(own, [1, 2], group)


def test_parts_of_unequal_width_are_joined(ranks: RankPool) -> None:
    for found in ranks.run(2, unequal):
        assert found.tolist() == [[0.0, 1.0, 1.0]] * 2


def keeps_no_gradient(group: Group) -> tuple[bool, bool]:
    x = torch.ones(2, requires_grad=True)
    return total(x * 1, group).requires_grad, joined(x * 1, [2, 2], group).requires_grad


def test_sums_over_ranks_carry_no_gradient(ranks: RankPool) -> None:
    assert ranks.run(2, keeps_no_gradient) == [(False, False)] * 2
    assert total(torch.ones(2, requires_grad=True) * 1, ALONE).requires_grad


@given(length=st.integers(1, 4096), size=st.integers(1, 16))
def test_shares_are_equal_or_refused(length: int, size: int) -> None:
    if length % size == 0:
        assert share(length, Rank(0, size), "heads") * size == length
    else:
        with pytest.raises(ModelError, match=rf"{size} ranks do not divide the {length} heads; take one of 1"):
            share(length, Rank(0, size), "heads")


def test_a_row_linears_bias_is_rank_0s() -> None:
    for rank in range(2):
        linear = row_linear("down", INNER, WIDTH, Tensors(tensors(), Rank(rank, 2)))
        assert bool(linear.bias.any()) == (rank == 0)


def test_without_weights_the_sizes_are_a_ranks_share() -> None:
    assert column_linear("up", WIDTH, INNER, Later(Rank(1, 2))).weight.shape == (INNER // 2, WIDTH)
    assert row_linear("down", INNER, WIDTH, Later(Rank(1, 2))).weight.shape == (WIDTH, INNER // 2)
    assert column_linear("up", WIDTH, INNER, None).weight.shape == (INNER, WIDTH)


def test_replicated_modules_are_whole_on_every_rank() -> None:
    norm = replicated(
        nn.LayerNorm(WIDTH), "n", Tensors({"n.weight": torch.arange(8.0), "n.bias": torch.ones(8)}, ALONE)
    )
    assert norm.weight.tolist() == list(range(8))
