"""Sums and joins over processes on one machine, through memory that they share: some 10 us where a socket takes 1 ms.

Every rank makes the same calls in the same order. The structure is that of csrc/cpu/ranks.h.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tinychat_kernels import cpu
from tinychat_kernels.cpu import SCALES, Signatures
from tinychat_kernels.errors import KernelError

CONTROL = 128  # bytes of a rank's control block, as ranks.h has it
MARK = slice(64, 80)  # of a control block: nothing that a call needs
PIECE = 256 << 10  # bytes of a buffer
SPIN, CROWDED_SPIN = 50_000, 2_000  # nanoseconds until one that waits sleeps; where ranks outnumber the cores
PATIENCE = 100_000_000  # nanoseconds until a call looks around
DONE, NOT_YET = 0, 1

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Ranks(ctypes.Structure):
    """tc_ranks of ranks.h."""

    _fields_ = (
        ("memory", _POINTER),
        *((name, _INT64) for name in ("rank", "size", "piece", "spin", "done")),
        ("turn", ctypes.c_uint32),
        ("waiting", _INT32),
    )


_SIGNATURES: Signatures = {
    "tc_ranks_memory": (ctypes.c_size_t, (_INT64, _INT64)),
    "tc_ranks_sum": (ctypes.c_int, (_POINTER, _POINTER, _INT64, _INT32, _INT64)),
    "tc_ranks_gather": (ctypes.c_int, (_POINTER, _POINTER, _POINTER, _INT64, _POINTER, _INT64)),
}


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = cpu.library()
    cpu.declare(loaded, _SIGNATURES)
    return loaded


def memory_size(size: int, piece: int = PIECE) -> int:
    """Bytes of memory that so many ranks share. Raises KernelError where there are no kernels."""
    return _library().tc_ranks_memory(size, piece)


def mark_of(rank: int) -> slice:
    """Where in that memory a rank may leave 16 bytes of its own."""
    return slice(rank * CONTROL + MARK.start, rank * CONTROL + MARK.stop)


class Exchange:
    """A rank's place in memory of `memory_size` bytes, zeros at first. It is for one thread at a time.

    While others are waited for, signals are handled, and `who_is_gone` is asked every 0.1 s: a sentence ends the call,
    as a RuntimeError. After a call that has not come to its end there is no other.
    """

    def __init__(
        self, memory: mmap.mmap, rank: int, size: int, who_is_gone: Callable[[], str | None], piece: int = PIECE
    ) -> None:
        if len(memory) < memory_size(size, piece) or not 0 <= rank < size or piece % 64:
            raise KernelError(f"{len(memory)} bytes came for rank {rank} of {size} with pieces of {piece}")
        self._memory = (ctypes.c_char * len(memory)).from_buffer(memory)
        spin = SPIN if size <= cpu.usable_cores() else CROWDED_SPIN
        self._ranks = _Ranks(ctypes.addressof(self._memory), rank, size, piece, spin)
        self._who_is_gone = who_is_gone
        self._broken = False

    def sum(self, x: Tensor) -> None:
        """x, contiguous on the CPU, becomes the sum of every rank's: the same bits on all, added in float32.

        Raises KernelError where x is not so, RuntimeError where the ranks are out of step or one is gone.
        """
        _check(x)
        call = functools.partial(_library().tc_ranks_sum, ctypes.byref(self._ranks), x.data_ptr(), x.numel())
        self._finish(functools.partial(call, SCALES[x.dtype]))

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Every rank's x `[..., n]`, n its own of `widths`, side by side `[..., N]`. Raises as `sum` does."""
        _check(x)
        if len(widths) != self._ranks.size or x.shape[-1] != widths[self._ranks.rank]:
            raise KernelError(f"x has shape {list(x.shape)}, the ranks' widths are {list(widths)}")
        out = x.new_empty((*x.shape[:-1], sum(widths)))
        sizes = (_INT64 * len(widths))(*(width * x.element_size() for width in widths))
        rows = x.shape[:-1].numel()
        call = functools.partial(_library().tc_ranks_gather, ctypes.byref(self._ranks), x.data_ptr(), sizes, rows)
        self._finish(functools.partial(call, out.data_ptr()))
        return out

    def _finish(self, call: Callable[[int], int]) -> None:
        """Call until it is done. Whoever is gone may have brought its part before: one look more shows it."""
        if self._broken:
            raise RuntimeError("a call over the ranks was broken off before this one: they are out of step")
        self._broken = True
        gone = None
        while (state := call(PATIENCE)) == NOT_YET:
            if gone is not None:
                raise RuntimeError(gone)
            gone = self._who_is_gone()
        if state != DONE:
            raise RuntimeError("another rank has brought a tensor of another size: the ranks are out of step")
        self._broken = False


def _check(x: Any) -> None:
    if x.device.type != "cpu" or x.dtype not in SCALES or not x.is_contiguous():
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SCALES)
        raise KernelError(f"{x.dtype} on {x.device} came; what is summed is contiguous on cpu, one of {known}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise KernelError("what is summed over ranks carries no gradient")
