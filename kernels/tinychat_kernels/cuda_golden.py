"""Every CUDA op on numbers of its own, beside what ref gives in float64: for the user's GPU, and for the emulator.

A case says how far an op is off, in parts of the exact result's norm, and how far it may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinychat_kernels import cuda, cuda_int8, cuda_linear, cuda_ops, ref
from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.cuda_ops import Draw, Heads, Launch, Layer, Partial, Where
from tinychat_kernels.int8 import Int8, dequantize_rows, quantize_rows, quantize_tokens
from tinychat_kernels.layout import QuantSpec, dequantize, from_logical, quantize

W4, ATTENTION, EXACT = 5e-3, 2e-3, 0.0  # bounds of the relative error
SMALL = 4e-3  # of what is rounded to 16 bits once or twice
HEADS = (Heads(8, 2, 64), Heads(4, 4, 80), Heads(16, 2, 128), Heads(8, 8, 128, window=40))
LENGTHS = (1, 97, 255, 256, 257)
CAPACITY = 288
Errors = Iterator[tuple[str, float, float]]  # what of an op, its error, and the bound


@dataclass(frozen=True, slots=True)
class Place:
    """Where ops run and by what, in which dtype; numbers follow from the seed."""

    launch: Launch
    device: torch.device
    dtype: torch.dtype
    processors: int
    seed: int = 0

    def numbers(self, *shape: int, salt: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Poisoned memory: what is not written is seen."""
        dtype = dtype or self.dtype
        poison = float("nan") if dtype.is_floating_point else -77
        return torch.full(shape, poison, dtype=dtype, device=self.device)


def relative(ours: Tensor, exact: Tensor) -> float:
    """How far ours is off, in parts of the exact result's norm; NaN counts as infinite."""
    error = float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def linears(place: Place, sizes: tuple[tuple[int, int], ...] = ((272, 384), (64, 1024))) -> Errors:
    """gemv, gemm and dequantize on 4-bit weights of every group, with and without a bias."""
    for group in (32, 64, 128):
        for outputs, inputs in sizes:
            packed, weight = w4(place, outputs, inputs, group)
            for rows in (1, 3, 8, 9, 40, 130):
                yield f"g{group} {rows}x{inputs}x{outputs}", linear(place, packed, weight, rows), W4
            out = place.empty(outputs, inputs)
            cuda_linear.dequantize(place.launch, packed, out)
            yield f"dequantize g{group}", relative(out, weight), SMALL


def head(place: Place) -> Errors:
    """gemv on 8-bit weights, to fp32; any more rows by dequantizing."""
    weight = place.numbers(200, 256)
    packed = cuda.quantize_head(weight)
    exact = torch.cat(list(cuda.floats(packed, torch.float64)))
    for rows in (1, 8, 12):
        x, out = place.numbers(rows, 256, salt=rows), place.empty(rows, 200, dtype=torch.float32)
        cuda.launch_linear(place.launch, x, packed, None, out, place.processors)
        yield f"8 bits, {rows} rows", relative(out, x.double() @ exact.T), W4


def w4(place: Place, outputs: int, inputs: int, group: int) -> tuple[Packed, Tensor]:
    """Packed weights, and what they stand for in float64."""
    spec = QuantSpec(group_size=group)
    logical = quantize(place.numbers(outputs, inputs, salt=inputs).cpu() / 16, spec)
    words = from_logical(logical, spec)
    packed = cuda.pack(type(words)(*(part.to(place.device) for part in words)), spec)
    return packed, dequantize(logical, torch.float64).to(place.device)


def linear(place: Place, packed: Packed, weight: Tensor, rows: int) -> float:
    """The error of the kernel for so many rows."""
    x, bias = place.numbers(rows, packed.inputs, salt=rows), place.numbers(packed.outputs, salt=3)
    out = place.empty(rows, packed.outputs)
    cuda.launch_linear(place.launch, x, packed, bias, out, place.processors)
    return relative(out, x.double() @ weight.T + bias.double())


