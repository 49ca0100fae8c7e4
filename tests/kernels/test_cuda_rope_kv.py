"""Rotary positions and the write into the cache, in the emulator against complex numbers of float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated import Defects, GuardedLaunch, halves, launch_for, modes, needs_compiler, numbers, relative
from torch import Tensor

from emu.launcher import Mode
from tinychat_kernels import cuda_ops, int8, ref
from tinychat_kernels.cuda_ops import Heads, Layer, Where
from tinychat_kernels.errors import KernelError

pytestmark = needs_compiler
TOLERANCE = 2e-3
CAPACITY = 260
POSITIONS = (0, 1, 255, 256, 257, 256)
SLOTS = (2, 0, 1, 4, 3, 5)


def tables(dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(CAPACITY)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos(), angles.sin()


def where(positions: tuple[int, ...] = POSITIONS, slots: tuple[int, ...] = SLOTS) -> Where:
    return Where(torch.tensor(slots, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32))


def empty_layer(heads: Heads, dtype: torch.dtype) -> Layer:
    shape = (len(SLOTS), heads.keys, CAPACITY, heads.dim)
    if dtype != torch.int8:
        return Layer(torch.full(shape, 7.0, dtype=dtype), torch.full(shape, 7.0, dtype=dtype))
    return Layer(*(torch.full(shape, 7, dtype=dtype) for _ in "kv"), *(torch.full(shape[:3], 7.0) for _ in "kv"))


def exact(qkv: Tensor, bias: Tensor | None, at: Where, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `[R, H, D]`, turned by multiplication with complex numbers."""
    wide = qkv.double() if bias is None else qkv.double() + bias.double()
    q, k, v = wide.unflatten(-1, (-1, heads.dim)).split([heads.queries, heads.keys, heads.keys], 1)
    cos, sin = (table.double()[at.positions.long()][:, None] for table in tables(heads.dim))

    def turned(x: Tensor) -> Tensor:
        real, imaginary = x.chunk(2, -1)
        out = torch.complex(real, imaginary) * torch.complex(cos, sin)
        return torch.cat((out.real, out.imag), -1)

    return turned(q), turned(k), v


def read(stored: Tensor, scales: Tensor | None, at: Where) -> Tensor:
    """What the cache holds at each row's position, `[R, Hkv, D]`."""
    slots, positions = at.slots.long(), at.positions.long()
    found = stored[slots, :, positions].double()
    return found if scales is None else found * scales[slots, :, positions].double()[..., None]


def untouched(layer: Layer, at: Where) -> bool:
    others = torch.ones(layer.keys.shape[0], CAPACITY, dtype=torch.bool)
    others[at.slots.long(), at.positions.long()] = False
    return all(bool((part.transpose(1, 2)[others] == 7).all()) for part in layer if part is not None)


def check(
    launch: GuardedLaunch, heads: Heads, dtype: torch.dtype, cache: torch.dtype, bias: bool = True, heavy: bool = False
) -> None:
    at, layer = where(), empty_layer(heads, cache)
    qkv = numbers(len(SLOTS), heads.width, dtype=dtype, heavy=heavy)
    added = numbers(heads.width, dtype=dtype, seed=1) if bias else None
    q, k, v = exact(qkv, added, at, heads)
    before, queries = qkv.clone(), q[0].numel()
    cuda_ops.rope_kv(launch, qkv, tables(heads.dim), at, heads, layer, added)
    assert relative(qkv[:, :queries].unflatten(-1, (-1, heads.dim)), q) <= TOLERANCE
    assert torch.equal(qkv[:, queries:], before[:, queries:])
    for stored, scales, wanted in ((layer.keys, layer.key_scales, k), (layer.values, layer.value_scales, v)):
        found = read(stored, scales, at)
        if scales is None:
            assert relative(found, wanted) <= TOLERANCE
        else:
            step = wanted.abs().amax(-1, keepdim=True) / 127
            assert ((found - wanted).abs() <= step * 0.5001).all()
    assert untouched(layer, at)


@halves
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dim", cuda_ops.HEAD_DIMS)
def test_against_float64(dim: int, quantized: bool, dtype: torch.dtype, arch: int):
    heads = Heads(7 if dim == 64 else 2, 1, dim)
    for heavy in (False, True):
        check(launch_for(arch), heads, dtype, torch.int8 if quantized else dtype, bias=heavy, heavy=heavy)


def test_many_heads_take_several_blocks():
    check(launch_for(), Heads(28, 4, 128), torch.bfloat16, torch.bfloat16)
    check(launch_for(), Heads(28, 4, 80), torch.float16, torch.int8)


@modes
def test_in_every_order(mode: Mode):
    for arch in (75, 80):
        check(launch_for(arch, mode), Heads(4, 2, 80), torch.float16, torch.float16)
        check(launch_for(arch, mode), Heads(4, 2, 80), torch.float16, torch.int8)


def test_int8_rounds_as_tokens_are_rounded():
    """Position 0 does not turn, so that what is stored is what int8.quantize_tokens makes of it."""
    heads, at = Heads(1, 1, 64), where((0,), (0,))
    qkv, layer = numbers(1, heads.width, heavy=True), empty_layer(heads, torch.int8)
    cuda_ops.rope_kv(launch_for(), qkv, tables(64), at, heads, layer)
    assert layer.key_scales is not None and layer.value_scales is not None
    for stored, scales, first in ((layer.keys, layer.key_scales, 64), (layer.values, layer.value_scales, 128)):
        wanted = int8.quantize_tokens(qkv[:, first : first + 64])
        assert torch.equal(stored[0, :, 0], wanted.weight) and torch.equal(scales[0, :, 0], wanted.scale)


