"""How fast this machine computes if nothing else runs on it, from short probes: what an estimate of time rests on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

PROBES = 48  # the quickest of so many is the one that was disturbed least
PATIENCE = 0.5  # seconds after which fewer have to do


@dataclass(frozen=True)
class Probe:
    """A piece of work: what is done again and again on a device, and its units; `spreads`: over the CPU's threads."""

    prepare: Callable[[torch.device], tuple[Callable[[], object], int]]
    spreads: bool = True


def seconds_a_unit(probe: Probe, device: str) -> float:
    """Seconds for one unit of some work; the first time it is done does not count.

    On a CPU one thread is timed, by its own clock: several wait for each other wherever another program has a core.
    """
    where = torch.device(device)
    work, units = probe.prepare(where)
    if where.type == "cuda":
        return _quickest(work, lambda: _on_device(work, where)) / units
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spent = _quickest(work, lambda: _on_thread(work))
    finally:
        torch.set_num_threads(threads)
    return spent / units / (min(threads, os.cpu_count() or 1) if probe.spreads else 1)


def _quickest(work: Callable[[], object], timed: Callable[[], float]) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + PATIENCE
    for _ in range(PROBES):
        best = min(best, timed())
        if time.perf_counter() > end:
            break
    return best


def _on_thread(work: Callable[[], object]) -> float:
    """The time in which this thread computed; a coarse clock may not have moved."""
    began, computed = time.perf_counter(), time.thread_time()
    work()
    return time.thread_time() - computed or time.perf_counter() - began


def _on_device(work: Callable[[], object], where: torch.device) -> float:
    began = time.perf_counter()
    work()
    torch.cuda.synchronize(where)
    return time.perf_counter() - began


def _product(device: torch.device) -> tuple[Callable[[], object], int]:
    """A product of matrices; its units are floating-point operations."""
    a, b = torch.ones(256, 512, device=device), torch.ones(512, 512, device=device)
    return lambda: torch.nn.functional.linear(a, b), 2 * a.numel() * len(b)


def _reading(device: torch.device) -> tuple[Callable[[], object], int]:
    """A matrix times one vector; its units are bytes of the matrix."""
    a, b = torch.ones(1, 2048, device=device), torch.ones(4096, 2048, device=device)
    return lambda: torch.nn.functional.linear(a, b), b.nbytes


def _rounding(device: torch.device) -> tuple[Callable[[], object], int]:
    """A round trip of weights through 4 bits; its units are weights."""
    groups = torch.ones(512, 8, 128, device=device)

    def work() -> None:
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = (high - low + 1) / 15
        (groups / scale - low).round_().clamp_(0, 15).add_(low).mul_(scale)

    return work, groups.numel()


PRODUCT, READING, ROUNDING = Probe(_product), Probe(_reading, spreads=False), Probe(_rounding)
