"""What tests of the CUDA kernels share: a launcher that guards every tensor, numbers, and kernels with a defect."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emu import build
from emu.launcher import MODES, EmulationError, Emulator, Mode, guarded

HALVES = [(torch.float16, 75), (torch.float16, 80), (torch.bfloat16, 80)]  # dtypes, and the GPUs they are tried for
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
modes = pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.order} {'eager' if mode.eager else 'lazy'}")
halves = pytest.mark.parametrize(("dtype", "arch"), HALVES, ids=lambda value: str(value).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class GuardedLaunch:
    """Launches with copies of the tensors that end at forbidden pages, and brings back what was written to them."""

    emulator: Emulator = Emulator()

    def __call__(self, unit: str, entry: str, grid: tuple[int, int, int], block: int, shared: int, *args) -> None:
        spans = [_span(arg) if isinstance(arg, Tensor) else arg for arg in args]
        copies = [guarded(span) if isinstance(span, Tensor) else span for span in spans]
        self.emulator.launch(unit, entry, grid, block, shared, *copies)
        for span, copy in zip(spans, copies, strict=True):
            if isinstance(span, Tensor):
                span.copy_(copy)


def _span(tensor: Tensor) -> Tensor:
    """All of the memory from a tensor's first element to its last."""
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.as_strided((length,), (1,))


def launch_for(arch: int = 80, mode: Mode = MODES[0]) -> GuardedLaunch:
    return GuardedLaunch(Emulator(mode, arch))


def numbers(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0, heavy: bool = False) -> Tensor:
    """Gaussian ones, or heavy-tailed: of a Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(shape, generator=generator)
    if heavy:
        squares = torch.randn((3, *shape), generator=generator).square().mean(0)
        out = out / squares.sqrt().clamp(min=0.01)
    return out.to(dtype)


def relative(ours: Tensor, exact: Tensor) -> float:
    """How far ours is off, in parts of the exact result's norm; infinite where it holds NaN."""
    error = float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


@dataclass(frozen=True, slots=True)
class Defects:
    """A unit with one text of its sources replaced by another; `trims` are more of them, which leave entries out."""

    unit: str
    trims: tuple[tuple[str, str], ...] = ()

    def survive(self, check: Callable[[GuardedLaunch], None], folder: Path, change: tuple[str, str]) -> bool:
        """Whether a defect passes a check in every mode; the check raises where it finds one."""
        for path in build.KERNELS.glob("*.cu*"):
            shutil.copy(path, folder)
        for old, new in (*self.trims, change):
            self._replace(folder, old, new)
        return all(_passes(check, GuardedLaunch(Emulator(mode, sources=folder))) for mode in MODES)

    def _replace(self, folder: Path, old: str, new: str) -> None:
        paths = [folder / f"{self.unit}.cu", *folder.glob("*.cuh")]
        places = {path: path.read_text("utf-8").count(old) for path in paths}
        assert sum(places.values()) == 1, f"{old!r} stands {sum(places.values())} times in {self.unit}"
        path = max(paths, key=lambda path: places[path])
        path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")


def _passes(check: Callable[[GuardedLaunch], None], launch: GuardedLaunch) -> bool:
    try:
        check(launch)
    except (AssertionError, EmulationError):
        return False
    return True
