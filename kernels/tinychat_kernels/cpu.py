"""The CPU backend: linears with 4-bit and 8-bit weights in C++, by the instructions that this CPU has.

Weights are packed once (`pack`, `pack_int8`, `quantize_head`) and then serve any number of rows. Rows are rounded to
int8, a scale for each row and group, unless `exact`; a row's result has the same bits whatever stands beside it, for
any number of threads, on every instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinychat_kernels import build
from tinychat_kernels.errors import KernelError, LayoutError, SettingError
from tinychat_kernels.int8 import Int8
from tinychat_kernels.layout import AwqGemm, QuantSpec

ABI = 4
SCALES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # as tinychat.h numbers them
ISAS = ("generic", "avx2", "avxvnni", "avx512", "dotprod", "i8mm")
GROUPS = (128, 64, 32)  # of 4-bit blocks, the best first
HEAD_GROUP = 128
LEAST_WORK = 1 << 20  # as pool.cpp has it
HUGE = 2 << 20  # bytes of a huge page
ALIGNMENT = 64
SLICE = 4096  # rows of a head that are rounded at a time


Signatures = dict[str, tuple[Any, tuple[Any, ...]]]  # a function's name -> its result and arguments


@dataclass(frozen=True, slots=True)
class Packed:
    """The weights of a linear as the kernels read them: bytes, and what they hold."""

    blocks: Tensor  # uint8, aligned to 64 bytes
    in_features: int
    out_features: int
    group: int
    bits: int
    scale: torch.dtype


class _Weights(ctypes.Structure):
    """tc_weights of tinychat.h."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale", ctypes.c_int32),
    )


_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: Signatures = {
    "tc_abi": (ctypes.c_int, ()),
    "tc_isa": (ctypes.c_char_p, ()),
    "tc_set_isa": (ctypes.c_int, (ctypes.c_char_p,)),
    "tc_isa_supported": (ctypes.c_int, (ctypes.c_char_p,)),
    "tc_threads": (ctypes.c_int, ()),
    "tc_set_threads": (None, (ctypes.c_int,)),
    "tc_set_least_work": (None, (_INT64,)),
    "tc_usable_cores": (ctypes.c_int, ()),
    "tc_packed_size": (ctypes.c_size_t, (_POINTER,)),
    "tc_pack_w4": (None, (_POINTER, _POINTER, _POINTER, _POINTER, _INT64, _POINTER)),
    "tc_pack_w8": (None, (_POINTER, _POINTER, _POINTER, _POINTER)),
    "tc_linear": (ctypes.c_int, (_POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT64, _POINTER, ctypes.c_int)),
    "tc_quantize": (ctypes.c_int, (_POINTER, _INT64, _INT64, _INT64, _POINTER, _POINTER)),
    "tc_read": (ctypes.c_uint64, (_POINTER, _INT64)),
    "tc_products": (_INT64, (_INT64,)),
}


def available() -> tuple[bool, str]:
    """Whether the kernels run here, and on what, or why not. The first call may compile them.

    Raises SettingError for a TINYCHAT_ISA that this CPU does not have.
    """
    try:
        library()
    except SettingError:
        raise
    except KernelError as error:
        return False, str(error)
    return True, f"{isa()} instructions, {threads()} threads"


def library() -> ctypes.CDLL:
    """The compiled kernels: the installation's, else the cache's, compiled if need be. Raises KernelError."""
    loaded = _tried()
    if isinstance(loaded, KernelError):
        raise loaded.with_traceback(None)
    return loaded


@functools.cache
def _tried() -> ctypes.CDLL | KernelError:
    """The library, or why there is none: a process tries once."""
    try:
        path, loaded = build.load(cache_folder())
        declare(loaded, _SIGNATURES)
        if (found := loaded.tc_abi()) != ABI:
            raise KernelError(f"{path} has interface {found}, {ABI} is needed")
        if forced := os.environ.get("TINYCHAT_ISA"):
            _force_isa(loaded, forced)
    except KernelError as error:
        return error
    return loaded


def _force_isa(loaded: ctypes.CDLL, name: str) -> None:
    if loaded.tc_set_isa(name.encode()) != 0:
        known = ", ".join(one for one in ISAS if loaded.tc_isa_supported(one.encode()))
        raise SettingError(f"TINYCHAT_ISA is {name!r}, this CPU has {known}", "TINYCHAT_ISA")


def declare(loaded: ctypes.CDLL, signatures: Signatures) -> None:
    """Tell ctypes what the library's functions take and give."""
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments


def cache_folder() -> Path:
    """Where kernels are compiled to: below TINYCHAT_CACHE, or the platform's place for caches."""
    if chosen := os.environ.get("TINYCHAT_CACHE"):
        return Path(chosen).expanduser() / "kernels"
    import platformdirs

    return Path(platformdirs.user_cache_dir("tinychat", appauthor=False)) / "kernels"


