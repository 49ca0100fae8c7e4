"""Attention of single tokens over a cache, in the emulator against float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulated import Defects, GuardedLaunch, halves, launch_for, modes, needs_compiler, numbers, relative
from torch import Tensor

from emu.launcher import Mode
from tinychat_kernels import cuda_ops, ref
from tinychat_kernels.cuda_ops import Heads, Layer, Partial, Where
from tinychat_kernels.errors import KernelError

pytestmark = needs_compiler
TOLERANCE = 2e-3
LENGTHS = (0, 1, 255, 256, 257)
CAPACITY = 257


@dataclass(frozen=True)
class Case:
    """Rows of these lengths, each in a slot of its own, in reverse order. What no row may see is NaN."""

    heads: Heads
    dtype: torch.dtype = torch.float16
    quantized: bool = False
    lengths: tuple[int, ...] = LENGTHS
    begins: tuple[int, ...] | None = None
    splits: int = 3
    heavy: bool = False
    spare: int = 0  # channels behind a row's queries
    loudness: float = 1.0  # of queries and values

    @property
    def where(self) -> Where:
        slots = range(len(self.lengths) - 1, -1, -1)
        ints = (torch.tensor(values, dtype=torch.int32) for values in (list(slots), [n - 1 for n in self.lengths]))
        return Where(*ints, None if self.begins is None else torch.tensor(self.begins, dtype=torch.int32))

    def layer(self) -> Layer:
        shape = (len(self.lengths), self.heads.keys, CAPACITY, self.heads.dim)
        keys, values = (numbers(*shape, dtype=self.dtype, seed=seed, heavy=self.heavy) for seed in (1, 2))
        layer = quantized(keys, values * self.loudness) if self.quantized else Layer(keys, values * self.loudness)
        for part in layer[2:] if self.quantized else layer[:2]:
            assert part is not None
            for row, (slot, length) in enumerate(zip(self.where.slots, self.lengths, strict=True)):
                windowed = length - self.heads.window if self.heads.window else 0
                part[slot, :, length:] = float("nan")
                part[slot, :, : max(windowed, self.begins[row] if self.begins else 0)] = float("nan")
        return layer

    def queries(self) -> Tensor:
        width = self.heads.queries * self.heads.dim
        rows = numbers(len(self.lengths), width + self.spare, dtype=self.dtype, seed=3, heavy=self.heavy)
        rows[:, width:] = float("nan")
        rows[:, : self.heads.dim] *= 4  # one head is louder than the others
        return rows * self.loudness

    def exact(self, queries: Tensor, layer: Layer) -> Tensor:
        """The definition, in float64; a row without keys gives zeros."""
        keys, values = (dequantized(part, scales) for part, scales in zip(layer[:2], layer[2:], strict=True))
        q = queries[:, : self.heads.queries * self.heads.dim].double().unflatten(-1, (-1, self.heads.dim))
        at = self.where
        return ref.attn_decode(q, keys, values, at.slots, at.positions, self.heads.window, at.begins).flatten(1)


def quantized(keys: Tensor, values: Tensor) -> Layer:
    scales = [part.float().abs().amax(-1) / 127 for part in (keys, values)]
    rounded = [(p.float() / s[..., None]).round().to(torch.int8) for p, s in zip((keys, values), scales, strict=True)]
    return Layer(*rounded, *scales)


def dequantized(part: Tensor, scales: Tensor | None) -> Tensor:
    return part.double() if scales is None else part.double() * scales.double()[..., None]


def run(launch: GuardedLaunch, case: Case, queries: Tensor, layer: Layer) -> Tensor:
    rows, heads = len(queries), case.heads
    shape = (rows, heads.queries, case.splits)
    partial = Partial(torch.full((*shape, heads.dim), float("nan")), torch.full((*shape, 2), float("nan")))
    out = torch.full((rows, heads.queries * heads.dim), float("nan"), dtype=queries.dtype)
    cuda_ops.attn_decode(launch, queries, case.where, heads, layer, partial, out)
    return out


def check(launch: GuardedLaunch, case: Case) -> None:
    queries, layer = case.queries(), case.layer()
    out = run(launch, case, queries, layer)
    assert relative(out, case.exact(queries, layer)) <= TOLERANCE


@halves
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dim", cuda_ops.HEAD_DIMS)
def test_against_float64(dim: int, quantized: bool, dtype: torch.dtype, arch: int):
    case = Case(Heads(2, 1, dim), dtype, quantized)
    check(launch_for(arch), case)
    check(launch_for(arch), replace(case, heavy=True, heads=Heads(3, 1, dim)))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (6, 3), (7, 1), (16, 2), (9, 1), (16, 1)])
@pytest.mark.parametrize("quantized", [False, True])
def test_heads_that_share_keys(queries: int, keys: int, quantized: bool):
    check(launch_for(), Case(Heads(queries, keys, 64), quantized=quantized, lengths=(40, 3), spare=128))


@pytest.mark.parametrize("splits", [1, 2, 4, 5, 8, 9, 33, 128])
def test_any_number_of_parts(splits: int):
    check(launch_for(), Case(Heads(2, 1, 64), splits=splits, lengths=(257, 100, 2)))


@pytest.mark.parametrize("window", [1, 16, 100, 255, 256, 257, 1000])
def test_a_window(window: int):
    for case in (Case(Heads(2, 1, 64, window)), Case(Heads(2, 1, 64, window), torch.bfloat16, quantized=True)):
        check(launch_for(), replace(case, lengths=(257, 100, 1)))


def test_rows_that_begin_later():
    case = Case(Heads(2, 1, 64), lengths=(257, 257, 100, 40), begins=(0, 250, 99, 3))
    check(launch_for(), case)
    check(launch_for(), replace(case, quantized=True))
    check(launch_for(), replace(case, heads=Heads(2, 1, 64, 20)))


@modes
def test_in_every_order(mode: Mode):
    for arch, quantized in ((75, False), (80, True)):
        check(launch_for(arch, mode), Case(Heads(3, 1, 80), quantized=quantized, lengths=(1, 130), heavy=True))
    check(launch_for(80, mode), Case(Heads(2, 1, 256), torch.bfloat16, lengths=(150,), splits=1))


def test_a_row_depends_on_itself_alone():
    case = Case(Heads(4, 2, 64), lengths=(257, 31, 100))
    queries, layer = case.queries(), case.layer()
    together = run(launch_for(), case, queries, layer)
    for row, length in enumerate(case.lengths):
        alone, slot = replace(case, lengths=(length,)), slice(2 - row, 3 - row)
        part = Layer(layer.keys[slot].contiguous(), layer.values[slot].contiguous())
        assert torch.equal(run(launch_for(), alone, queries[row : row + 1], part), together[row : row + 1])


def test_queries_and_values_of_any_size():
    """What would overflow half precision, and what would vanish in it."""
    case = Case(Heads(2, 1, 64), torch.bfloat16, quantized=True, lengths=(200, 3))
    for loudness in (2.0**-40, 2.0**-10, 2.0**10, 2.0**20):
        check(launch_for(), replace(case, loudness=loudness))


def test_values_whose_scales_differ_widely():
    """A token's scale may be a millionth of another's, and yet all of the weight lie there."""
    heads = Heads(1, 1, 64)
    case = Case(heads, quantized=True, lengths=(64,))
    queries, layer = case.queries(), case.layer()
    assert layer.value_scales is not None
    for shift in (0, 8):
        keys = layer.keys.clone()
        keys[0, 0, 7] = (queries[0] * 30).clamp(-127, 127).round().to(torch.int8)
        scales = layer.value_scales * 10.0 ** -((torch.arange(CAPACITY) + shift) % 7)
        loud = layer._replace(keys=keys, value_scales=scales)
        assert relative(run(launch_for(), case, queries, loud), case.exact(queries, loud)) <= TOLERANCE


def test_what_is_no_number_stays_in_its_row():
    case = Case(Heads(2, 1, 64), lengths=(100, 100, 100, 1))
    queries, layer = case.queries(), case.layer()
    queries[0, 5], queries[3, 3] = float("nan"), float("inf")
    layer.values[1, 0, 50] = float("inf")
    out = run(launch_for(), case, queries, layer)
    finite = out.isfinite().unflatten(-1, (2, 64)).all(-1)
    assert finite.tolist() == [[False, True], [True, True], [False, False], [False, True]]


@pytest.mark.parametrize("position", [-1, -2, CAPACITY, CAPACITY + 1000])
def test_positions_outside_of_the_cache_do_no_harm(position: int):
    case = Case(Heads(2, 1, 64), lengths=(position + 1, CAPACITY))
    layer = Case(case.heads, lengths=(CAPACITY, CAPACITY)).layer()
    queries = case.queries()
    out = run(launch_for(), case, queries, layer)
    whole = replace(case, lengths=(CAPACITY, CAPACITY)).exact(queries, layer)
    assert relative(out[1], whole[1]) <= TOLERANCE
    assert not out[0].any() if position < 0 else relative(out[0], whole[0]) <= TOLERANCE


def test_what_does_not_fit_is_refused():
    for case, said in ((Case(Heads(2, 1, 40)), "heads of 40"), (Case(Heads(2, 1, 64), splits=129), "in 129 parts")):
        with pytest.raises(KernelError, match=said):
            check(launch_for(), case)


def test_parts_fill_the_processors():
    assert cuda_ops.attention_splits(8, 4096, 132) == 33  # 264 blocks
    assert cuda_ops.attention_splits(8, 1024, 132) == 16
    assert cuda_ops.attention_splits(1, 1 << 20, 132) == cuda_ops.MOST_SPLITS
    assert cuda_ops.attention_splits(8, 4096, 8) == 2 and cuda_ops.attention_splits(32, 1, 4) == 1


@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(8, 1, 256), Heads(71, 1, 64)])
def test_shared_memory_fits_every_gpu(heads: Heads):
    assert cuda_ops.attention_shared(heads) <= 48 << 10 and cuda_ops.COMBINE_SHARED <= 48 << 10


FULL = itertools.product(cuda_ops.HEAD_DIMS, [(1, 1), (4, 1), (7, 1), (8, 1), (20, 2)], [1, 5, 16], [False, True])


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "counts", "splits", "quantized"), list(FULL))
def test_the_full_grid(dim: int, counts: tuple[int, int], splits: int, quantized: bool):
    lengths = (*range(1, 34), 47, 48, 49, 63, 64, 65, 127, 128, 129, 200)
    for dtype in (torch.float16, torch.bfloat16):
        for heavy in (False, True):
            case = Case(Heads(*counts, dim), dtype, quantized, lengths, splits=splits, heavy=heavy)
            check(launch_for(), case)


BEFORE = "    ENTRIES_OF(name, Type, 32)  \\\n    ENTRIES_OF(name, Type, 64)  \\\n"
AFTER = "    ENTRIES_OF(name, Type, 96)  \\\n    ENTRIES_OF(name, Type, 128) \\\n"
ONLY_80 = (("ENTRIES(bf16, BF16)\n", ""), (BEFORE, ""), (AFTER + "    ENTRIES_OF(name, Type, 256)", ""))
ONLY_256 = (("ENTRIES(bf16, BF16)\n", ""), (BEFORE + "    ENTRIES_OF(name, Type, 80)  \\\n" + AFTER, ""))
DEFECTS = {
    "a barrier before the largest is known": (
        "= weights[i];\n        }\n        __syncthreads();",
        "= weights[i];\n        }",
    ),
    "a barrier before sums are added": (
        "}\n        __syncthreads();\n        for (int i = threadIdx.x; i < heads",
        "}\n        for (int i = threadIdx.x; i < heads",
    ),
    "a barrier between teams": ("parts[thread] = sum;\n    __syncthreads();", "parts[thread] = sum;"),
    "keys behind the last are weighed": ("if (tile + g + 8 * (j / 2) >= end) scores[j] = -infinity();", ""),
    "keys behind the last are read": ("return min(key, end - 1);", "return key;"),
    "sums are not scaled anew": ("sums[c / S::kTiles][c % S::kTiles][2 + i] *= kept;", ""),
    "weights are not scaled anew": ("fmaf(weights[i], kept, near + far)", "weights[i] + near + far"),
    "the largest of some lanes": ("other < kWarpSize; other *= 2) x = fmaxf", "other < 16; other *= 2) x = fmaxf"),
    "units of a scale": ("(Cache::kScaled ? above[i] : 0.0f)", "0.0f"),
    "the largest of old": ("above[i] + (most[i] - top);", "above[i];"),
    "weights of some lanes": (
        "for (int other = 4; other < kWarpSize; other *= 2) weights",
        "for (int other = 4; other < 16; other *= 2) weights",
    ),
    "weights are not transposed": (
        "out.rounded[i] = transpose_matrix(bit_cast<u32>(two));",
        "out.rounded[i] = bit_cast<u32>(two);",
    ),
    "values of other keys": ("tile + 2 * t + i % 2 + 8 * (i / 2)", "tile + 4 * t + i"),
    "another channel": ("out[1] = __byte_perm(first.at[i], second.at[i], 0x7632);", "out[1] = out[0];"),
    "another byte": ("i % 2 ? 0x7362 : 0x5140", "0x5140"),
    "bytes without their sign": ("i % 2 ? 0x7362 : 0x5140) ^ 0x80808080u", "i % 2 ? 0x7362 : 0x5140)"),
    "no scale of keys": ("scores[j] *= scales[j / 2];", "scores[j] *= 1.0f;"),
    "no scale of values": ("far += scales[3];", "far += scales[2];"),
    "scales of the last tile": ("if (next < end) load_scales(next);", ""),
    "channels behind the last": ("const bool valid = there && channel < Dim;", "const bool valid = there;"),
    "another head's power": ("__shfl_sync(kAll, power, 8 * t + 4 * i)", "__shfl_sync(kAll, power, 4 * t)"),
    "a window too wide": ("window > 0 ? last + 1 - window : 0", "window > 0 ? last - window : 0"),
    "no beginning": ("const int begin = begins == nullptr ? 0 : begins[row];", "const int begin = 0;"),
    "a key twice": ("self.end = min(begin + part, seen.end);", "self.end = min(begin + part + 1, seen.end);"),
    "exponents of e": ("scale * kLog2E * __shfl", "scale * __shfl"),
    "parts without keys": ("if (by == 0) continue;", ""),
    "parts of one size": ("exp2f(own.x - top);", "1.0f;"),
}  # fmt: skip


def check_small(launch: GuardedLaunch) -> None:
    case = Case(Heads(3, 1, 80, 120), lengths=(135, 2), splits=2, heavy=True)
    check(launch, replace(case, splits=1))
    check(launch, replace(case, heads=Heads(3, 1, 80), begins=(3, 0), quantized=True, heavy=False))


@pytest.mark.parametrize("what", DEFECTS)
def test_defects_are_found(what: str, tmp_path: Path):
    assert not Defects("attn_decode", ONLY_80).survive(check_small, tmp_path, DEFECTS[what])


PIECES = (
    ("const bool later = piece != number;", "const bool later = false;"),
    ("later ? next : tile, number);", "tile, number);"),
    ("load(piece + 2, tile, next);", "load(piece + 1, tile, next);"),
)


@pytest.mark.parametrize("change", PIECES, ids=range(len(PIECES)))
@pytest.mark.parametrize("quantized", [False, True])
def test_pieces_of_another_tile_are_found(change: tuple[str, str], quantized: bool, tmp_path: Path):
    def check_wide(launch: GuardedLaunch) -> None:
        check(launch, Case(Heads(1, 1, 256), quantized=quantized, lengths=(150,), splits=1))

    assert not Defects("attn_decode", ONLY_256).survive(check_wide, tmp_path, change)
