"""The decoder in one call against the same decoder written plainly in float64, and its bits in any company."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tinychat_kernels import cpu, cpu_decoder
from tinychat_kernels.cpu_decoder import Decoder, Layer, Linear, Rotary, Rows, Weights
from tinychat_kernels.errors import KernelError, LayoutError
from tinychat_kernels.layout import Logical, QuantSpec, dequantize, from_logical, quantize

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)

WIDTH, INNER, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 50, 4, 2, 32
CAPACITY = 300
EPS = 1e-5


@pytest.fixture(params=cpu.isas() if available else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Plain:
    """A linear as float64 `[N, K]`, its group, and its bias."""

    weight: Tensor
    group: int
    bias: Tensor | None


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder in both forms; `plain` holds q, k, v, o, gate, up, down of each layer."""

    weights: Weights
    plain: list[list[Plain]]


def linear(inputs: int, outputs: int, group: int, bias: bool, seed: int) -> tuple[Linear, Plain]:
    spec = QuantSpec(4, group)
    logical: Logical = quantize(random(outputs, inputs, seed=seed) / math.sqrt(inputs), spec)
    shift = random(outputs, seed=seed + 500) if bias else None
    packed = cpu.pack(from_logical(logical, spec), spec)
    plain = Plain(dequantize(logical).double(), packed.group, None if shift is None else shift.double())
    return Linear(packed, shift), plain


def make(
    *, layers: int = 2, bias: bool = False, window: int | None = None, head: str = "table", large: bool = False
) -> Case:
    """Random weights; the head is a float "table", or "packed" in 8 bits; all threads compute each token of a large."""
    group, width, inner = (64, 512, 512) if large else (32, WIDTH, INNER)
    sizes = (
        *((width, heads * HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)),
        (HEADS * HEAD_DIM, width), (width, inner), (width, inner), (inner, width),
    )  # fmt: skip
    made, plain = [], []
    for layer in range(layers):
        seeds = range(100 * layer, 100 * layer + len(sizes))
        both = [linear(*size, group, bias, seed) for size, seed in zip(sizes, seeds, strict=True)]
        parts = [one for one, _ in both]
        norms = [1 + 0.2 * random(width, seed=100 * layer + 50 + i) for i in range(2)]
        qkv, gate_up = cpu_decoder.fuse(parts[:3]), cpu_decoder.fuse(parts[4:6])
        made.append(Layer(qkv, parts[3], gate_up, parts[6], norms[0], norms[1], window if layer else None))
        plain.append([two for _, two in both])
    table = random(VOCABULARY, width, seed=900)
    weights = Weights(
        made, 1 + 0.2 * random(width, seed=901), cpu.quantize_head(table, 32) if head == "packed" else table,
        random(VOCABULARY, width, seed=902), HEADS, KV_HEADS, HEAD_DIM, EPS,
    )  # fmt: skip
    return Case(weights, plain)


def rotary(dtype: torch.dtype = torch.float32) -> Rotary:
    angles = torch.arange(CAPACITY)[:, None].double() / 100 ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def storage(slots: int = 1, layers: int = 2, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, ...]]:
    """Nothing that may be read."""
    shape = slots, KV_HEADS, CAPACITY, HEAD_DIM
    if dtype != torch.int8:
        return [tuple(torch.full(shape, math.nan).to(dtype) for _ in "kv") for _ in range(layers)]
    scales = [[torch.full(shape[:3], math.nan) for _ in "kv"] for _ in range(layers)]
    return [(*(torch.full(shape, 99, dtype=dtype) for _ in "kv"), *pair) for pair in scales]


def rounded(x: Tensor, group: int) -> Tensor:
    """x as the kernels round it: int8, a scale for each row and group. The rounding is done in float32, as there."""
    parts = x.float().unflatten(-1, (-1, group))
    top = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return ((parts * (127 / top)).round() * (top / 127)).flatten(-2).double()


def apply(x: Tensor, plain: Plain, exact: bool) -> Tensor:
    out = (x if exact else rounded(x, plain.group)) @ plain.weight.T
    return out if plain.bias is None else out + plain.bias


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def turned(x: Tensor, tables: Rotary) -> Tensor:
    """x `[T, H, D]` of positions 0 to T - 1."""
    cos, sin = (table[: len(x), None].double() for table in (tables.cos, tables.sin))
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def mixed(x: Tensor, parts: list[Plain], window: int | None, exact: bool) -> Tensor:
    """Attention of a whole sequence `[T, D]`, before the output's linear."""
    count = len(x)
    q, k, v = (apply(x, part, exact).unflatten(-1, (-1, HEAD_DIM)) for part in parts)
    q, k = turned(q, rotary()), turned(k, rotary())
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
    position, key = torch.arange(count)[:, None], torch.arange(count)
    seen = (key <= position) & (key > position - (window or count))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD_DIM)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(1)


