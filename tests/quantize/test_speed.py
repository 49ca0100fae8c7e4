"""Probes of speed on machines that are busy, and whose clocks are coarse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle

import pytest
import torch

from tinychat.quantize import speed
from tinychat.quantize.speed import Probe, seconds_a_unit

UNITS = 1000


@dataclass
class Machine:
    """Clocks that stand but for what a probe takes: this thread's computing, and its waiting for a core besides."""

    computing: Iterator[float]
    waiting: Iterator[float]
    step: float = 0.0  # of the clock of this thread
    wall: float = 0.0
    thread: float = 0.0
    calls: list[float] = field(default_factory=list[float])
    threads: list[int] = field(default_factory=list[int])

    def perf_counter(self) -> float:
        return self.wall

    def thread_time(self) -> float:
        return self.thread // self.step * self.step if self.step else self.thread

    def probe(self, where: torch.device) -> tuple[Callable[[], object], int]:
        def work() -> None:
            took = next(self.computing)
            self.calls.append(took)
            self.threads.append(torch.get_num_threads())
            self.thread += took
            self.wall += took + next(self.waiting)

        return work, UNITS


def measured(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(speed, "time", machine)
    return seconds_a_unit(Probe(machine.probe, spreads=False), "cpu") * UNITS


def test_waiting_for_a_core_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Machine(cycle([0.012, 0.01]), cycle([0.25]))
    assert measured(busy, monkeypatch) == pytest.approx(0.01)
    assert len(busy.calls) == 3, "an estimate is not worth many seconds"


def test_the_quickest_counts_and_never_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0001, *[0.003] * 20, 0.001, *[0.003] * 100])
    machine = Machine(times, cycle([0.0]))
    assert measured(machine, monkeypatch) == pytest.approx(0.001)
    assert len(machine.calls) == 1 + speed.PROBES


def test_a_coarse_clock_of_the_thread_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(Machine(cycle([0.001]), cycle([0.002]), step=1.0), monkeypatch) == pytest.approx(0.003)


def test_one_thread_is_timed_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    before, machine = torch.get_num_threads(), Machine(cycle([0.001]), cycle([0.0]))
    monkeypatch.setattr(speed, "time", machine)
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 4)
    try:
        torch.set_num_threads(3)
        assert seconds_a_unit(Probe(machine.probe), "cpu") * UNITS == pytest.approx(0.001 / 3)
        torch.set_num_threads(9)
        assert seconds_a_unit(Probe(machine.probe), "cpu") * UNITS == pytest.approx(0.001 / 4)
        assert torch.get_num_threads() == 9 and set(machine.threads) == {1}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("probe", [speed.PRODUCT, speed.READING, speed.ROUNDING])
def test_the_probes_run(probe: Probe) -> None:
    work, units = probe.prepare(torch.device("cpu"))
    work()
    assert units >= 2**19
