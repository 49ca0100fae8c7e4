"""Attention of the CPU kernels against softmax in float64, and the bits of a query whatever stands beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tinychat_kernels import cpu, cpu_decoder
from tinychat_kernels.cpu_decoder import Rows
from tinychat_kernels.int8 import quantize_tokens

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
WORST = 1e-5  # of the largest value, in float32; torch's own kernel is within 2e-6
WORST_INT8 = 2e-4  # queries and weights are rounded to 16 bits there
SAME_BITS = ("avx2", "avxvnni", "avx512")


@pytest.fixture(params=cpu.isas() if available else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


def random(*shape: int, seed: int = 0, tail: float | None = None) -> Tensor:
    """Gaussian, or Student's t with `tail` degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if tail is None:
        return x
    chi = sum(torch.randn(shape, generator=generator) ** 2 for _ in range(int(tail))) / tail
    return x / torch.sqrt(torch.as_tensor(chi))


def cache(
    slots: int, heads: int, capacity: int, dim: int, dtype: torch.dtype, tail: float | None = None
) -> tuple[Tensor, ...]:
    """One layer: keys and values; of int8 their scales too."""
    shape = slots, heads, capacity, dim
    floats = random(*shape, seed=1, tail=tail), random(*shape, seed=2, tail=tail)
    if dtype != torch.int8:
        return tuple(part.to(dtype) for part in floats)
    rounded = [quantize_tokens(part.flatten(0, 2)) for part in floats]
    return *(one.weight.view(shape) for one in rounded), *(one.scale.view(shape[:3]) for one in rounded)


def as_floats(layer: tuple[Tensor, ...]) -> list[Tensor]:
    """Keys and values in float64, as they are stored."""
    wide = [part.double() for part in layer]
    return wide if len(wide) == 2 else [wide[i] * wide[i + 2][..., None] for i in (0, 1)]