def expected(case: Case, tokens: Tensor, exact: bool = False) -> Tensor:
    """Logits float64 `[T, V]` of one sequence."""
    w = case.weights
    x = w.embeddings[tokens].double()
    for layer, parts in zip(w.layers, case.plain, strict=True):
        inner = mixed(normed(x, layer.attention_norm), parts[:3], layer.window, exact)
        x = x + apply(inner, parts[3], exact)
        y = normed(x, layer.mlp_norm)
        gate, up = (apply(y, part, exact) for part in parts[4:6])
        x = x + apply(torch.nn.functional.silu(gate) * up, parts[6], exact)
    x = normed(x, w.norm)
    if isinstance(w.head, Tensor):
        return x @ w.head.double().T
    from tinychat_kernels import blocks

    values, scales = blocks.unpack_int8(w.head)
    table = values.double().unflatten(1, (-1, w.head.group)) * scales.double()[..., None]
    return (x if exact else rounded(x, w.head.group)) @ table.flatten(1).T


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def run(case: Case, ids: Tensor, *, exact: bool = False, want: str = "every") -> Tensor:
    """One call, each row from position 0 in a slot of its own."""
    batch = len(ids)
    rows = Rows(storage(batch, len(case.weights.layers)), range(batch), [0] * batch)
    logits = Decoder(case.weights, exact=exact).forward(ids, rows, rotary(), want)
    assert logits is not None
    return logits


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


CASES = {
    "llama": {},
    "packed head": {"head": "packed"},
    "mistral": {"window": 11},
    "qwen2": {"bias": True},
    "one layer": {"layers": 1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2, 9, 40, 270])
def test_float_activations_against_float64(isa: str, name: str, count: int):
    case = make(**CASES[name])
    ids = tokens(1, count)
    assert relative(run(case, ids, exact=True)[0], expected(case, ids[0], exact=True)) < 1e-5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_int8_activations_against_their_emulation(isa: str, name: str, count: int):
    """Most tokens agree to 1e-6. Where a value lies between two integers, float32 and float64 may round it apart:
    such a token, and those that attend to it, differ by a part of what rounding changes at all."""
    case = make(**CASES[name])
    ids = tokens(1, count)
    emulated, plain = expected(case, ids[0]), expected(case, ids[0], exact=True)
    apart = (run(case, ids)[0] - emulated).norm(dim=1) / emulated.norm(dim=1)
    moved = (emulated - plain).norm(dim=1) / emulated.norm(dim=1)
    assert float(apart.median()) < 1e-6
    assert float(apart.max()) < 1.5 * float(moved.max())
    assert float(moved.min()) > 1e-3, "the emulation rounds nothing"