def isa() -> str:
    """The instructions in use: one of ISAS."""
    return library().tc_isa().decode()


def isas() -> list[str]:
    """The instructions that this CPU has, the plainest first."""
    return [name for name in ISAS if library().tc_isa_supported(name.encode())]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Take other instructions for a while. Raises KernelError for those this CPU does not have."""
    before = isa()
    _set_isa(library(), name)
    try:
        yield
    finally:
        _set_isa(library(), before)


def _set_isa(loaded: ctypes.CDLL, name: str) -> None:
    state = loaded.tc_set_isa(name.encode())
    if state == 1:
        raise KernelError(f"there are no instructions {name!r}; known are {', '.join(ISAS)}")
    if state == 2:
        best = loaded.tc_isa().decode()
        raise KernelError(f"this CPU has no {name} instructions: unset TINYCHAT_ISA, and {best} is used")


def threads() -> int:
    """Threads that a call runs on."""
    return library().tc_threads()


def usable_cores() -> int:
    """Physical cores that this process may use: the threads by default."""
    return library().tc_usable_cores()


def set_threads(count: int) -> None:
    """Run on so many threads from the next call on; 0: the physical cores that this process may use."""
    if not 0 <= count <= 1024:
        raise KernelError(f"{count} threads were asked for; 1 to 1024 run, 0 means the default")
    library().tc_set_threads(count)


def set_least_work(products: int = LEAST_WORK) -> None:
    """Calls with fewer int8 products run on the caller's thread alone: waking others would take longer."""
    library().tc_set_least_work(products)


def empty(size: int) -> Tensor:
    """uint8 `[size]`, zeros, aligned to 64 bytes; from 2 MiB on in huge pages, where the system grants them."""
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
        return memory[-memory.data_ptr() % ALIGNMENT :][:size]
    # Private: the memory that processes share seldom gets huge pages. What is not touched costs nothing.
    pages = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE
    pages.madvise(mmap.MADV_HUGEPAGE)
    return memory[start : start + size]


def packed_size(in_features: int, out_features: int, group: int, bits: int, scale: torch.dtype) -> int:
    """Bytes that Packed.blocks of such a linear has."""
    shape = _Weights(None, in_features, out_features, group, bits, SCALES[scale])
    return library().tc_packed_size(ctypes.byref(shape))


def group_of(in_features: int, spec: QuantSpec) -> int:
    """Inputs a block of such a 4-bit linear. Groups of a row are split into equal parts. Raises LayoutError."""
    size = spec.group(in_features)
    for group in GROUPS:
        if size % group == 0:
            return group
    raise LayoutError(f"groups of {size} inputs are no multiple of {GROUPS[-1]}: the CPU kernels cannot hold them")


def pack(packed: AwqGemm, spec: QuantSpec, memory: Tensor | None = None) -> Packed:
    """AWQ's GEMM layout -> blocks, in `memory` of packed_size bytes where it is given: the same q, scale and zero.

    Raises LayoutError for shapes that do not fit.
    """
    rows, columns = packed.qweight.shape[0], packed.qweight.shape[1] * 8
    spec.check(rows, columns)
    out = _packed_in(memory, rows, columns, group_of(rows, spec), 4, _scale_dtype(packed.scales))
    qweight, qzeros, scales = (part.contiguous() for part in packed)
    library().tc_pack_w4(
        _weights(out), qweight.data_ptr(), qzeros.data_ptr(), scales.data_ptr(), spec.group(rows), out.blocks.data_ptr()
    )
    return out


def pack_int8(weight: Int8) -> Packed:
    """int8 rows with a scale each -> blocks."""
    rows, columns = weight.weight.shape
    out = _packed_in(None, columns, rows, columns, 8, _scale_dtype(weight.scale))
    _pack_rows(out, weight.weight, weight.scale[:, None], 0)
    return out


def head_group(columns: int, group: int = HEAD_GROUP) -> int:
    """Inputs that share a scale in a head of this width."""
    return group if columns % group == 0 else columns