def expected(q: Tensor, rows: Rows, window: int | None = None) -> Tensor:
    """float64, each row alone."""
    keys, values = as_floats(rows.layers[0])
    out = []
    for queries, slot, start in zip(q.double(), rows.slots, rows.starts, strict=True):
        count, heads = queries.shape[:2]
        filled = (part[slot, :, : start + count] for part in (keys, values))
        k, v = (part.repeat_interleave(heads // keys.shape[1], 0) for part in filled)
        position, key = torch.arange(start, start + count)[:, None], torch.arange(start + count)
        seen = (key <= position) & (key > position - (window or start + count))
        scores = queries.transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        out.append((scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.stack(out)


def assert_near(ours: Tensor, exact: Tensor, worst: float = WORST) -> None:
    assert float((ours - exact).abs().max()) <= worst * max(1.0, float(exact.abs().max()))


def worst(dtype: torch.dtype) -> float:
    return WORST_INT8 if dtype == torch.int8 else WORST


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1025])
def test_one_token_after_a_cache(isa: str, dtype: torch.dtype, length: int):
    """length: keys that the token sees, its own included."""
    layer = cache(1, 2, 1030, 64, dtype)
    rows = Rows([layer], [0], [length - 1])
    q = random(1, 1, 4, 64) * 2
    assert_near(cpu_decoder.attention(q, rows), expected(q, rows), worst(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("count", [2, 5, 6, 7, 31, 33, 95, 96, 97, 255, 256, 257, 300])
@pytest.mark.parametrize("start", [0, 1, 250])
def test_many_tokens(isa: str, count: int, start: int, dtype: torch.dtype):
    rows = Rows([cache(1, 2, 600, 32, dtype)], [0], [start])
    q = random(1, count, 4, 32)
    assert_near(cpu_decoder.attention(q, rows), expected(q, rows), worst(dtype))


@pytest.mark.parametrize("dim", [16, 32, 48, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 1), (12, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_sizes_of_heads_and_groups(isa: str, dim: int, heads: int, kv_heads: int, dtype: torch.dtype):
    layer = cache(1, kv_heads, 280, dim, dtype)
    for count, start in ((1, 270), (9, 250)):
        rows = Rows([layer], [0], [start])
        q = random(1, count, heads, dim)
        assert_near(cpu_decoder.attention(q, rows), expected(q, rows), worst(dtype))


@pytest.mark.parametrize("window", [1, 2, 17, 64, 255, 256, 257, 400, 10_000])
@pytest.mark.parametrize("count", [1, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_windows(isa: str, window: int, count: int, dtype: torch.dtype):
    rows = Rows([cache(1, 2, 900, 32, dtype)], [0], [520])
    q = random(1, count, 2, 32)
    assert_near(cpu_decoder.attention(q, rows, window=window), expected(q, rows, window), worst(dtype))


@pytest.mark.parametrize("tail", [3.0, 1.0])
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_heavy_tails(isa: str, tail: float, factor: float):
    """Scores of thousands, where one key takes it all: no overflow, no NaN. float32 scores err with their size."""
    layer = cache(1, 2, 400, 64, torch.float32, tail)
    for count, start in ((1, 399), (70, 300)):
        rows = Rows([layer], [0], [start])
        q = random(1, count, 4, 64, tail=tail) * factor
        ours, exact = cpu_decoder.attention(q, rows), expected(q, rows)
        theirs = float32_by_torch(q, rows)
        assert torch.isfinite(ours).all()
        assert float((ours - exact).abs().max()) <= 3 * float((theirs - exact).abs().max()) + WORST


@pytest.mark.parametrize("tail", [3.0, 1.0])
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_rounding_queries_costs_little_beside_rounding_keys(isa: str, tail: float, factor: float):
    stored, plain = (cache(1, 2, 400, 64, dtype, tail) for dtype in (torch.int8, torch.float32))
    for count, start in ((1, 399), (70, 300)):
        q = random(1, count, 4, 64, tail=tail) * factor
        ours = cpu_decoder.attention(q, Rows([stored], [0], [start]))
        exact, unrounded = (expected(q, Rows([layer], [0], [start])) for layer in (stored, plain))
        assert float((ours - exact).norm()) < 0.02 * float((exact - unrounded).norm())


def float32_by_torch(q: Tensor, rows: Rows) -> Tensor:
    """torch's attention in float32, of one row."""
    keys, values = (part[:1, :, : rows.starts[0] + q.shape[1]] for part in rows.layers[0])
    position = torch.arange(rows.starts[0], keys.shape[2])[:, None]
    mask = torch.arange(keys.shape[2]) <= position
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_what_lies_beyond_the_rows_is_not_read(isa: str, dtype: torch.dtype):
    """Slots in another order than rows, and NaN where no token of the row was written."""
    layer = cache(4, 2, 600, 64, dtype)
    starts, slots, count = [511, 0, 300], [3, 0, 1], 5
    for part in layer:
        nothing = math.nan if part.is_floating_point() else 99
        part[2] = nothing
        for slot, start in zip(slots, starts, strict=True):
            part[slot, :, start + count :] = nothing
    rows = Rows([layer], slots, starts)
    q = random(3, count, 4, 64)
    assert_near(cpu_decoder.attention(q, rows), expected(q, rows), worst(dtype))


def test_a_nan_in_a_key_shows(isa: str):
    keys, values = cache(1, 1, 40, 32, torch.float32)
    keys[0, 0, 20, 3] = math.nan
    out = cpu_decoder.attention(random(1, 1, 1, 32), Rows([(keys, values)], [0], [39]))
    assert out.isnan().all()


@pytest.mark.parametrize("part", [2, 3])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_scale_that_is_no_number_shows(isa: str, part: int, wrong: float):
    """As the scale of a key or value that held one."""
    layer = cache(1, 1, 40, 32, torch.int8)
    layer[part][0, 0, 20] = wrong
    assert not cpu_decoder.attention(random(1, 1, 1, 32), Rows([layer], [0], [39])).isfinite().any()


def test_keys_and_values_of_zeros(isa: str):
    layer = tuple(torch.zeros_like(part) for part in cache(1, 1, 40, 32, torch.int8))
    assert not cpu_decoder.attention(random(1, 3, 2, 32), Rows([layer], [0], [37])).any()
    assert not cpu_decoder.attention(torch.zeros(1, 3, 2, 32), Rows([layer], [0], [37])).any()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_have_the_bits_of_single_tokens(isa: str, dtype: torch.dtype, window: int | None):
    layer = cache(1, 2, 530, 48, dtype)
    q = random(1, 530, 6, 48)
    whole = cpu_decoder.attention(q, Rows([layer], [0], [0]), window=window)
    for start, end in ((0, 1), (1, 130), (130, 135), (135, 257), (257, 513), (513, 530)):
        chunk = cpu_decoder.attention(q[:, start:end], Rows([layer], [0], [start]), window=window)
        assert torch.equal(chunk, whole[:, start:end])
    for t in (0, 1, 63, 64, 255, 256, 257, 511, 512, 529):
        token = cpu_decoder.attention(q[:, t : t + 1], Rows([layer], [0], [t]), window=window)
        assert torch.equal(token, whole[:, t : t + 1])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_rows_have_the_bits_of_single_rows(isa: str, threads: int, dtype: torch.dtype):
    layer = cache(5, 2, 700, 64, dtype)
    slots, starts = [4, 0, 2], [690, 3, 256]
    before = cpu.threads()
    for count in (1, 4, 9, 100):
        starts = [min(start, 700 - count) for start in starts]
        q = random(3, count, 8, 64)
        singles = [cpu_decoder.attention(q[i : i + 1], Rows([layer], [slots[i]], [starts[i]])) for i in range(3)]
        cpu.set_threads(threads)
        together = cpu_decoder.attention(q, Rows([layer], slots, starts))
        cpu.set_threads(before)
        assert torch.equal(together, torch.cat(singles))


@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_give_the_same_bits(dtype: torch.dtype):
    names = [name for name in cpu.isas() if name in SAME_BITS]
    if len(names) < 2:
        pytest.skip("this CPU has one instruction set with FMA")
    layer = cache(1, 2, 400, 80, dtype)
    found = []
    for name in names:
        with cpu.use_isa(name):
            found += [cpu_decoder.attention(random(1, n, 4, 80), Rows([layer], [0], [400 - n])) for n in (1, 200)]
    assert all(torch.equal(a, b) for a, b in zip(found, found[2:], strict=False))
