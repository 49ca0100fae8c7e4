"""Every op on sizes drawn at random, beside ref in float64: what no table of cases thought of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import gelu

from tinychat_kernels import cuda, cuda_golden, cuda_ops, ref
from tinychat_kernels.cuda_golden import Place, relative
from tinychat_kernels.cuda_ops import Draw, Heads, Layer, Partial, Where
from tinychat_kernels.int8 import dequantize_rows, quantize_rows, quantize_tokens

Case = tuple[str, float, float]  # what was run, its error, and the bound
GEMV_ROWS = (1, 1, 2, 3, 5, 8)
GEMM_ROWS = (9, 12, 16, 17, 33, 64, 70, 129, 256)
DECODED_ROWS = (257, 300, 513)
HEAD_DIMS = (64, 80, 96, 128)
MOST_WIDE = 16384  # of a norm
ROUNDING = 2e-2  # the bound of what rounding to int8 may do to a row
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
}
LOGPROBS, DRAWS = 1e-3, 1e-4  # bounds: of a log-probability, and of how far a drawn token is from the number's


@dataclass(frozen=True, slots=True)
class Sizes:
    """Draws sizes: small ones for the emulator, a model's for a GPU. `drawn` are those so far."""

    draw: random.Random
    dry: bool
    drawn: list[int] = field(default_factory=list)

    def multiple(self, of: int, most: int) -> int:
        """A multiple of `of`, `most` at most; of a few of them in a dry run."""
        return self._kept(of * self.draw.randint(1, min(3, most // of) if self.dry else most // of))

    def one(self, choices: tuple[int, ...]) -> int:
        return self._kept(choices[0] if self.dry else self.draw.choice(choices))

    def upto(self, most: int) -> int:
        return self._kept(self.draw.randint(1, min(most, 5) if self.dry else most))

    def _kept(self, size: int) -> int:
        self.drawn.append(size)
        return size


def _linear(place: Place, sizes: Sizes, rows: int, most: int = 4608) -> Case:
    group = sizes.draw.choice((32, 64, 128))
    inputs, outputs = sizes.multiple(group, most), sizes.multiple(8, most)
    packed, weight = cuda_golden.w4(place, outputs, inputs, group)
    return f"{rows}x{inputs}x{outputs} g{group}", cuda_golden.linear(place, packed, weight, rows), cuda_golden.W4


def gemv(place: Place, sizes: Sizes) -> Case:
    return _linear(place, sizes, sizes.one(GEMV_ROWS))


def gemm(place: Place, sizes: Sizes) -> Case:
    return _linear(place, sizes, sizes.one(GEMM_ROWS))


def decoded(place: Place, sizes: Sizes) -> Case:
    return _linear(place, sizes, sizes.one(DECODED_ROWS), 1024 if sizes.dry else 4608)


def head8(place: Place, sizes: Sizes) -> Case:
    inputs, outputs, rows = sizes.multiple(128, 4096), sizes.multiple(8, 20000), sizes.one((1, 4, 8, 12))
    packed = cuda.quantize_head(place.numbers(outputs, inputs, salt=1))
    exact = torch.cat(list(cuda.floats(packed, torch.float64)))
    x, out = place.numbers(rows, inputs, salt=2), place.empty(rows, outputs, dtype=torch.float32)
    cuda.launch_linear(place.launch, x, packed, None, out, place.processors)
    return f"{rows}x{inputs}x{outputs}", relative(out, x.double() @ exact.T), cuda_golden.W4


def head4(place: Place, sizes: Sizes) -> Case:
    inputs, outputs, rows = sizes.multiple(128, 4096), sizes.multiple(8, 16000), sizes.one((1, 4, 8))
    packed, weight = cuda_golden.w4(place, outputs, inputs, 128)
    x, out = place.numbers(rows, inputs, salt=2), place.empty(rows, outputs, dtype=torch.float32)
    cuda.launch_linear(place.launch, x, packed, None, out, place.processors)
    return f"{rows}x{inputs}x{outputs}", relative(out, x.double() @ weight.T), cuda_golden.W4


def attention16(place: Place, sizes: Sizes) -> Case:
    return _attention(place, sizes, rounded=False)


def attention8(place: Place, sizes: Sizes) -> Case:
    return _attention(place, sizes, rounded=True)


def _attention(place: Place, sizes: Sizes, *, rounded: bool) -> Case:
    """Ragged rows, some with a window or a first position."""
    rows, capacity = sizes.one((1, 2, 3, 5, 8)), sizes.one((40, 300, 1500, 5000))
    heads, where = _heads(sizes), _rows(place, sizes, rows, capacity)
    heads = replace(heads, window=sizes.draw.choice((0, 0, 7, 256)))
    if sizes.draw.random() < 0.3:
        first = [sizes.draw.randint(0, max(0, last)) for last in where.positions.tolist()]
        where = replace(where, begins=torch.tensor(first, dtype=torch.int32, device=place.device))
    layer = _layer(place, (rows, heads.keys, capacity, heads.dim), rounded)
    q, out = place.numbers(rows, heads.width, salt=9), place.empty(rows, heads.queries * heads.dim)
    splits = cuda_ops.attention_splits(heads.keys, capacity, place.processors)
    room = (rows, heads.queries, splits)
    partial = Partial(place.empty(*room, heads.dim, dtype=torch.float32), place.empty(*room, 2, dtype=torch.float32))
    cuda_ops.attn_decode(place.launch, q, where, heads, layer, partial, out)
    queries = q[:, : heads.queries * heads.dim].reshape(rows, heads.queries, heads.dim).double()
    keys, values = (part.double() for part in cuda_golden.floats(layer))
    exact = ref.attn_decode(queries, keys, values, where.slots, where.positions, heads.window, where.begins)
    case = f"{rows} rows at {where.positions.tolist()}, {_said(heads)}, window {heads.window}"
    return case, relative(out, exact.flatten(1)), cuda_golden.ATTENTION


def rope_kv(place: Place, sizes: Sizes) -> Case:
    rows, capacity, heads = sizes.one((1, 2, 5, 8)), sizes.one((9, 300)), _heads(sizes)
    where, rounded = _rows(place, sizes, rows, capacity), sizes.draw.random() < 0.5
    shape = (rows, heads.keys, capacity, heads.dim)
    kind = torch.int8 if rounded else place.dtype
    held = [torch.zeros(shape, dtype=kind, device=place.device) for _ in range(2)]
    scales = [torch.zeros(shape[:3], device=place.device) for _ in range(2)] if rounded else []
    layer = Layer(*held, *scales)
    angles = torch.rand((capacity, heads.dim // 2), generator=torch.Generator().manual_seed(place.seed))
    tables = angles.cos().to(place.device), angles.sin().to(place.device)
    qkv = place.numbers(rows, heads.width)
    wide = [torch.zeros(shape, dtype=torch.float64, device=place.device) for _ in range(2)]
    q = ref.rope_kv(qkv.double(), *tables, where.slots, where.positions, *wide)
    cuda_ops.rope_kv(place.launch, qkv, tables, where, heads, layer)
    ours = [qkv[:, : heads.queries * heads.dim].reshape(q.shape), *cuda_golden.floats(layer)]
    worst = max(relative(one, exact) for one, exact in zip(ours, (q, *wide), strict=True))
    bound = 2 * cuda_golden.W4 if rounded else cuda_golden.SMALL
    return f"{rows} rows of {capacity}, {_said(heads)}{', 8-bit cache' if rounded else ''}", worst, bound


def norm(place: Place, sizes: Sizes) -> Case:
    rows, width = sizes.upto(70), sizes.multiple(8, MOST_WIDE)
    x, delta = place.numbers(rows, width), place.numbers(rows, width, salt=1)
    weight, out, total = place.numbers(width, salt=2), place.empty(rows, width), x.clone()
    cuda_ops.add_rms_norm(place.launch, total, delta, weight, 1e-5, out)
    exact = ref.add_rms_norm(x.double(), delta.double(), weight.double(), 1e-5)
    return f"{rows}x{width}", max(relative(total, exact[0]), relative(out, exact[1])), cuda_golden.SMALL


def swiglu(place: Place, sizes: Sizes) -> Case:
    rows, width = sizes.upto(70), sizes.multiple(8, MOST_WIDE)
    gate_up, out = place.numbers(rows, 2 * width), place.empty(rows, width)
    cuda_ops.swiglu(place.launch, gate_up, out)
    return f"{rows}x{width}", relative(out, ref.swiglu(gate_up.double())), cuda_golden.SMALL


def int8(place: Place, sizes: Sizes) -> Case:
    """A linear of a vision tower: rows rounded as they come, behind an activation."""
    from tinychat_kernels import cuda_int8

    rows, inputs, outputs = sizes.upto(800), sizes.multiple(16, 4608), sizes.upto(4608)
    kind = sizes.draw.choice(("none", "gelu", "gelu_tanh", "quick_gelu"))
    x, bias = place.numbers(rows, inputs), place.numbers(outputs, salt=1)
    weight, out = quantize_rows(place.numbers(outputs, inputs, salt=2).float()), place.empty(rows, outputs)
    cuda_int8.linear(place.launch, x, weight, bias, out, kind, place.processors)
    values = torch.empty_like(x, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    cuda_int8.quantize_rows(place.launch, x, *values, kind)
    active = ACTIVATIONS[kind](x.double())
    rounding = relative(values[0].double() * values[1].double()[:, None], active)
    wide = (values[0].double() * values[1].double()[:, None]) @ dequantize_rows(weight, torch.float32).double().T
    error = relative(out, wide + bias.double())
    case = f"{rows}x{inputs}x{outputs}, {kind}"
    return (f"{case}: rounding", rounding, ROUNDING) if rounding > ROUNDING else (case, error, cuda_golden.SMALL)


def sample(place: Place, sizes: Sizes) -> Case:
    """The fraction of wrong tokens, and the log-probabilities' error."""
    rows, vocabulary = sizes.one((1, 3, 8)), sizes.upto(130000)
    uniform = torch.tensor([sizes.draw.random() for _ in range(rows)])
    temperature = torch.tensor([sizes.draw.choice((0.0, 0.7, 1.3)) for _ in range(rows)])
    logits = place.numbers(rows, vocabulary).float() * 3
    uniform, temperature = uniform.to(place.device), temperature.to(place.device)
    tokens, positions = (torch.zeros(rows, dtype=torch.int32, device=place.device) for _ in range(2))
    logprobs = place.empty(rows, dtype=torch.float32)
    scratch = place.empty(rows, cuda_ops.SAMPLE_BLOCKS, 4, dtype=torch.float32)
    cuda_ops.sample(place.launch, logits, Draw(temperature, uniform, tokens, logprobs, scratch), positions)
    exact, expected = ref.sample(logits, temperature, uniform)
    case = f"{rows}x{vocabulary}, temperatures {temperature.tolist()}"
    if torch.equal(tokens, exact):
        return case, float((logprobs - expected).abs().max()), LOGPROBS
    rows_of = zip(logits, temperature.tolist(), tokens.tolist(), uniform.tolist(), strict=True)
    return (
        f"{case}: tokens {tokens.tolist()} instead of {exact.tolist()}",
        max(_outside(*row) for row in rows_of),
        DRAWS,
    )


def _outside(logits: torch.Tensor, temperature: float, token: int, uniform: float) -> float:
    """How far the number lies outside of a token's part of the distribution; endless for a wrong likeliest."""
    wide = logits.double()
    if not 0 <= token < len(wide):
        return float("inf")
    if temperature == 0:
        return 0.0 if float(wide[token]) == float(wide.max()) else float("inf")
    ends = (wide / temperature).softmax(-1).cumsum(-1)
    begin = float(ends[token - 1]) if token else 0.0
    return max(0.0, begin - uniform, uniform - float(ends[token]))


def _heads(sizes: Sizes) -> Heads:
    keys = sizes.one((2, 1, 4, 8))
    return Heads(keys * sizes.one((2, 1, 4, 5, 8)), keys, sizes.draw.choice(HEAD_DIMS))


def _said(heads: Heads) -> str:
    return f"{heads.queries} heads over {heads.keys} of {heads.dim}"


def _rows(place: Place, sizes: Sizes, rows: int, capacity: int) -> Where:
    """Slots in any order, and a position each."""
    slots = sizes.draw.sample(range(rows), rows)
    positions = [sizes.draw.randrange(capacity) for _ in range(rows)]
    return Where(*(torch.tensor(one, dtype=torch.int32, device=place.device) for one in (slots, positions)))


def _layer(place: Place, shape: tuple[int, int, int, int], rounded: bool) -> Layer:
    parts = [place.numbers(*shape, salt=salt) for salt in (5, 6)]
    if not rounded:
        return Layer(*parts)
    held = [quantize_tokens(part.flatten(0, 2)) for part in parts]
    values = [one.weight.reshape(shape) for one in held]
    return Layer(*values, *(one.scale.reshape(shape[:3]) for one in held))


RANDOM: dict[str, Callable[[Place, Sizes], Case]] = {
    "gemv": gemv,
    "gemm": gemm,
    "dequantize and torch's product": decoded,
    "8-bit head": head8,
    "4-bit head": head4,
    "attention": attention16,
    "attention, 8-bit cache": attention8,
    "rope_kv": rope_kv,
    "norm": norm,
    "swiglu": swiglu,
    "int8": int8,
    "sample": sample,
}
