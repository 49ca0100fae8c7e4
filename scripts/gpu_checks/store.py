"""Results on disk, one at a time, so that a check that was cut off goes on where it was."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinychat.errors import TinychatError
from tinychat_kernels.errors import KernelError

Json = dict[str, Any]
SAME = ("gpu", "build", "dry", "torch")  # facts without which results are another's
RUNNING = "running.json"  # which figure is being found, since when, and how long it may take
MOST_SECONDS = 120.0  # of a figure
FAULTS = (  # what a broken kernel, a missing part of torch or a lack of memory raise
    KernelError, TinychatError, RuntimeError, OSError, ValueError, TypeError, AttributeError, LookupError, ImportError,
    AssertionError, ArithmeticError, MemoryError,
)  # fmt: skip


class BrokenDeviceError(Exception):
    """After this fault the process can use the GPU no more."""


class Store:
    """One JSON file: facts, and results by stage and name. What was found with other kernels or elsewhere goes.

    `until` is when a stage's time is over; `alive` raises where the GPU has stopped working; `faults` are caught.
    """

    def __init__(
        self,
        path: Path,
        facts: Json,
        until: float = float("inf"),
        alive: Callable[[], object] = lambda: None,
        faults: tuple[type[Exception], ...] = FAULTS,
    ) -> None:
        self.path = path
        found = read(path)
        same = all(found.get("facts", {}).get(key) == facts[key] for key in SAME)
        self.data: Json = found if same else {"facts": facts, "stages": {}}
        self.until = until
        self._alive = alive
        self._faults = faults

    def stage(self, name: str) -> Json:
        return self.data["stages"].setdefault(name, {})

    def get(
        self, stage: str, name: str, find: Callable[[], Json], seconds: float = MOST_SECONDS, *, ours: bool = True
    ) -> Json:
        """A result: kept from before, or found now and kept. A fault is a result too: `ours` makes it a wrong one.

        Raises TimeoutError where the stage's time is over, BrokenDeviceError where the GPU works no more.
        """
        results = self.stage(stage)
        if name not in results:
            if time.time() > self.until:
                raise TimeoutError(f"the time is over before {name}")
            self._begin(stage, name, seconds, ours)
            print(f"{stage}: {name} ...", end="", flush=True)
            begun = time.monotonic()
            results[name] = self._found(find, ours)
            self.save()
            print(f" {time.monotonic() - begun:.1f} s{_mark(results[name])}", flush=True)
            self._running.unlink(missing_ok=True)
            self._check(name)
        return results[name]

    def save(self) -> None:
        """Write the file whole or not at all."""
        write(self.path, self.data)

    @property
    def _running(self) -> Path:
        return self.path.with_name(RUNNING)

    def _begin(self, stage: str, name: str, seconds: float, ours: bool) -> None:
        until = time.time() + seconds
        write(self._running, {"stage": stage, "name": name, "until": until, "seconds": seconds, "ours": ours})

    def _found(self, find: Callable[[], Json], ours: bool) -> Json:
        try:
            return find()
        except self._faults as error:
            return fault(f"{type(error).__name__}: {error}", ours)

    def _check(self, name: str) -> None:
        try:
            self._alive()
        except self._faults as error:
            raise BrokenDeviceError(f"after {name} the GPU works no more: {error}") from error


def _mark(found: Json) -> str:
    """What is to be seen at once."""
    if found.get("right") is False:
        return f", WRONG: {found['said']}"
    return f", not run: {found['missing']}" if "missing" in found else ""


def fault(said: str, ours: bool) -> Json:
    """What goes for the result of a figure that could not be found."""
    short = " ".join(said.split())[:400]
    return {"right": False, "said": short} if ours else {"missing": short}


def blame(path: Path, said: str) -> str | None:
    """Keep a fault as the result of the figure that was being found; its name, None where there was none."""
    place = path.with_name(RUNNING)
    running, data = read(place), read(path)
    if not running or not data:
        return None
    data["stages"].setdefault(running["stage"], {})[running["name"]] = fault(said, running["ours"])
    write(path, data)
    place.unlink(missing_ok=True)
    return f"{running['stage']}: {running['name']}"


def read(path: Path) -> Json:
    """What a file holds; nothing where it is not there, or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text("utf-8"))
    return {}


def write(path: Path, data: Json) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(data, file, indent=1)
    Path(file.name).replace(path)
