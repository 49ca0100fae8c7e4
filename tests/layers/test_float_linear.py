"""Float linears: as one product where they lie side by side, by oneDNN where it is faster, and always their numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

from tinychat.layers import float_linear
from tinychat.layers.float_linear import activated, as_one, product, products
from tinychat.layers.parallel import ALONE, Group, column_linears

WIDTH, OUT = 6, 4
NAMES = ("q", "k", "v")
HAS_ONE_DNN = torch.backends.mkldnn.is_available()
PRODUCTS = (
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.mkldnn._linear_pointwise.default,
)


@pytest.fixture(params=["torch", pytest.param("oneDNN", marks=pytest.mark.skipif(not HAS_ONE_DNN, reason="no oneDNN"))])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies, whatever this machine would choose."""
    faster = frozenset({torch.float32, torch.bfloat16} if request.param == "oneDNN" else set())
    monkeypatch.setattr(float_linear, "_faster", lambda: faster)
    return request.param


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
    """How many matrix products there are, and how many of them oneDNN's."""

    products, of_one_dnn = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in PRODUCTS
        self.of_one_dnn += func is PRODUCTS[-1]
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
def test_linears_from_a_checkpoint_are_one_product(library: str, bias: bool) -> None:
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


def patched(linears: nn.ModuleList) -> nn.ModuleList:
    linears[0].forward = lambda x: nn.Linear.forward(linears[0], x) + 1
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
        (patched, 3),
        (watched, 3),
    ],
    ids=[
        "trained",
        "filled",
        "assigned",
        "cast",
        "not-cast",
        "copied",
        "replaced",
        "bias",
        "order",
        "class",
        "forward",
        "hook",
    ],
)
def test_whatever_becomes_of_the_linears_the_numbers_are_theirs(
    library: str, change: Callable[[nn.ModuleList], nn.ModuleList], expected: int
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_product_is_the_linears_own(library: str, dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(96, 48, bias=bias).to(dtype)
    for shape in ((2, 17, 96), (1, 96), (0, 96)):
        x = torch.randn(shape).to(dtype)
        with Count() as count:
            found = product(x, linear)
        torch.testing.assert_close(found, linear(x))
        assert count.of_one_dnn == (library == "oneDNN" and dtype != torch.float64 and x.numel() > 0)
    part = torch.randn(3, 192).to(dtype)[:, ::2]
    torch.testing.assert_close(product(part, linear), linear(part))


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu"])
@torch.no_grad()
def test_an_activation_within_the_product_is_the_same(library: str, name: str) -> None:
    linear, act = nn.Linear(96, 48), ACT2FN[name]
    x = torch.randn(5, 96) * 4
    expected = act(linear(x))
    ran: list[int] = []
    real = act.forward
    act.forward = lambda *args: ran.append(1) or real(*args)
    torch.testing.assert_close(activated(x, linear, act, name), expected, atol=1e-5, rtol=1e-5)
    assert len(ran) == (library == "torch" or name == "quick_gelu")


@torch.no_grad()
def test_what_watches_an_activation_sees_it(library: str) -> None:
    seen: list[Tensor] = []
    act = nn.GELU()
    act.register_forward_hook(lambda _module, _args, out: seen.append(out))
    found = activated(torch.randn(5, WIDTH), nn.Linear(WIDTH, OUT), act, "gelu")
    assert seen[0] is found


def test_autocast_decides_the_type(library: str) -> None:
    x, linear = torch.randn(2, WIDTH), nn.Linear(WIDTH, OUT).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, linear).dtype == torch.bfloat16


def test_inputs_of_another_type_are_refused_as_ever(library: str) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        product(torch.randn(2, WIDTH).double(), nn.Linear(WIDTH, OUT))


@pytest.mark.parametrize(("maker", "wide"), [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)])
def test_float32_goes_to_one_dnn_where_mkl_is_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, maker: str | None, wide: bool
) -> None:
    facts = tmp_path / "cpuinfo"
    if maker is not None:
        facts.write_text(f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(float_linear, "CPU_FACTS", facts)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert (torch.float32 in float_linear._faster.__wrapped__()) == wide
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert float_linear._faster.__wrapped__() == frozenset()


def rows(group: Group) -> list[list[Tensor]]:
    linears = column_linears("attn", NAMES, WIDTH, OUT, Tensors(group))
    return [[linear.weight.detach(), linear.bias.detach()] for linear in linears]


def test_each_rank_has_its_rows_of_each_linear(ranks: RankPool) -> None:
    tensors = Tensors().tensors
    for rank, found in enumerate(ranks.run(2, rows)):
        for name, (weight, bias) in zip(NAMES, found, strict=True):
            assert torch.equal(weight, tensors[f"attn.{name}.weight"].chunk(2)[rank])
            assert torch.equal(bias, tensors[f"attn.{name}.bias"].chunk(2)[rank])


def test_a_torch_without_the_operators_multiplies_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_linear, "OPERATORS", ("_linear_pointwise", "not there"))
    assert float_linear._faster.__wrapped__() == frozenset()
