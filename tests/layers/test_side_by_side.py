"""Linears as one product: the same numbers, and only where their parameters lie side by side and nobody watches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinychat.layers.parallel import ALONE, Group, column_linears
from tinychat.layers.side_by_side import as_one, products

WIDTH, OUT = 6, 4
NAMES = ("q", "k", "v")
PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


class Tensors:
    """A source of weights, as tinychat.checkpoint.Weights is one."""

    def __init__(self, group: Group = ALONE) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = {"weight": (OUT, WIDTH), "bias": (OUT,)}
        self.group = group
        self.tensors = {
            f"attn.{name}.{kind}": torch.randn(size, generator=generator)
            for name in NAMES
            for kind, size in sizes.items()
        }

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_sharded(self, name: str, dim: int) -> Tensor:
        return self.tensors[name].chunk(self.group.size(), dim)[self.group.rank()].clone()

    def get_multi_sharded(self, names: list[str], dim: int) -> Tensor:
        return torch.cat([self.get_sharded(name, dim) for name in names], dim)


class Count(TorchDispatchMode):
    """How many matrix products there are."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def made(bias: bool = True) -> nn.ModuleList:
    return nn.ModuleList(column_linears("attn", NAMES, WIDTH, OUT, Tensors(), bias))


def counted(linears: nn.ModuleList, x: Tensor | None = None) -> int:
    """Products that are made without gradients; they are right."""
    weight: Any = linears[0].weight
    x = torch.randn(2, 3, WIDTH).to(weight.dtype) if x is None else x
    with torch.no_grad():
        expected = [module(x) for module in linears]
        with Count() as count:
            found = products(x, list(linears))
        torch.testing.assert_close(list(found), expected)
    return count.products


@pytest.mark.parametrize("bias", [True, False])
def test_linears_from_a_checkpoint_are_one_product(bias: bool) -> None:
    assert counted(made(bias)) == 1


def retrained(linears: nn.ModuleList) -> nn.ModuleList:
    optimizer = torch.optim.SGD(linears.parameters(), 0.1)
    sum(part.square().sum() for part in products(torch.randn(2, WIDTH), list(linears))).backward()
    optimizer.step()
    return linears


def refilled(linears: nn.ModuleList, assign: bool) -> nn.ModuleList:
    linears.load_state_dict({name: torch.randn_like(t) for name, t in linears.state_dict().items()}, assign=assign)
    return linears


def replaced(linears: nn.ModuleList) -> nn.ModuleList:
    linears[1] = nn.Linear(WIDTH, OUT)
    return linears


def narrowed(linears: nn.ModuleList) -> nn.ModuleList:
    for linear in linears:
        linear.bias = None
    linears[2].bias = nn.Parameter(torch.ones(OUT))
    return linears


def swapped(linears: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList([linears[1], linears[0], linears[2]])


class Other(nn.Linear):
    pass


def subclassed(linears: nn.ModuleList) -> nn.ModuleList:
    linears[0].__class__ = Other
    return linears


def watched(linears: nn.ModuleList) -> nn.ModuleList:
    linears[0].register_forward_hook(lambda *_: None)
    return linears


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (retrained, 1),
        (lambda linears: refilled(linears, False), 1),
        (lambda linears: refilled(linears, True), 3),
        (lambda linears: linears.double(), 3),
        (lambda linears: linears.to(torch.float32), 1),
        (copy.deepcopy, 3),
        (replaced, 3),
        (narrowed, 3),
        (swapped, 3),
        (subclassed, 3),
        (watched, 3),
    ],
    ids=["trained", "filled", "assigned", "cast", "not-cast", "copied", "replaced", "bias", "order", "class", "hook"],
)
def test_whatever_becomes_of_the_linears_the_numbers_are_theirs(
    change: Callable[[nn.ModuleList], nn.ModuleList], expected: int
) -> None:
    assert counted(change(made())) == expected


def test_gradients_are_each_linears_own() -> None:
    linears, x = made(), torch.randn(2, WIDTH, requires_grad=True)
    with Count() as count:
        found = products(x, list(linears))
    assert count.products == 3
    assert all(part.requires_grad for part in found)
    assert counted(linears.requires_grad_(False)) == 1
    assert products(x, list(linears))[0].requires_grad


def test_nothing_is_held_twice_and_state_dicts_keep_their_names() -> None:
    linears = made()
    weights = [linear.weight for linear in linears]
    joint = as_one(weights)
    assert joint is not None
    assert joint.untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)
    assert list(linears.state_dict()) == [f"{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    joint.zero_()
    assert all(not weight.any() for weight in weights)


def test_tensors_that_lie_otherwise_are_not_one() -> None:
    whole = torch.randn(12, WIDTH)
    first, second, third = whole.split(4)
    assert torch.equal(as_one([first, second, third]), whole)
    assert as_one([second, third]) is not None
    assert as_one([first, third]) is None
    assert as_one([first, second.clone()]) is None
    assert as_one([first, None]) is None
    assert as_one([whole.t()[:3], whole.t()[3:]]) is None
    assert as_one([torch.empty(0, 2), torch.empty(0, 2)]) is None


def rows(group: Group) -> list[list[Tensor]]:
    linears = column_linears("attn", NAMES, WIDTH, OUT, Tensors(group))
    return [[linear.weight.detach(), linear.bias.detach()] for linear in linears]


def test_each_rank_has_its_rows_of_each_linear(ranks: RankPool) -> None:
    tensors = Tensors().tensors
    for rank, found in enumerate(ranks.run(2, rows)):
        for name, (weight, bias) in zip(NAMES, found, strict=True):
            assert torch.equal(weight, tensors[f"attn.{name}.weight"].chunk(2)[rank])
            assert torch.equal(bias, tensors[f"attn.{name}.bias"].chunk(2)[rank])
