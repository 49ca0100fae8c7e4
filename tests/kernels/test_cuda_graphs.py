"""The step of a decoder as one CUDA graph: what is recorded, where, and what happens where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tinychat_kernels.cuda_decoder import Step
from tinychat_kernels.errors import KernelError

GPU = torch.device("cuda", 1)


class Recorded:
    """torch.cuda, which says what it is asked for, in order."""

    def __init__(self) -> None:
        self.said: list[object] = []
        self.device, self.stream = 0, "stream of 0"
        self.broken: Exception | None = None  # what ends a capture

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before = self.device, self.stream
        self.device, self.stream = device.index, f"stream of {device.index}"
        yield
        self.device, self.stream = before

    @contextmanager
    def on_stream(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def capture(self, graph: object, stream: str, capture_error_mode: str) -> Iterator[None]:
        """As torch's, which leaves its stream in place where the capture fails."""
        assert capture_error_mode == "thread_local"
        before, self.stream = self.stream, stream
        self.said.append("begin")
        yield
        if self.broken is not None:
            raise self.broken
        self.said.append("end")
        self.stream = before

    def note(self, what: str) -> None:
        self.said.append((what, self.device, self.stream))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()

    class Graph:
        def replay(self) -> None:
            found.note("replay")

    for name, fake in (
        ("CUDAGraph", Graph),
        ("graph", found.capture),
        ("device", found.on_device),
        ("stream", found.on_stream),
        ("Stream", lambda device: f"own stream of {device.index}"),
        ("current_stream", lambda device: f"stream of {device.index}"),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    return found


class Noting(Step):
    """A step on cuda:1 whose launches are noted."""

    def __init__(self, recorded: Recorded, captures_on: torch.device | None = GPU) -> None:
        self.inputs = torch.zeros((3, 2), dtype=torch.int32)
        self._graph: Any = None
        self._ran = False
        self._captures_on = captures_on
        self._recorded = recorded

    def _launches(self) -> None:
        self._recorded.note("launch")


def test_a_step_is_launched_then_captured_and_replayed_on_its_own_device(recorded: Recorded) -> None:
    step = Noting(recorded)
    steps = []
    for _ in range(3):
        step.run()
        steps.append(recorded.said[:])
        recorded.said.clear()
    replay = ("replay", 1, "stream of 1")
    assert steps == [
        [("launch", 1, "stream of 1")],
        ["begin", ("launch", 1, "own stream of 1"), "end", replay],
        [replay],
    ]
    assert (recorded.device, recorded.stream) == (0, "stream of 0")


@pytest.mark.parametrize("broken", [RuntimeError("operation not permitted"), KernelError("cuLaunchKernel failed")])
def test_a_step_that_cannot_be_captured_is_launched_and_that_is_said_once(
    recorded: Recorded, broken: Exception
) -> None:
    step, recorded.broken = Noting(recorded), broken
    step.run()
    with pytest.warns(UserWarning, match=f"^a step of 2 rows runs launch by launch: {broken}$") as said:
        step.run()
    assert len(said) == 1
    step.run()
    launch = ("launch", 1, "stream of 1")
    assert recorded.said[:4] == [launch, "begin", ("launch", 1, "own stream of 1"), launch]
    assert len(recorded.said) == 5 and "begin" not in recorded.said[4:]


def test_a_step_without_a_gpu_is_launched(recorded: Recorded) -> None:
    step = Noting(recorded, captures_on=None)
    step.run()
    step.run()
    assert recorded.said == [("launch", 0, "stream of 0")] * 2
