"""What `tinychat doctor --kernels` compares: right kernels pass, and any that is wrong or missing is named."""

from __future__ import annotations

import pytest
import torch
from emulated import needs_compiler

from emu.launcher import Emulator
from tinychat_kernels import cuda_golden
from tinychat_kernels.cuda_golden import CASES, Place
from tinychat_kernels.cuda_ops import Launch
from tinychat_kernels.errors import KernelError

LONG = ("linear", "attn_decode", "int8")  # seconds in the emulator


def place(launch: Launch, dtype: torch.dtype = torch.float16) -> Place:
    return Place(launch, torch.device("cpu"), dtype, processors=4)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [pytest.param(op, marks=[pytest.mark.slow] * (op in LONG)) for op in CASES])
def test_the_kernels_are_right(op: str, dtype: torch.dtype) -> None:
    (found,) = cuda_golden.results(place(Emulator().launch, dtype), (op,))
    assert found.right and 0 <= found.worst <= found.bound, found


@pytest.mark.parametrize("op", CASES)
def test_a_kernel_that_does_nothing_is_wrong(op: str) -> None:
    (found,) = cuda_golden.results(place(lambda *args: None), (op,))
    assert not found.right and found.case and not found.error


def test_a_kernel_that_cannot_be_launched_is_wrong_and_says_why() -> None:
    def launch(unit, entry, grid, block, shared, *args) -> None:
        raise KernelError(f"{unit}.cu cannot be compiled")

    found = list(cuda_golden.results(place(launch)))
    assert [result.op for result in found] == list(CASES)
    assert all(result.error.endswith(".cu cannot be compiled") and not result.right for result in found)
