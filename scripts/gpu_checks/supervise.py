"""The stages run in a process of their own: a kernel that hangs or breaks the GPU costs one figure, not the check."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_checks import store

WRONG, CUT_OFF, NO_GPU, BROKEN = 3, 4, 5, 6  # exit codes; the last is a worker's that can use the GPU no more
MOST_RESTARTS = 10
GRACE = 20.0  # seconds that a worker has to end by itself
TICK = 0.2


@dataclass(frozen=True, slots=True)
class Worker:
    """The command that runs the stages, where it writes its results, and when all must be over."""

    command: Sequence[str]
    path: Path
    until: float

    def run(self) -> int:
        """The exit code of the first process that ends by itself: others go on where one was stopped."""
        for _ in range(MOST_RESTARTS):
            code = self._once()
            if code is not None:
                return code
        print(f"the GPU broke {MOST_RESTARTS} times: no more is tried", file=sys.stderr)
        return BROKEN

    def _once(self) -> int | None:
        """The exit code of one process; None where it is to be started again."""
        process = subprocess.Popen(self.command, start_new_session=True)
        try:
            code = self._wait(process)
        finally:
            _end(process)
        if code in (None, BROKEN):
            return None
        return self._crashed(code) if code < 0 or code == 1 else code

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit code; None where the process was stopped since a figure took too long."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(TICK)
            running = store.read(self.path.with_name(store.RUNNING))
            if running and time.time() > running["until"]:
                said = f"took longer than {running['seconds']:.0f} seconds and was stopped"
                print(f"{store.blame(self.path, said)} {said}", file=sys.stderr)
                return None
            if time.time() > self.until + GRACE:
                self.path.with_name(store.RUNNING).unlink(missing_ok=True)  # no figure is to blame
                return CUT_OFF

    def _crashed(self, code: int) -> int | None:
        said = f"the process ended with {'signal' if code < 0 else 'code'} {abs(code)}"
        name = store.blame(self.path, said)
        print(f"{name or 'before any figure'}: {said}", file=sys.stderr)
        return None if name else code


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def forget(path: Path, stages: Sequence[str]) -> None:
    """Drop what these stages have found."""
    if data := store.read(path):
        for name in stages:
            data["stages"].pop(name, None)
        store.write(path, data)