def test_last_and_every(isa: str):
    case = make()
    ids = tokens(3, 21)
    assert torch.equal(run(case, ids, want="last")[:, 0], run(case, ids)[:, -1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("exact", "dtype"), [(False, torch.float16), (True, torch.float32), (False, torch.int8), (True, torch.int8)]
)
def test_chunks_have_the_bits_of_one_call(isa: str, name: str, exact: bool, dtype: torch.dtype):
    case = make(**CASES[name])
    ids, layers = tokens(1, 280), len(case.weights.layers)
    whole = storage(1, layers, dtype)
    decoder = Decoder(case.weights, exact=exact)
    logits = decoder.forward(ids, Rows(whole, [0], [0]), rotary(), "every")
    for sizes in ((100, 156, 1, 23), (1,) * 20 + (7, 253), (255, 2, 23)):
        pieces, start = storage(1, layers, dtype), 0
        for size in sizes:
            piece = ids[:, start : start + size]
            out = decoder.forward(piece, Rows(pieces, [0], [start]), rotary(), "every")
            assert out is not None and logits is not None
            assert torch.equal(out, logits[:, start : start + size])
            start += size
        for layer, other in zip(pieces, whole, strict=True):
            assert all(torch.equal(a[:, :, :280], b[:, :, :280]) for a, b in zip(layer, other, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_rows_have_the_bits_of_single_rows(isa: str, threads: int, dtype: torch.dtype):
    """Ragged rows in slots of any order: prefill, then steps of one and of three tokens."""
    case, slots, lengths = make(window=40, large=True), [2, 0, 3], [5, 60, 21]
    decoder, together = Decoder(case.weights), storage(4, dtype=dtype)
    before = cpu.threads()
    cpu.set_threads(threads)
    alone: list[list[Tensor]] = [[], [], []]
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        for layers in (together, single := storage(1, dtype=dtype)):
            at = slot if layers is together else 0
            decoder.forward(tokens(1, length, seed=row), Rows(layers, [at], [0]), rotary(), "none")
        for step, count in enumerate((1, 3, 1)):
            start = length + (0, 1, 4)[step]
            ids = tokens(3, count, seed=50 + step)[row : row + 1]
            out = decoder.forward(ids, Rows(single, [0], [start]), rotary(), "every")
            assert out is not None
            alone[row].append(out)
    starts = list(lengths)
    for step, count in enumerate((1, 3, 1)):
        out = decoder.forward(tokens(3, count, seed=50 + step), Rows(together, slots, starts), rotary(), "every")
        assert out is not None
        assert torch.equal(out, torch.cat([rows[step] for rows in alone]))
        starts = [start + count for start in starts]
    cpu.set_threads(before)


@pytest.mark.parametrize("exact", [False, True])
def test_keys_and_values_of_8_bits(isa: str, exact: bool):
    """Each token and head is rounded to the nearest of 255 steps; the first layer's are those of a float cache."""
    case, ids, floats, rounded = make(), tokens(2, 30), storage(2), storage(2, dtype=torch.int8)
    decoder = Decoder(case.weights, exact=exact)
    wide, narrow = (decoder.forward(ids, Rows(each, [0, 1], [0, 0]), rotary(), "every") for each in (floats, rounded))
    k, v, *scales = (part[:, :, :30] for part in rounded[0])
    for stored, scale, plain in zip((k, v), scales, floats[0], strict=True):
        plain = plain[:, :, :30]
        assert torch.equal(scale, plain.abs().amax(3) / 127)
        assert stored.abs().amax(3).eq(127).all()
        assert ((stored * scale[..., None] - plain).abs() <= 0.5001 * scale[..., None]).all()
    assert wide is not None and narrow is not None
    assert 1e-4 < relative(narrow, wide.double()) < 2e-2


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("count", [1, 70])
def test_threads_do_not_change_a_bit(threads: int, large: bool, count: int):
    case, ids, before = make(bias=True, head="packed", large=large), tokens(2, count), cpu.threads()
    cpu.set_threads(1)
    expected_bits = run(case, ids)
    cpu.set_threads(threads)
    assert torch.equal(run(case, ids), expected_bits)
    cpu.set_threads(before)


def test_embeddings_instead_of_tokens(isa: str):
    case, ids = make(), tokens(2, 9)
    rows = Rows(storage(2), [0, 1], [0, 0])
    embeds = case.weights.embeddings[ids]
    out = Decoder(case.weights).forward(embeds, rows, rotary(), "every")
    assert torch.equal(torch.as_tensor(out), run(case, ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_in_half_precision(isa: str, dtype: torch.dtype):
    case, ids = make(), tokens(1, 9)
    tables = [case.weights.embeddings.to(dtype), torch.as_tensor(case.weights.head).to(dtype)]
    halves = dataclasses.replace(case.weights, embeddings=tables[0], head=tables[1])
    wide = dataclasses.replace(case.weights, embeddings=tables[0].float(), head=tables[1].float())
    assert torch.equal(run(Case(halves, case.plain), ids), run(Case(wide, case.plain), ids))


def test_angles_of_each_token(isa: str):
    """Tables in another order, and positions that are not those of the cache."""
    case, ids = make(), tokens(1, 12)
    turn = torch.randperm(CAPACITY, generator=torch.Generator().manual_seed(3))
    shuffled = Rotary(rotary().cos[turn], rotary().sin[turn], turn.argsort()[None, :12])
    out = Decoder(case.weights).forward(ids, Rows(storage(), [0], [0]), shuffled, "every")
    assert torch.equal(torch.as_tensor(out), run(case, ids))


def test_profile_counts_every_stage():
    decoder = Decoder(make().weights)
    rows = Rows(storage(), [0], [0])
    decoder.forward(tokens(1, 4), rows, rotary())
    assert not any(decoder.profile().values())
    decoder.start_profile()
    decoder.forward(tokens(1, 4), rows, rotary())
    assert min(decoder.profile().values()) > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head_dim": 24}, "heads of 24 channels: multiples of 16 up to 256"),
        ({"head_dim": 272}, "heads of 272 channels"),
        ({"embeddings": torch.zeros(4, 4, dtype=torch.float64)}, "of torch.float64 on cpu cannot be read"),
        ({"head": torch.zeros(64, 8).T}, "cannot be read"),
    ],
)
def test_weights_that_do_not_fit(changes: dict[str, object], says: str):
    with pytest.raises(KernelError, match=says):
        Decoder(dataclasses.replace(make(layers=1).weights, **changes))


def test_rows_that_do_not_fit():
    decoder, layers = Decoder(make().weights), storage(2)
    ids = tokens(2, 9)
    for rows, says in (
        (Rows(layers, [0], [0]), "1 rows"),
        (Rows(layers, [0, 1], [0, CAPACITY - 8]), "2 rows up to 301 came for 2, of 300 at most"),
        (Rows(layers[:1], [0, 1], [0, 0]), "1 layers of a cache"),
        (Rows([(k.double(), v.double()) for k, v in layers], [0, 1], [0, 0]), "of torch.float64 on cpu came for 2 of"),
        (Rows([(k[..., :16], v[..., :16]) for k, v in layers], [0, 1], [0, 0]), "came for 2 of"),
        (Rows([layer[:2] for layer in storage(2, dtype=torch.int8)], [0, 1], [0, 0]), "of torch.int8 on cpu came"),
        (Rows([(*layer, *layer) for layer in layers], [0, 1], [0, 0]), "came for 2 of"),
        (Rows([layers[0], (layers[1][0], layers[1][1][:1])], [0, 1], [0, 0]), "layer 1 of a cache holds .* unlike"),
        (Rows(layers, [0, 2], [0, 0]), r"starts \[0, 0\] in slots \[0, 2\] came for 2 slots"),
        (Rows(layers, [-1, 0], [0, 0]), r"in slots \[-1, 0\] came for 2 slots"),
        (Rows(layers, [0, 1], [0, -1]), r"starts \[0, -1\] in slots"),
    ):
        with pytest.raises(KernelError, match=says):
            decoder.forward(ids, rows, rotary())


def test_angles_that_are_too_few():
    few = Rotary(rotary().cos[:8], rotary().sin[:8])
    for tables in (few, dataclasses.replace(few, angles=torch.arange(9)[None])):
        with pytest.raises(KernelError, match="8 angles came for 9"):
            Decoder(make(layers=1).weights).forward(tokens(1, 9), Rows(storage(layers=1), [0], [0]), tables)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_and_no_tokens(shape: tuple[int, int]):
    rows = Rows(storage(2), range(shape[0]), [0] * shape[0])
    with pytest.raises(KernelError, match=rf"a step of {shape[0]} rows of {shape[1]} tokens computes nothing"):
        Decoder(make().weights).forward(tokens(*shape), rows, rotary())


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_tokens_that_are_none(wrong: int):
    with pytest.raises(KernelError, match="a token is none of the 50 that there are"):
        run(make(layers=1), torch.tensor([[1, wrong, 2]]))


def test_what_lies_behind_each_other_is_joined_in_place():
    parts = [linear(64, outputs, 32, False, outputs)[0] for outputs in (32, 16, 48)]
    whole = cpu_decoder.fuse(parts).weight
    ends = [0, *torch.tensor([part.weight.blocks.numel() for part in parts]).cumsum(0).tolist()]
    pieces = [
        Linear(dataclasses.replace(part.weight, blocks=whole.blocks[start:end]))
        for part, start, end in zip(parts, ends, ends[1:], strict=False)
    ]
    again, copied = cpu_decoder.fuse(pieces).weight, cpu_decoder.fuse(pieces[::-1]).weight
    assert again.blocks.data_ptr() == whole.blocks.data_ptr()
    assert torch.equal(again.blocks, whole.blocks)
    assert copied.blocks.data_ptr() != whole.blocks.data_ptr()
    assert torch.equal(copied.blocks, torch.cat([part.weight.blocks for part in parts[::-1]]))


def test_linears_that_cannot_be_joined():
    for pair in (((64, 24), (64, 32)), ((64, 32), (96, 32))):
        with pytest.raises(LayoutError, match="cannot be joined"):
            cpu_decoder.fuse([linear(*size, 32, False, 0)[0] for size in pair])
