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


def defective(folder: Path, unit: str, change: tuple[str, str], mode: Mode = MODES[0], arch: int = 80) -> GuardedLaunch:
    """Launches kernels in which a text, which stands there once, is another one."""
    old, new = change
    for path in build.KERNELS.glob("*.cu*"):
        shutil.copy(path, folder)
    holders = [path for path in (folder / f"{unit}.cu", *folder.glob("*.cuh")) if old in path.read_text("utf-8")]
    assert len(holders) == 1, f"{old!r} is in {[path.name for path in holders]}"
    text = holders[0].read_text("utf-8")
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {holders[0].name}"
    holders[0].write_text(text.replace(old, new), "utf-8")
    return GuardedLaunch(Emulator(mode, arch, folder))


def survives(check: Callable[[GuardedLaunch], None], folder: Path, unit: str, change: tuple[str, str]) -> bool:
    """Whether a defect passes a check in every mode; the check raises where it finds one."""
    for mode in MODES:
        try:
            check(defective(folder, unit, change, mode))
        except (AssertionError, EmulationError):
            return False
    return True
