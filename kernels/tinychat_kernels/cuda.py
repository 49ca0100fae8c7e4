"""The CUDA backend: linears with 4-bit and 8-bit weights, their packing, and the check of a shape's first use.

Up to cuda_linear.GEMV_ROWS rows are bound by the memory, more by arithmetic; where there are so many that decoding the
weights costs little, they are decoded once and torch multiplies. The first time that a GPU sees a shape, one row and 64
outputs are compared with ref's; a shape that fails is computed by plain torch from then on, and said.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tinychat_kernels import cuda_checks, cuda_int8, cuda_layout, cuda_linear, ref
from tinychat_kernels.cuda_gpu import Gpu, gpu, why_none
from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.cuda_ops import Launch
from tinychat_kernels.errors import KernelError, LayoutError
from tinychat_kernels.int8 import Int8
from tinychat_kernels.layout import (
    GROUP_SIZES,
    PER_ROW,
    AwqGemm,
    Logical,
    QuantSpec,
    dequantize,
    quantize,
    to_logical,
)

DTYPES = (torch.float16, torch.bfloat16)
BF16_FROM = (8, 0)  # compute capability
HEAD_GROUP = 128
SLICE = 4096  # rows of a head that are rounded at a time
MOST_GEMM_ROWS = 256  # above, decoding the weights once and torch's product are faster
SLICE_BYTES = 64 << 20  # of weights that are dequantized at a time
PLAIN_TILES = 64  # whose weights plain torch holds as floats at a time
CHECKED_TILES = 4  # times 16 outputs, of one row
CHECKED_OUTPUTS = 64  # of one row, of a linear that is not in tiles
TOLERANCE = 5e-3


def available() -> tuple[bool, str]:
    """Whether the kernels run on torch's current GPU, and by what they are compiled, or why not. May compile one.

    For a model's own GPU: within `cuda_gpu.current`.
    """
    if (reason := why_none()) is not None:
        return False, reason
    index = torch.cuda.current_device()
    if (reason := _trouble(index)) is not None:
        return False, reason
    device = gpu(index)
    failed = cuda_checks.failures(device)
    said = f"; {len(failed)} shapes failed their check and run on ref: {failed[0]}" if failed else ""
    return True, f"{torch.cuda.get_device_name(device.index)}, {device.target.arch}, {device.made_by}{said}"


@functools.cache
def _trouble(index: int) -> str | None:
    """Why the kernels do not run on a GPU at all; tried once."""
    try:
        gpu(index).load("norm")
    except KernelError as error:
        return str(error)
    return None


def obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels do not compute in this dtype there; None where they do."""
    if dtype not in DTYPES:
        return f"activations are {dtype}; the CUDA kernels take float16 and bfloat16"
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < BF16_FROM:
        return "this GPU has no products of bfloat16: give --dtype float16"
    return _trouble(torch.cuda.current_device() if device.index is None else device.index)


def pack(weights: AwqGemm, spec: QuantSpec) -> Packed:
    """AWQ's GEMM layout -> tiles, on the same device: the same q, scale and zero. Raises LayoutError."""
    return cuda_layout.pack(to_logical(weights, spec), spec)


def unpack(packed: Packed, spec: QuantSpec) -> Logical:
    """(q, scale, zero), as they were packed."""
    return cuda_layout.unpack(packed, spec)


