"""Launches emulated kernels: `Emulator().launch(unit, entry, grid, block, shared, *arguments)`, as on a GPU."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu import build
from tinychat_kernels import cuda_linear

ORDERS = ("forward", "reverse", "greedy forward", "greedy reverse")  # as in scheduler.h
ROOM = 512  # bytes of a message
Argument = Tensor | int | float | Any | None  # Any: a number of ctypes


class EmulationError(Exception):
    """A kernel did what a GPU would not forgive: a fault, a deadlock, lanes that part."""


@dataclass(frozen=True, slots=True)
class Mode:
    """In which order threads run, and whether asynchronous copies land at once (eager) or when they are waited for."""

    order: str = ORDERS[0]
    eager: bool = False


MODES = tuple(Mode(order, eager) for eager, order in itertools.product((False, True), ORDERS))


@dataclass(frozen=True, slots=True)
class Emulator:
    """A GPU of a compute capability (75, 80 ...) that runs what is compiled from a folder, in one of MODES."""

    mode: Mode = Mode()
    arch: int = 80
    sources: Path = build.KERNELS
    defines: tuple[str, ...] = ()
    threads: int = min(2, os.cpu_count() or 1)

    def launch(
        self, unit: str, entry: str, grid: Sequence[int], block: int | Sequence[int], shared: int, *arguments: Argument
    ) -> None:
        """Run a kernel; tensors pass their address. Raises EmulationError."""
        defines = (*self.defines, *cuda_linear.defines(entry))
        kernel = getattr(build.unit(self.sources / f"{unit}.cu", self.arch, defines), entry)
        kinds, words = zip(*map(_word, arguments), strict=True) if arguments else ((), ())
        message = ctypes.create_string_buffer(ROOM)
        failed = build.runtime().emu_launch(
            kernel, _triple(grid), _triple((block,) if isinstance(block, int) else block), ctypes.c_uint(shared),
            ORDERS.index(self.mode.order), int(self.mode.eager), min(self.threads, math.prod(grid)),
            "".join(kinds).encode(), (ctypes.c_uint64 * len(words))(*words), message, ctypes.c_size_t(ROOM),
        )  # fmt: skip
        if failed:
            raise EmulationError(f"{entry}: {message.value.decode(errors='replace')}")


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy that ends (rounded up to 16 bytes) at a page nobody may touch."""
    runtime = build.runtime()
    size = tensor.numel() * tensor.element_size()
    memory = ctypes.c_void_p(runtime.emu_allocate(ctypes.c_size_t(size)))
    place = (ctypes.c_char * max(size, 1)).from_address(runtime.emu_begin(memory))
    weakref.finalize(place, runtime.emu_release, memory)
    if not size:
        return tensor
    return torch.frombuffer(place, dtype=tensor.dtype).reshape(tensor.shape).copy_(tensor)


def _word(argument: Argument) -> tuple[str, int]:
    """An argument's kind ('f': float) and its bits."""
    if isinstance(argument, Tensor):
        return "i", argument.data_ptr()
    value = getattr(argument, "value", argument)
    if isinstance(value, float):
        return "f", struct.unpack("<I", struct.pack("<f", value))[0]
    return "i", (value or 0) & (2**64 - 1)


def _triple(sizes: Sequence[int]) -> ctypes.Array[ctypes.c_uint]:
    return (ctypes.c_uint * 3)(*sizes, *(1,) * (3 - len(sizes)))
