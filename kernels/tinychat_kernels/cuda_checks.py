"""What is known of the kernels on the GPUs of this machine: which checks passed, kept in the cache folder.

A result counts for one GPU, driver, compiler and build of the kernels. Several processes may write: files appear by
renaming. That a check was begun is kept too: one that ends its process counts as failed at the next start.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinychat_kernels import cuda_build
from tinychat_kernels.cpu import cache_folder
from tinychat_kernels.cuda_driver import driver
from tinychat_kernels.errors import KernelError

if TYPE_CHECKING:
    from tinychat_kernels.cuda_gpu import Gpu

FILE = "cuda-checks.json"
MOST = 4096  # results kept, the newest
PASSED = ""
BEGUN = "begun by process "
ENDED = "ended the process that checked it; `tinychat doctor --cache --clear` lets it be tried again"
DRIVER_SIGNS = (Path("/proc/driver/nvidia/version"), Path("/etc/nv_tegra_release"))

Results = dict[str, str]  # a check -> what is wrong, PASSED where nothing is


def passed(device: Gpu, name: str, wrong: Callable[[], str | None]) -> bool:
    """Whether a check has passed here; `wrong` is called where nobody knows. While a graph is captured nobody asks.

    A kernel that cannot be compiled or launched fails for this process alone.
    """
    known = _known(here := place(device))
    if (result := known.get(name)) is not None:
        return result == PASSED
    if torch.cuda.is_current_stream_capturing():
        return True
    kept = f"{here} {name}"
    _keep({kept: f"{BEGUN}{os.getpid()}"})
    try:
        known[name] = found = wrong() or PASSED
    except KernelError as error:
        torch.cuda.synchronize(device.index)  # raises where the GPU is lost to this process: the check stays begun
        known[name], found = f"does not run: {error}", None
    except (KeyboardInterrupt, SystemExit, torch.cuda.OutOfMemoryError):
        _keep({kept: None})
        raise
    _keep({kept: found})
    return found == PASSED


def failures(device: Gpu) -> list[str]:
    """The checks that failed here, with what was wrong."""
    return [f"{name} {result}" for name, result in _known(place(device)).items() if result != PASSED]


@functools.cache
def place(device: Gpu) -> str:
    """What a result counts for: the GPU, the driver, the compiler, and the kernels as they are."""
    made = f"{device.target.arch} by {device.made_by}"
    return f"{_machine(device.index)} / {made} / {cuda_build.build_digest()[:8]} /"


def _machine(index: int) -> str:
    """The GPU, the CUDA version of its driver, and the driver's own build where the system says it."""
    sign = next((path for path in DRIVER_SIGNS if path.exists()), None)
    build = "" if sign is None else " ".join(sign.read_text("utf-8", "replace").partition("\n")[0].split())
    return f"{torch.cuda.get_device_name(index)} / CUDA {'.'.join(map(str, driver().version))} {build}"


@functools.cache
def _known(here: str) -> Results:
    """The results for a device of this process, which may grow."""
    head = f"{here} "
    found = {name.removeprefix(head): found for name, found in _read(_path()).items() if name.startswith(head)}
    ended = [name for name, result in found.items() if result.startswith(BEGUN) and not _is_running(result)]
    for name in ended:
        warnings.warn(f"{name} {ENDED}; until then plain torch computes", stacklevel=3)
    begun = {name for name, result in found.items() if result.startswith(BEGUN)}
    return {name: found[name] for name in found if name not in begun} | dict.fromkeys(ended, ENDED)


def _is_running(begun: str) -> bool:
    """Whether another process makes a check just now: this one makes it too."""
    number = begun.removeprefix(BEGUN)
    return number != str(os.getpid()) and Path("/proc", number).exists()


def _path() -> Path:
    return cache_folder() / FILE


def _read(path: Path) -> Results:
    """What a file holds; nothing where it is not there, or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _keep(more: Mapping[str, str | None]) -> None:
    """Add results to the file, and take out those that are None; a folder that cannot be written is left alone."""
    path = _path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        old = {name: found for name, found in _read(path).items() if name not in more}
        newest = [*old.items(), *((name, found) for name, found in more.items() if found is not None)][-MOST:]
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(dict(newest), file, indent=1)
        Path(file.name).replace(path)