def test_zeros_and_what_is_no_number():
    heads, at = Heads(1, 1, 32), where((0, 0, 0), (0, 1, 2))
    qkv, layer = torch.zeros(3, 96).half(), empty_layer(heads, torch.int8)
    qkv[1, 40], qkv[2, 70] = float("nan"), float("inf")
    cuda_ops.rope_kv(launch_for(), qkv, tables(32), at, heads, layer)
    keys, values, key_scales, value_scales = layer
    assert key_scales is not None and value_scales is not None
    assert key_scales[0, 0, 0] == value_scales[0, 0, 0] == 1 and not keys[0, 0, 0].any()
    assert key_scales[1, 0, 0].isnan() and not keys[1, 0, 0].any()
    assert value_scales[2, 0, 0].isinf() and not values[2, 0, 0].any()


@pytest.mark.parametrize("position", [-1, CAPACITY])
def test_a_row_outside_the_cache_is_left_alone(position: int):
    heads, layer = Heads(2, 1, 64), empty_layer(Heads(2, 1, 64), torch.float16)
    qkv = numbers(2, heads.width)
    before = qkv.clone()
    cuda_ops.rope_kv(launch_for(), qkv, tables(64), where((position, 3), (0, 1)), heads, layer)
    assert torch.equal(qkv[0], before[0]) and not torch.equal(qkv[1], before[1])
    assert untouched(layer, where((3,), (1,)))


@pytest.mark.parametrize(
    ("heads", "said"), [(Heads(2, 1, 40), "heads of 40 channels"), (Heads(3, 2, 64), "3 query heads cannot share 2")]
)
def test_heads_that_do_not_fit_are_refused(heads: Heads, said: str):
    with pytest.raises(KernelError, match=said):
        cuda_ops.rope_kv(
            launch_for(), numbers(1, heads.width), tables(64), where(), heads, empty_layer(heads, torch.float16)
        )


DEFECTS = (
    ("left * cos - right * sin", "left * cos + right * sin"),
    ("second[i] = right * cos + left * sin", "second[i] = right * cos"),
    ("turn(4 * i + 1, c.y, s.y)", "turn(4 * i + 1, c.x, s.x)"),
    ("position >= 0 && position < sizes.capacity", "position < sizes.capacity"),
    ("(static_cast<long long>(position) * half + kVector * lane) / 4", "static_cast<long long>(position) * half / 4"),
    ("if (key < 0) halves.store", "halves.store"),
    ("const int written = value < 0 ? key : value;", "const int written = key;"),
    ("(static_cast<long long>(slot) * sizes.kv_heads", "(static_cast<long long>(blockIdx.y) * sizes.kv_heads"),
    ("lanes, active && key >= 0", "lanes, active"),
    ("active ? halves.largest() : 0u, lanes)", "active ? halves.largest() : 0u, lanes / 2)"),
    ("max(magnitude(first[i]), magnitude(second[i]))", "magnitude(first[i])"),
    ("signed char* place = to + at * dim + kVector * lane;", "signed char* place = to + at * dim + 4 * lane;"),
    ("fmaf(-near, step, values[i])", "fmaf(near, step, values[i])"),
    ("halves.add(more);", ""),
)


def check_small(launch: GuardedLaunch) -> None:
    """Two heads of keys, and a position that is none: its row would turn by what lies before the tables."""
    check(launch, Heads(4, 2, 80), torch.float16, torch.float16)
    check(launch, Heads(4, 2, 80), torch.float16, torch.int8)
    heads, layer = Heads(1, 1, 32), empty_layer(Heads(1, 1, 32), torch.float16)
    qkv = numbers(1, heads.width)
    before = qkv.clone()
    cuda_ops.rope_kv(launch, qkv, tables(32), where((-1,), (1,)), heads, layer)
    assert torch.equal(qkv, before) and all(bool((part == 7).all()) for part in layer[:2])


@pytest.mark.parametrize("change", DEFECTS, ids=range(len(DEFECTS)))
def test_defects_are_found(change: tuple[str, str], tmp_path: Path):
    assert not Defects("rope_kv").survive(check_small, tmp_path, change)


def test_more_rows_than_a_grid_takes_are_several_launches(monkeypatch: pytest.MonkeyPatch):
    heads, at, grids = Heads(4, 2, 64), where(), []

    def noting(unit, entry, grid, *rest) -> None:
        grids.append(grid[1])
        launch_for()(unit, entry, grid, *rest)

    whole, parts = (numbers(len(POSITIONS), heads.width) for _ in range(2))
    layers = [empty_layer(heads, torch.float16) for _ in range(2)]
    cuda_ops.rope_kv(noting, whole, tables(64), at, heads, layers[0])
    monkeypatch.setattr(cuda_ops, "MOST_GRID_ROWS", 4)
    cuda_ops.rope_kv(noting, parts, tables(64), at, heads, layers[1])
    assert torch.equal(whole, parts) and torch.equal(layers[0].keys, layers[1].keys)
    gate_up, out = numbers(6, 2 * 264), torch.full((6, 264), float("nan")).half()
    cuda_ops.swiglu(noting, gate_up, out)
    assert relative(out, ref.swiglu(gate_up.double())) <= TOLERANCE
    assert grids == [6, 4, 2, 4, 2]
