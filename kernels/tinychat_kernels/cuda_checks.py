"""What is known of the kernels on the GPUs of this machine: which checks passed, kept in the cache folder.

A result counts for one GPU, driver and build of the kernels. Several processes may write: files appear by renaming.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinychat_kernels import cuda_build
from tinychat_kernels.cpu import cache_folder
from tinychat_kernels.cuda_driver import driver

if TYPE_CHECKING:
    from tinychat_kernels.cuda_gpu import Gpu

FILE = "cuda-checks.json"
MOST = 4096  # results kept, the newest
PASSED = ""

Results = dict[str, str]  # a check -> what is wrong, PASSED where nothing is


def passed(device: Gpu, name: str, wrong: Callable[[], str | None]) -> bool:
    """Whether a check has passed here; `wrong` is called where nobody knows. While a graph is captured nobody asks."""
    known = _known(device.index)
    if (result := known.get(name)) is not None:
        return result == PASSED
    if torch.cuda.is_current_stream_capturing():
        return True
    known[name] = found = wrong() or PASSED
    _keep({f"{place(device.index)} {name}": found})
    return found == PASSED


def failures(device: Gpu) -> list[str]:
    """The checks that failed here, with what was wrong."""
    return [f"{name} {result}" for name, result in _known(device.index).items() if result != PASSED]


@functools.cache
def place(index: int) -> str:
    """What a result counts for: the GPU, the driver, and the kernels as they are."""
    name = torch.cuda.get_device_name(index)
    return f"{name} / CUDA {'.'.join(map(str, driver().version))} / {cuda_build.build_digest()[:8]} /"


@functools.cache
def _known(index: int) -> Results:
    """The results for a device of this process, which may grow."""
    head = f"{place(index)} "
    return {name.removeprefix(head): found for name, found in _read(_path()).items() if name.startswith(head)}


def _path() -> Path:
    return cache_folder() / FILE


def _read(path: Path) -> Results:
    """What a file holds; nothing where it is not there, or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _keep(more: Results) -> None:
    """Add results to the file; a folder that cannot be written is left alone."""
    path = _path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        newest = list({**_read(path), **more}.items())[-MOST:]
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(dict(newest), file, indent=1)
        Path(file.name).replace(path)
