"""Ranks on one machine that add up through memory they share; torch.distributed's sockets take a hundred times as long.

Whether they can is settled once, by all together: either every rank has such a group or none has.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tinychat_kernels import build, cpu
from tinychat_kernels.cpu_ranks import Exchange, mark_of, memory_size
from tinychat_kernels.errors import KernelError

SHARED = Path("/dev/shm")  # where Linux keeps files in memory
BOOT = Path("/proc/sys/kernel/random/boot_id")
MARK = 16  # bytes
ENDED = "ZX"  # states of a process that runs no more


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs: processes with the same `machine` may meet in memory, and see each other by these numbers."""

    machine: tuple[Any, ...]
    process: int
    started: int


class LocalRanks:
    """A group (tinychat.layers.parallel.Group) of several processes on this machine, of a gloo process group.

    It lives as long as a model that was loaded with it; then the memory is given back.
    """

    def __init__(self, process_group: Any, places: Sequence[Place], memory: mmap.mmap) -> None:
        self.process_group = process_group
        self._rank, self._size = process_group.rank(), process_group.size()
        self._exchange = Exchange(memory, self._rank, self._size, partial(_who_is_gone, places))

    @staticmethod
    def of(process_group: Any, wanted: bool = True) -> Any:
        """Such a group where all ranks can have it, else the process group. Every rank calls this alike.

        They cannot where one does not want to, has no kernels or no room in /dev/shm, or is on another machine or in
        another container. Raises RuntimeError where a connection is gone.
        """
        if process_group.size() == 1 or not _has_gloo(process_group):
            return process_group
        places = gathered(process_group, _place() if wanted else None)
        if any(place is None or place.machine != places[0].machine for place in places):
            return process_group
        memory = _met(process_group, places)
        return process_group if memory is None else LocalRanks(process_group, places, memory)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def takes(self, x: Tensor) -> bool:
        """Whether `sum` and `gather` are for such a tensor: float32, float16 or bfloat16 on the CPU."""
        return x.device.type == "cpu" and x.dtype in cpu.SCALES

    def sum(self, x: Tensor) -> None:
        """x, contiguous, becomes the sum of every rank's, added in float32 in their order: the same bits on all.

        Raises RuntimeError where a rank is gone.
        """
        self._exchange.sum(x)

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Every rank's contiguous `[..., n]`, n its own of `sizes`, side by side `[..., N]`. Raises as `sum` does."""
        return self._exchange.gather(x, sizes)


def _has_gloo(process_group: Any) -> bool:
    import torch.distributed as dist

    return isinstance(process_group, dist.ProcessGroup) and "cpu:gloo" in str(dist.get_backend_config(process_group))


def gathered(process_group: Any, value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    import torch.distributed as dist

    found: list[Any] = [None] * process_group.size()
    dist.all_gather_object(found, value, group=process_group)
    return found


def _place() -> Place | None:
    """Where this process runs; None where it can share no memory with another."""
    try:
        if sys.platform != "linux" or not cpu.available()[0]:
            return None
        namespaces = [str(Path("/proc/self/ns", name).readlink()) for name in ("pid", "mnt")]
        machine = (BOOT.read_text(), socket.gethostname(), *namespaces, SHARED.stat().st_dev, build.source_digest())
    except (OSError, KernelError):  # KernelError: TINYCHAT_ISA names what is not there
        return None
    started = _started(os.getpid())
    return None if started is None else Place(machine, os.getpid(), started)


def _started(process: int) -> int | None:
    """When a process was started, in the kernel's ticks; None where it has ended."""
    try:
        words = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if words[0].decode() in ENDED else int(words[19])


def _who_is_gone(places: Sequence[Place]) -> str | None:
    for rank, place in enumerate(places):
        if _started(place.process) != place.started:
            return f"the connection to rank {rank} is gone: its process has ended"
    return None


def _met(process_group: Any, places: Sequence[Place]) -> mmap.mmap | None:
    """Memory in which every rank has seen every other's mark, and its process; None, on all, where one has not."""
    path: Path | None = None
    memory: mmap.mmap | None = None
    try:
        if process_group.rank() == 0:
            path, memory = _made(memory_size(process_group.size()))
        path_of_all = gathered(process_group, path)[0]
        if path is None and path_of_all is not None:
            memory = _opened(path_of_all, memory_size(process_group.size()))
        mark = secrets.token_bytes(MARK)
        if memory is not None:
            memory[mark_of(process_group.rank())] = mark
        marks = gathered(process_group, mark)
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    met = memory is not None and all(memory[mark_of(rank)] == mark for rank, mark in enumerate(marks))
    return memory if all(gathered(process_group, met and _who_is_gone(places) is None)) else None


def _made(size: int) -> tuple[Path | None, mmap.mmap | None]:
    """A new file in memory, all of it granted; nothing where there is no room."""
    path = SHARED / f"tinychat-{os.getpid()}-{secrets.token_hex(8)}"
    with suppress(OSError):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            return path, mmap.mmap(descriptor, size)
        except OSError:
            path.unlink()
        finally:
            os.close(descriptor)
    return None, None


def _opened(path: Path, size: int) -> mmap.mmap | None:
    with suppress(OSError, ValueError):  # mmap's where the file is smaller
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    return None