def quantize_head(weight: Tensor, group: int = HEAD_GROUP, memory: Tensor | None = None) -> Packed:
    """A float weight `[N, K]`, rounded to int8 with a half-precision scale for each row and group, slice by slice.

    Raises LayoutError for NaN, Inf, and a value that no half-precision scale reaches.
    """
    rows, columns = weight.shape
    size = head_group(columns, group)
    out = _packed_in(memory, columns, rows, size, 8, torch.float16)
    for start in range(0, rows, SLICE):
        part = weight[start : start + SLICE].float().reshape(-1, columns // size, size)
        if not torch.isfinite(part).all():
            raise LayoutError("the weight holds NaN or Inf values and cannot be quantized")
        scale = _half_scale(part.abs().amax(2) / 127)
        q = (part / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
        _pack_rows(out, q.reshape(-1, columns), scale, start)
    return out


def _half_scale(wanted: Tensor) -> Tensor:
    """The least float16 that is no smaller, where rounding to the nearest would cut off the largest values.

    That is below float16's normal numbers alone: above them a scale is off by 1/2048 at most, a tenth of a step.
    """
    nearest = wanted.clamp(min=2.0**-24).half()
    if not torch.isfinite(nearest).all():
        raise LayoutError(f"the weight holds values up to {float(wanted.max()) * 127:.3g}, too large for 8 bits")
    coarse = (nearest.float() < wanted) & (wanted < 2.0**-14)
    return torch.where(coarse, (nearest.float() + 2.0**-24).half(), nearest)


def w4_linear(x: Tensor, packed: Packed, spec: QuantSpec, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """x `[M, K]` times 4-bit weights -> `[M, N]` in x's dtype."""
    if packed.bits != spec.bits and not (packed.bits == 4 and spec.bits == 3):
        raise LayoutError(f"the weights have {packed.bits} bits, the spec says {spec.bits}")
    return linear(x, packed, bias, exact=exact)


def w8a8_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x `[M, K]`, each row rounded to int8, times int8 weights -> `[M, N]` in x's dtype."""
    return linear(x, packed, bias)


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """x `[M, K]` times any packed weights -> `[M, N]` in x's dtype."""
    _check_rows(x, packed.in_features)
    if bias is not None and (bias.shape != (packed.out_features,) or bias.device.type != "cpu"):
        raise KernelError(f"the bias is {list(bias.shape)} on {bias.device}, [{packed.out_features}] on cpu is needed")
    rows = x.float().contiguous()
    out = torch.empty((x.shape[0], packed.out_features))
    wide = None if bias is None else bias.float().contiguous()
    failed = library().tc_linear(
        _weights(packed), rows.data_ptr(), rows.shape[1], rows.shape[0], out.data_ptr(), out.shape[1],
        None if wide is None else wide.data_ptr(), int(exact),
    )  # fmt: skip
    check_memory(failed, f"{rows.shape[0]} rows of {rows.shape[1]} inputs")
    return out.to(x.dtype)


def quantize(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """What a linear rounds x `[M, K]` to: int8 `[M, K]`, and scales `[M, K/group]` in float32."""
    _check_rows(x)
    if x.shape[1] % group:
        raise KernelError(f"rows of {x.shape[1]} values are no multiple of groups of {group}")
    rows = x.float().contiguous()
    values = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty((rows.shape[0], rows.shape[1] // group))
    failed = library().tc_quantize(rows.data_ptr(), *rows.shape, group, values.data_ptr(), scales.data_ptr())
    check_memory(failed, f"{rows.shape[0]} rows of {rows.shape[1]} inputs")
    return values, scales


def check_memory(failed: int, asked: str) -> None:
    """Raise KernelError where a call says that it found no memory."""
    if failed:
        raise KernelError(f"there is no memory to compute {asked}")


def _check_rows(x: Tensor, width: int | None = None) -> None:
    if x.dim() != 2 or x.device.type != "cpu" or width not in (None, x.shape[1]):
        wanted = f"[rows, {'inputs' if width is None else width}]"
        raise KernelError(f"x has shape {list(x.shape)} on {x.device}, {wanted} on cpu is needed")


def _packed_in(memory: Tensor | None, inputs: int, outputs: int, group: int, bits: int, scale: torch.dtype) -> Packed:
    size = packed_size(inputs, outputs, group, bits, scale)
    blocks = empty(size) if memory is None else memory
    fits = blocks.dtype == torch.uint8 and blocks.shape == (size,) and blocks.is_contiguous()
    if not fits or blocks.device.type != "cpu" or blocks.data_ptr() % ALIGNMENT:
        found = f"{list(blocks.shape)} of {blocks.dtype} on {blocks.device} at {blocks.data_ptr() % ALIGNMENT}"
        raise LayoutError(f"memory {found} came for {size} bytes aligned to {ALIGNMENT}")
    return Packed(blocks, inputs, outputs, group, bits, scale)


def _pack_rows(packed: Packed, values: Tensor, scales: Tensor, start: int) -> None:
    """int8 rows with scales `[rows, groups]` -> the blocks from output `start` on, a multiple of 16."""
    values, scales = values.contiguous(), scales.contiguous()
    head = packed_size(packed.in_features, start, packed.group, packed.bits, packed.scale)
    weights = _weights(packed, len(values))
    library().tc_pack_w8(weights, values.data_ptr(), scales.data_ptr(), packed.blocks.data_ptr() + head)


def _weights(packed: Packed, outputs: int | None = None) -> Any:
    shape = (packed.in_features, outputs or packed.out_features, packed.group, packed.bits, SCALES[packed.scale])
    return ctypes.byref(_Weights(packed.blocks.data_ptr(), *shape))


def _scale_dtype(scales: Tensor) -> torch.dtype:
    if scales.dtype not in SCALES:
        raise LayoutError(f"scales are {scales.dtype}; the CPU kernels hold {', '.join(map(str, SCALES))}")
    return scales.dtype