def quantize_head(weight: Tensor, group: int = HEAD_GROUP, bits: int = 8) -> Packed:
    """A float weight `[N, K]`, rounded to 8 or 4 bits with a 16-bit scale for each row and group, slice by slice."""
    outputs, inputs = weight.shape
    size = group if inputs % group == 0 else inputs
    made: Packed | None = None
    for start in range(0, outputs, SLICE):
        part = _packed_rows(weight[start : start + SLICE], size, bits)
        if made is None:
            tiles = -(-outputs // cuda_layout.TILE)
            words, scales = (tensor.new_empty(tiles, *tensor.shape[1:]) for tensor in (part.words, part.scales))
            made = replace(part, words=words, scales=scales, outputs=outputs)
        at = start // cuda_layout.TILE
        made.words[at : at + len(part.words)] = part.words
        made.scales[at : at + len(part.scales)] = part.scales
    assert made is not None
    return made


def _packed_rows(rows: Tensor, group: int, bits: int) -> Packed:
    if bits == 8:
        return cuda_layout.pack_int8(*_rounded(rows, group))
    spec = QuantSpec(bits, group if group in GROUP_SIZES else PER_ROW)
    return cuda_layout.pack(quantize(rows if rows.dtype in DTYPES else rows.half(), spec), spec)


def _rounded(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    parts = rows.float().unflatten(1, (-1, group))
    if not torch.isfinite(parts).all():
        raise LayoutError("the weight holds NaN or Inf values and cannot be quantized")
    scale = (parts.abs().amax(2) / 127).clamp(min=2.0**-24).half()
    q = (parts / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return q.flatten(1), scale


def join(parts: list[Packed]) -> Packed:
    """Linears of the same inputs as one, whose outputs are theirs in order. Raises LayoutError where tiles differ."""
    first = parts[0]
    alike = {(p.inputs, p.group, p.bits, p.scale) for p in parts}
    uneven = [p.outputs for p in parts[:-1] if p.outputs % cuda_layout.TILE]
    if len(alike) > 1 or uneven:
        raise LayoutError(f"linears with tiles of {sorted(map(str, alike))}, outputs {uneven}, cannot be joined")
    words, scales = (torch.cat([getattr(p, name) for p in parts]) for name in ("words", "scales"))
    return replace(first, words=words, scales=scales, outputs=sum(p.outputs for p in parts))


def split(joined: Packed, outputs: list[int]) -> list[Packed]:
    """The parts of what was joined, as views of it."""
    found, at = [], 0
    for count in outputs:
        tiles = slice(at // cuda_layout.TILE, -(-(at + count) // cuda_layout.TILE))
        found.append(replace(joined, words=joined.words[tiles], scales=joined.scales[tiles], outputs=count))
        at += count
    return found


def w4_linear(x: Tensor, packed: Packed, spec: QuantSpec, bias: Tensor | None = None) -> Tensor:
    """x `[M, K]` times 4-bit weights -> `[M, N]` in x's dtype."""
    if packed.bits != 4 or spec.bits > 4:
        raise LayoutError(f"the tiles hold weights of {packed.bits} bits, the spec says {spec.bits}")
    return linear(x, packed, bias)


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x `[M, K]` times any packed weights -> `[M, N]` in x's dtype."""
    from tinychat_kernels import cuda_library

    wide = None if bias is None else bias.to(x.dtype)
    sizes = packed.inputs, packed.outputs, packed.group, packed.scale
    return cuda_library.linear(x.contiguous(), packed.words, packed.scales, wide, *sizes)


def compute(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """As `linear`: by the kernels on a GPU, where this shape has passed its check, else by plain torch."""
    if x.device.type != "cuda" or not len(x) or obstacle(x.dtype, x.device) is not None:
        return plain(x, packed, bias)
    device = gpu(x.get_device())
    if not passed(device, packed, x.dtype, len(x)):
        return plain(x, packed, bias)
    out = x.new_empty(len(x), packed.outputs)
    launch_linear(device, x, packed, bias, out, device.processors)
    return out


def kind(rows: int, bits: int) -> str:
    """What computes so many rows: gemv, gemm, or dequantize, which leaves the product to torch."""
    if rows <= cuda_linear.GEMV_ROWS:
        return "gemv"
    return "gemm" if bits == 4 and rows <= MOST_GEMM_ROWS else "dequantize"


def variant(rows: int, bits: int) -> str:
    """The kind, and which of its kernels."""
    how = kind(rows, bits)
    if how == "gemv":
        return f"gemv m{1 if rows == 1 else cuda_linear.GEMV_ROWS}"
    return f"gemm r{cuda_linear.gemm_block(rows).rows}" if how == "gemm" else how


def launch_linear(
    launch: Launch, x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor, processors: int = 1
) -> None:
    """x `[M, K]` times packed weights, plus bias `[N]` -> out `[M, N]`, by what suits so many rows and processors.

    out is of x's dtype or fp32. Up to GEMV_ROWS rows nothing is allocated.
    """
    rows = len(x)
    how = kind(rows, packed.bits)
    if how == "gemv":
        cuda_linear.gemv(launch, x, packed, bias, out)
    elif how == "gemm" and out.dtype == x.dtype:
        parts = x.new_empty(cuda_linear.gemm_parts(packed, rows, processors), dtype=torch.float32)
        cuda_linear.gemm(launch, x, packed, bias, out, parts if parts.numel() else None)
    else:
        multiply_decoded(launch, x, packed, bias, out)


def multiply_decoded(launch: Launch, x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor) -> None:
    """By torch, with weights that are dequantized a slice of outputs at a time."""
    for at, part in _slices(packed, max(1, SLICE_BYTES // (2 * packed.inputs * cuda_layout.TILE))):
        weight = x.new_empty(part.outputs, packed.inputs)
        cuda_linear.dequantize(launch, part, weight)
        own = None if bias is None else bias[at : at + part.outputs]
        out[:, at : at + part.outputs] = torch.nn.functional.linear(x, weight, own)


def plain(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The same by torch alone, on any device: a slice of tiles is dequantized at a time."""
    out = torch.cat([x @ weight.T for weight in floats(packed, x.dtype)], dim=1)
    return out if bias is None else out + bias


def floats(packed: Packed, dtype: torch.dtype, tiles: int = PLAIN_TILES) -> Iterator[Tensor]:
    """The weight `[N, K]` that tiles stand for, so many of them at a time."""
    return (_float(part, dtype) for _, part in _slices(packed, tiles))


def _slices(packed: Packed, tiles: int) -> Iterator[tuple[int, Packed]]:
    """Packed weights so many tiles at a time, each with its first output."""
    size = cuda_layout.TILE
    for at in range(0, len(packed.words), tiles):
        count = min(packed.outputs - at * size, tiles * size)
        words, scales = packed.words[at : at + tiles], packed.scales[at : at + tiles]
        yield at * size, replace(packed, words=words, scales=scales, outputs=count)


def _float(packed: Packed, dtype: torch.dtype) -> Tensor:
    if packed.bits == 4:
        padded = replace(packed, inputs=packed.units * cuda_layout.UNIT)  # so that any groups are whole
        logical = cuda_layout.unpack(padded, QuantSpec(group_size=packed.group))
        return dequantize(logical, dtype)[:, : packed.inputs]
    q, scale = cuda_layout.unpack_int8(packed)
    wide = scale.to(dtype).repeat_interleave(packed.group, 1)[:, : packed.inputs]
    return q.to(dtype) * wide


def passed(device: Gpu, packed: Packed, dtype: torch.dtype, rows: int) -> bool:
    """Whether a shape's check has passed on this GPU: made at first use, and not while a graph is captured."""
    sizes = f"{packed.inputs}x{packed.outputs} g{packed.group} {packed.scale}".replace("torch.", "")
    name = f"{variant(rows, packed.bits)} {packed.bits} bits {sizes} {dtype}".replace("torch.", "")
    return _passed(device, name, lambda: check(device, packed, dtype, rows, device.processors))


def _passed(device: Gpu, name: str, examine: Callable[[], str | None]) -> bool:
    def wrong() -> str | None:
        stopped: KernelError | None = None
        try:
            reason = examine()
        except KernelError as error:
            reason, stopped = f"does not run ({error})", error
        if reason is not None:
            warnings.warn(f"{name} {reason} and runs on plain torch: see `tinychat doctor`", stacklevel=2)
        if stopped is not None:
            raise stopped
        return reason

    return cuda_checks.passed(device, name, wrong)


def check(launch: Launch, packed: Packed, dtype: torch.dtype, rows: int, processors: int = 1) -> str | None:
    """What is wrong with the last of so many rows in 64 outputs, and whether any output was left out; None: nothing."""
    device = packed.words.device
    generator = torch.Generator().manual_seed(packed.outputs)
    x = torch.randn((rows, packed.inputs), generator=generator).to(device, dtype)
    bias = torch.randn(packed.outputs, generator=generator).to(device, dtype)
    out = torch.full((rows, packed.outputs), float("nan"), dtype=dtype, device=device)
    launch_linear(launch, x, packed, bias, out, processors)
    count = len(packed.words)
    tiles = sorted({i * (count - 1) // (CHECKED_TILES - 1) for i in range(CHECKED_TILES)})
    part = replace(
        packed, words=packed.words[tiles], scales=packed.scales[tiles], outputs=len(tiles) * cuda_layout.TILE
    )
    columns = [t * cuda_layout.TILE + i for t in tiles for i in range(cuda_layout.TILE)]
    inside = [i for i, column in enumerate(columns) if column < packed.outputs]
    own = [columns[i] for i in inside]
    expected = (x[-1:].double() @ _float(part, torch.float64).T)[0, inside] + bias[own].double()
    return _wrong(out, out[-1, own], expected)


# Linears in 8 bits


def w8a8_linear(x: Tensor, packed: Int8, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x `[M, K]`, through an activation (cuda_int8.ACTIVATIONS), as ref.w8a8_linear -> `[M, N]` in x's dtype."""
    from tinychat_kernels import cuda_library

    wide = None if bias is None else bias.to(x.dtype)
    return cuda_library.int8_linear(x.contiguous(), packed.weight, packed.scale.float(), wide, activation)


def compute_int8(x: Tensor, packed: Int8, bias: Tensor | None, activation: str) -> Tensor:
    """As `w8a8_linear`: by the kernels on a GPU, where they take such rows and passed their check, else by torch."""
    unfit = x.device.type != "cuda" or not len(x) or obstacle(x.dtype, x.device) is not None
    if unfit or not cuda_int8.takes(x.shape[1]):
        return plain_int8(x, packed, bias, activation)
    device = gpu(x.get_device())
    outputs, inputs = packed.weight.shape
    side = cuda_int8.gemm_side(len(x), outputs, device.processors)
    name = f"int8 {inputs}x{outputs} in blocks of {side} {x.dtype}".replace("torch.", "")
    if not _passed(device, name, lambda: check_int8(device, packed, x.dtype, len(x), device.processors)):
        return plain_int8(x, packed, bias, activation)
    out = x.new_empty(len(x), outputs)
    cuda_int8.linear(device, x, packed, bias, out, activation, device.processors)
    return out


def plain_int8(x: Tensor, packed: Int8, bias: Tensor | None, activation: str) -> Tensor:
    """The same by torch alone, on any device."""
    return ref.w8a8_linear(cuda_int8.activated(x, activation), packed, bias).to(x.dtype)


def check_int8(launch: Launch, packed: Int8, dtype: torch.dtype, rows: int, processors: int = 1) -> str | None:
    """What is wrong with the last of so many rows in 64 outputs, and whether any output was left out; None: nothing."""
    outputs, inputs = packed.weight.shape
    device, generator = packed.weight.device, torch.Generator().manual_seed(outputs)
    x = torch.randn((rows, inputs), generator=generator).to(device, dtype)
    out = torch.full((rows, outputs), float("nan"), dtype=dtype, device=device)
    cuda_int8.linear(launch, x, packed, None, out, processors=processors)
    columns = sorted({i * (outputs - 1) // (CHECKED_OUTPUTS - 1) for i in range(CHECKED_OUTPUTS)})
    part = Int8(packed.weight[columns], packed.scale[columns])
    return _wrong(out, out[-1, columns], ref.w8a8_linear(x[-1:].float(), part)[0])


def _wrong(out: Tensor, found: Tensor, expected: Tensor) -> str | None:
    """What is wrong with the numbers that were looked at, and whether any output was left out; None: nothing."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    if not error <= TOLERANCE:
        return f"is off by {error:.1e}"
    return None if bool(out.isfinite().all()) else "leaves outputs out"
