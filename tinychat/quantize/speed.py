"""How fast this machine computes if nothing else runs on it, from short probes: what an estimate of time rests on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

PROBES = 48  # the quickest of so many is the one that was disturbed least
PATIENCE = 0.5  # seconds after which fewer have to do
Probe = Callable[[torch.device], tuple[Callable[[], object], int]]  # what is done again and again, and its units


def seconds_a_unit(probe: Probe, device: str) -> float:
    """Seconds for one unit of some work; the first time it is done does not count."""
    where, best = torch.device(device), float("inf")
    work, units = probe(where)
    work()
    end = time.perf_counter() + PATIENCE
    for _ in range(PROBES):
        best = min(best, _spent(work, where))
        if time.perf_counter() > end:
            break
    return best / units


def _spent(work: Callable[[], object], where: torch.device) -> float:
    """Of one probe. On a CPU the time in which this thread computed: others that wait for a core do not count."""
    began, computed_before = time.perf_counter(), time.thread_time()
    work()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        return time.perf_counter() - began
    computed = time.thread_time() - computed_before
    return computed or time.perf_counter() - began  # a coarse clock may not have moved


def product(device: torch.device) -> tuple[Callable[[], object], int]:
    """A product of matrices; its units are floating-point operations."""
    a, b = torch.ones(256, 512, device=device), torch.ones(512, 512, device=device)
    return lambda: torch.nn.functional.linear(a, b), 2 * a.numel() * len(b)


def reading(device: torch.device) -> tuple[Callable[[], object], int]:
    """A matrix times one vector; its units are bytes of the matrix."""
    a, b = torch.ones(1, 2048, device=device), torch.ones(4096, 2048, device=device)
    return lambda: torch.nn.functional.linear(a, b), b.nbytes


def rounding(device: torch.device) -> tuple[Callable[[], object], int]:
    """A round trip of weights through 4 bits; its units are weights."""
    groups = torch.ones(512, 8, 128, device=device)

    def work() -> None:
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = (high - low + 1) / 15
        (groups / scale - low).round_().clamp_(0, 15).add_(low).mul_(scale)

    return work, groups.numel()