def norms(place: Place) -> Errors:
    """RMS norms with and without a sum, and SwiGLU."""
    for rows, width in ((1, 4096), (5, 264), (2, 8200)):
        x, delta = place.numbers(rows, width), place.numbers(rows, width, salt=1)
        weight, out = place.numbers(width, salt=2), place.empty(rows, width)
        total = x.clone()
        cuda_ops.add_rms_norm(place.launch, total, delta, weight, 1e-5, out)
        exact = ref.add_rms_norm(x.double(), delta.double(), weight.double(), 1e-5)
        yield f"norm {rows}x{width}", max(relative(total, exact[0]), relative(out, exact[1])), SMALL
        gate_up, out = place.numbers(rows, 2 * width, salt=3), place.empty(rows, width)
        cuda_ops.swiglu(place.launch, gate_up, out)
        yield f"swiglu {rows}x{width}", relative(out, ref.swiglu(gate_up.double())), SMALL


def rotary(place: Place) -> Errors:
    """Positions and the cache's write, in 16 bits and in 8."""
    for heads in HEADS:
        where, rows = rows_of(place), len(LENGTHS)
        angles = torch.rand((CAPACITY, heads.dim // 2), generator=torch.Generator().manual_seed(1)).to(place.device)
        qkv = place.numbers(rows, heads.width)
        tables = angles.cos(), angles.sin()
        wide = [torch.zeros(cache_shape(heads), dtype=torch.float64, device=place.device) for _ in range(2)]
        q = ref.rope_kv(qkv.double(), *tables, where.slots, where.positions, *wide)
        for layer in (cache(place, heads, empty=True), rounded_cache(place, heads, empty=True)):
            ours = qkv.clone()
            cuda_ops.rope_kv(place.launch, ours, tables, where, heads, layer)
            found = [
                ours[:, : heads.queries * heads.dim].reshape(q.shape),
                *(part.nan_to_num() for part in floats(layer)),
            ]
            worst = max(relative(one, exact) for one, exact in zip(found, (q, *wide), strict=True))
            yield f"d{heads.dim}{kind(layer)}", worst, SMALL if layer.key_scales is None else 2 * W4


def attention(place: Place) -> Errors:
    """A token over its keys: rows of many lengths, shared heads, a window, first positions, 16 and 8 bits."""
    for heads in HEADS:
        where = rows_of(place)
        for layer in (cache(place, heads), rounded_cache(place, heads)):
            for begins in (None, torch.tensor([0, 50, 3, 0, 256], dtype=torch.int32, device=place.device)):
                yield (
                    f"d{heads.dim}{kind(layer)}",
                    attend(place, heads, layer, replace(where, begins=begins)),
                    ATTENTION,
                )


def attend(place: Place, heads: Heads, layer: Layer, where: Where) -> float:
    """The error of one attention."""
    rows = len(where.slots)
    q, out = place.numbers(rows, heads.width, salt=9), place.empty(rows, heads.queries * heads.dim)
    splits = cuda_ops.attention_splits(heads.keys, layer.keys.shape[2], place.processors)
    shape = (rows, heads.queries, splits)
    partial = Partial(place.empty(*shape, heads.dim, dtype=torch.float32), place.empty(*shape, 2, dtype=torch.float32))
    cuda_ops.attn_decode(place.launch, q, where, heads, layer, partial, out)
    queries = q[:, : heads.queries * heads.dim].reshape(rows, heads.queries, heads.dim).double()
    keys, values = (part.double() for part in floats(layer))
    exact = ref.attn_decode(queries, keys, values, where.slots, where.positions, heads.window, where.begins)
    return relative(out, exact.flatten(1))


def draws(place: Place) -> Errors:
    """Tokens: the likeliest, and by a number; the fraction of wrong ones, and the log-probabilities' error."""
    for vocabulary in (99, 32003):
        for dtype in (torch.float32, place.dtype):
            rows = 4
            logits = (place.numbers(rows, vocabulary) * 3).to(dtype)
            temperature = torch.tensor([0.0, 1.0, 0.7, 0.0], device=place.device)
            uniform = torch.tensor([0.3, 0.99, 0.21, 0.9], device=place.device)
            tokens, positions = (torch.zeros(rows, dtype=torch.int32, device=place.device) for _ in range(2))
            logprobs = place.empty(rows, dtype=torch.float32)
            scratch = place.empty(rows, cuda_ops.SAMPLE_BLOCKS, 4, dtype=torch.float32)
            draw = Draw(temperature, uniform, tokens, logprobs, scratch)
            cuda_ops.sample(place.launch, logits, draw, positions)
            exact, expected = ref.sample(logits, temperature, uniform)
            yield f"{vocabulary} of {dtype}: tokens", float((tokens != exact).double().mean()), EXACT
            yield f"{vocabulary} of {dtype}: logprobs", relative(logprobs, expected), 1e-4
            yield "positions", float((positions != 1).double().mean()), EXACT


def integers(place: Place) -> Errors:
    """8-bit linears of a vision tower, whose inputs are rounded as they come, behind an activation or none."""
    for rows, inputs, outputs in ((1, 64, 80), (70, 1152, 200), (257, 1024, 64)):
        x, bias = place.numbers(rows, inputs), place.numbers(outputs, salt=1)
        weight = quantize_rows(place.numbers(outputs, inputs, salt=2).float())
        found = Int8(place.empty(rows, inputs, dtype=torch.int8), place.empty(rows, dtype=torch.float32))
        for activation in ("gelu", "none"):
            exact = quantize_tokens(torch.nn.functional.gelu(x.float()) if activation == "gelu" else x)
            cuda_int8.quantize_rows(place.launch, x, *found, activation)
            yield f"scales {rows}x{inputs} {activation}", relative(found.scale, exact.scale), 1e-5
            yield f"rounding {rows}x{inputs} {activation}", relative(whole(found), whole(exact)), SMALL
        for side in cuda_int8.SIDES:
            out = place.empty(rows, outputs)
            cuda_int8.gemm(place.launch, found, weight, bias, out, side)
            yield (
                f"int8 {rows}x{inputs}x{outputs}",
                relative(out, whole(found) @ whole(weight).T + bias.double()),
                SMALL,
            )


def whole(packed: Int8) -> Tensor:
    """What rows of int8 stand for."""
    return dequantize_rows(packed, torch.float64)


CASES: dict[str, Callable[[Place], Errors]] = {
    "linear": linears,
    "head": head,
    "norm": norms,
    "rope_kv": rotary,
    "attn_decode": attention,
    "sample": draws,
    "int8": integers,
}


@dataclass(frozen=True, slots=True)
class Result:
    """How far an op was off at worst beside its bound, and in which case; `error` is what stopped it."""

    op: str
    dtype: torch.dtype
    worst: float
    bound: float
    case: str
    error: str = ""

    @property
    def right(self) -> bool:
        return not self.error and self.worst <= self.bound


def results(place: Place, ops: tuple[str, ...] = tuple(CASES)) -> Iterator[Result]:
    """Each op's worst case. An op that cannot be compiled or launched is one that is wrong."""
    from tinychat_kernels.errors import KernelError

    for op in ops:
        try:
            case, error, bound = max(CASES[op](place), key=lambda found: found[1] / max(found[2], 1e-9))
        except KernelError as reason:
            yield Result(op, place.dtype, float("inf"), 0.0, "", str(reason))
        else:
            yield Result(op, place.dtype, error, bound, case)


# Caches with something in them


def rows_of(place: Place) -> Where:
    """A row of each of LENGTHS, in slots that are not in order."""
    slots = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32, device=place.device)
    return Where(slots, torch.tensor(LENGTHS, dtype=torch.int32, device=place.device) - 1)


def cache_shape(heads: Heads) -> tuple[int, int, int, int]:
    return len(LENGTHS), heads.keys, CAPACITY, heads.dim


def cache(place: Place, heads: Heads, *, empty: bool = False) -> Layer:
    shape = cache_shape(heads)
    return Layer(*(place.empty(*shape) if empty else place.numbers(*shape, salt=salt) for salt in (5, 6)))


def rounded_cache(place: Place, heads: Heads, *, empty: bool = False) -> Layer:
    """In 8 bits, a scale a token and head."""
    shape = cache_shape(heads)
    if empty:
        parts = [torch.zeros(shape, dtype=torch.int8, device=place.device) for _ in range(2)]
        return Layer(*parts, *(torch.zeros(shape[:3], device=place.device) for _ in range(2)))
    rounded = [quantize_tokens(part.flatten(0, 2)) for part in cache(place, heads)[:2] if part is not None]
    values = [part.weight.reshape(shape) for part in rounded]
    return Layer(*values, *(part.scale.reshape(shape[:3]) for part in rounded))


def floats(layer: Layer) -> list[Tensor]:
    """Keys and values as floats."""
    if layer.key_scales is None or layer.value_scales is None:
        return [layer.keys, layer.values]
    return [layer.keys * layer.key_scales[..., None], layer.values * layer.value_scales[..., None]]


def kind(layer: Layer) -> str:
    return "" if layer.key_scales is None else ", 8-bit cache"
