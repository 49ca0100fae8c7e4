"""RMSNorm with the residual's sum, and SwiGLU, in the emulator against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated import Defects, GuardedLaunch, halves, launch_for, modes, needs_compiler, numbers, relative
from torch import Tensor

from emu.launcher import Mode
from tinychat_kernels import cuda_ops, ref
from tinychat_kernels.errors import KernelError

pytestmark = needs_compiler
TOLERANCE = 2e-3
WIDTHS = (8, 256, 264, 4096, 8192, 8200, 16384)


def check_norm(launch: GuardedLaunch, rows: int, width: int, dtype: torch.dtype, delta: bool, heavy: bool) -> None:
    x, weight = numbers(rows, width, dtype=dtype, heavy=heavy), numbers(width, dtype=dtype, seed=1)
    more = numbers(rows, width, dtype=dtype, seed=2, heavy=heavy) if delta else None
    total, out = x.clone(), torch.full_like(x, float("nan"))
    cuda_ops.add_rms_norm(launch, total, more, weight, 1e-5, out)
    assert torch.equal(total, ref.add_rms_norm(x, more, weight, 1e-5)[0])
    _, exact = ref.add_rms_norm(total.double(), None, weight.double(), 1e-5)
    assert relative(out, exact) <= TOLERANCE


def check_swiglu(launch: GuardedLaunch, rows: int, inner: int, dtype: torch.dtype, heavy: bool) -> None:
    gate_up = numbers(rows, 2 * inner, dtype=dtype, heavy=heavy)
    out = torch.full((rows, inner), float("nan"), dtype=dtype)
    cuda_ops.swiglu(launch, gate_up, out)
    assert relative(out, ref.swiglu(gate_up.double())) <= TOLERANCE


@halves
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_against_float64(width: int, heavy: bool, dtype: torch.dtype, arch: int):
    rows = max(2, 512 // width)  # of fewer numbers, the rounding to bfloat16 alone may be off by more
    check_norm(launch_for(arch), rows, width, dtype, delta=True, heavy=heavy)
    check_norm(launch_for(arch), rows - 1, width, dtype, delta=False, heavy=heavy)


@halves
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("inner", [8, 2048, 2056, 14336])
def test_swiglu_against_float64(inner: int, heavy: bool, dtype: torch.dtype, arch: int):
    check_swiglu(launch_for(arch), 3, inner, dtype, heavy)


@modes
def test_in_every_order(mode: Mode):
    for launch in (launch_for(80, mode), launch_for(75, mode)):
        check_norm(launch, 3, 520, torch.float16, delta=True, heavy=True)
        check_swiglu(launch, 3, 264, torch.float16, heavy=True)


def test_a_row_depends_on_itself_alone():
    x, weight = numbers(5, 512), numbers(512, seed=1)
    together, alone = torch.empty_like(x), torch.empty_like(x)
    cuda_ops.add_rms_norm(launch_for(), x, None, weight, 1e-5, together)
    for row in range(5):
        cuda_ops.add_rms_norm(launch_for(), x[row : row + 1], None, weight, 1e-5, alone[row : row + 1])
    assert torch.equal(together, alone)


def test_large_gates_pass_and_small_ones_close():
    gate_up = torch.tensor([[-200.0, -20.0, 0.0, 20.0, 200.0, 1.0, 60000.0, -60000.0, *[2.0] * 8]]).half()
    out = torch.empty(1, 8).half()
    cuda_ops.swiglu(launch_for(), gate_up, out)
    assert torch.allclose(out.float(), ref.swiglu(gate_up.float()).half().float(), rtol=1e-3, atol=1e-6)


def test_nan_and_infinity_stay_in_their_row():
    x = numbers(3, 64)
    x[0, 5], x[2, 7] = float("nan"), float("inf")
    out = torch.empty_like(x)
    cuda_ops.add_rms_norm(launch_for(), x, None, torch.ones(64).half(), 1e-5, out)
    assert out[0].isnan().all() and out[2, 7].isnan() and out[1].isfinite().all()


@pytest.mark.parametrize(("width", "said"), [(12, "12 is no multiple of 8"), (16392, "16392 values is too wide")])
def test_widths_that_do_not_fit_are_refused(width: int, said: str):
    x = numbers(1, width)
    with pytest.raises(KernelError, match=said):
        cuda_ops.add_rms_norm(launch_for(), x, None, x[0], 1e-5, x)


DEFECTS = (
    ("scratch[threadIdx.x / kWarpSize] = value;\n    __syncthreads();", "scratch[threadIdx.x / kWarpSize] = value;"),
    ("join_lanes<How>(lane < warps ? scratch[lane] : none)", "join_lanes<How>(scratch[lane])"),
    ("other = lanes / 2; other > 0", "other = lanes / 2; other > 1"),
    ("held[i].set(values);\n            held[i].store(x + row + at);", "held[i].set(values);"),
    ("values[j] *= factor * by[j];", "values[j] *= factor;"),
    (" / width + eps", " / (kVector * blockDim.x) + eps"),
    ("if (at >= width) continue;\n        float values[kVector];\n", "float values[kVector];\n"),
    ("(2 * row + 1) * inner", "2 * row * inner + kVector"),
    ("if (at >= inner) return;", ""),
    ("__expf(-values[j])", "__expf(values[j])"),
)


def check_small(launch: GuardedLaunch) -> None:
    check_norm(launch, 2, 520, torch.float16, delta=True, heavy=False)
    check_swiglu(launch, 2, 264, torch.float16, heavy=False)


@pytest.mark.parametrize("change", DEFECTS, ids=range(len(DEFECTS)))
def test_defects_are_found(change: tuple[str, str], tmp_path: Path):
    assert not Defects("norm").survive(check_small, tmp_path, change)


def exact_norm(x: Tensor) -> Tensor:
    return x.double() * x.double().pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()


def test_eps_keeps_rows_of_zeros():
    x = torch.zeros(1, 64).half()
    x[0, 3] = 1e-3
    out = torch.empty_like(x)
    cuda_ops.add_rms_norm(launch_for(), x, None, torch.ones(64).half(), 1e-5, out)
    assert relative(out, exact_norm(x)) <= TOLERANCE
