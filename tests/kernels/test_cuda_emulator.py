"""The emulator: what CUDA promises holds in all eight modes, and what a GPU would not forgive ends a launch."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emu import build
from emu.launcher import MODES, EmulationError, Emulator, Mode, guarded
from tinychat_kernels.errors import BuildError

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
UNIT = "emulator_probes"
PROBES = Emulator(sources=Path(__file__).parent)


def in_mode(mode: Mode, arch: int = 80) -> Emulator:
    return dataclasses.replace(PROBES, mode=mode, arch=arch)


def numbers(*shape: int, seed: int = 0, top: int = 99) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def run(emulator: Emulator, entry: str, *arguments: Tensor | float, block: int = 32, shared: int = 0) -> None:
    emulator.launch(UNIT, entry, (1, 1, 1), block, shared, *arguments)


@pytest.mark.parametrize("mode", MODES)
def test_shuffles(mode: Mode):
    x, out = numbers(64), torch.zeros(64, 8, dtype=torch.int32)
    run(in_mode(mode), "shuffles", guarded(x), out, block=64)
    warps, lane = x.reshape(2, 32), torch.arange(32)
    bits = [sum((int(value) & 1) << i for i, value in enumerate(warp)) for warp in warps]
    expected = [
        warps[:, torch.full((32,), 3)],
        warps[:, lane ^ 5],
        warps[:, torch.where(lane + 7 < 32, lane + 7, lane)],
        warps[:, torch.where(lane >= 9, lane - 9, lane)],
        warps[:, torch.where(lane % 8 < 7, lane + 1, lane)],
        torch.tensor(bits).to(torch.int32)[:, None].expand(2, 32),
        ((warps == 77).any(1) * 2 + 1)[:, None].expand(2, 32),
        warps[:, torch.where(lane < 16, lane ^ 1, lane ^ 2)],
    ]
    assert torch.equal(out, torch.stack(expected, -1).reshape(64, 8).to(torch.int32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("leave", [0, 40])
def test_barriers_wait_for_those_that_have_not_ended(mode: Mode, leave: int):
    x, out = numbers(96), torch.zeros(96, 3, dtype=torch.int32)
    run(in_mode(mode), "barriers", x, out, leave, block=96, shared=96 * 4)
    stay = x[leave:]
    assert set(out[leave:, 0].tolist()) == {int((stay & 1).sum())}
    assert set(out[leave:, 1].tolist()) == {int((stay == 77).any()) * 2 + 1}
    assert torch.equal(out[leave:, 2], stay.flip(0))


def test_arguments_arrive_in_registers_and_on_the_stack():
    values = [-3, 2**33, 0.5, numbers(1), -5, 1.5, 7, 8, 9, *(i + 0.25 for i in range(9)), -11]
    out = torch.zeros(3 * 2 * 2, 19)
    PROBES.launch(UNIT, "arguments", (3, 2, 2), (2, 4, 3), 0, *values, out)
    expected = torch.tensor([float(value) for value in values])
    assert torch.equal(out, expected.expand(12, 19))
    typed = [ctypes.c_float(v) if isinstance(v, float) else ctypes.c_longlong(v) if v == 2**33 else v for v in values]
    PROBES.launch(UNIT, "arguments", (3, 2, 2), (2, 4, 3), 0, *typed, out.zero_())
    assert torch.equal(out, expected.expand(12, 19))


def test_too_many_arguments_are_refused():
    with pytest.raises(EmulationError, match="too many arguments"):
        PROBES.launch(UNIT, "arguments", (1, 1, 1), 32, 0, *range(50))


@pytest.mark.parametrize(("dtype", "arch"), [(torch.float16, 75), (torch.float16, 80), (torch.bfloat16, 80)])
def test_products(dtype: torch.dtype, arch: int):
    a, b = numbers(16, 16).to(dtype), numbers(16, 8, seed=1).to(dtype)
    c, d = numbers(16, 8, seed=2).float(), torch.zeros(16, 8)
    name = "product_f16" if dtype == torch.float16 else "product_bf16"
    run(in_mode(Mode(), arch), name, a, b, c, d)
    assert torch.equal(d, a.float() @ b.float() + c)


@pytest.mark.parametrize("arch", [75, 80])
def test_products_of_integers(arch: int):
    a, b = (numbers(16, 32, top=256) - 128).to(torch.int8), (numbers(32, 8, seed=1, top=256) - 128).to(torch.int8)
    c, d = numbers(16, 8, seed=2), torch.zeros(16, 8, dtype=torch.int32)
    run(in_mode(Mode(), arch), "product_int8", a, b, c, d)
    assert torch.equal(d, a.int() @ b.int() + c)


def test_matrices():
    x, out = numbers(32, 8, top=30000).short(), torch.zeros(32, 4, 2, dtype=torch.int16)
    run(PROBES, "matrices", x, out, shared=512)
    assert torch.equal(out.permute(1, 0, 2).reshape(4, 8, 8), x.reshape(4, 8, 8))


@pytest.mark.parametrize(("eager", "early"), [(False, [-1, -1, -1]), (True, [1, 11, 0])])
def test_copies_land_late_or_early(eager: bool, early: list[int]):
    x, out = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]], dtype=torch.int32), torch.zeros(9).int()
    run(in_mode(Mode(eager=eager)), "copies", x, out, block=1, shared=48)
    assert out.reshape(3, 3).tolist() == [early, [1, *early[1:]], [1, 11, 0]]


def test_before_sm_80_copies_are_done_at_once():
    x, out = numbers(3, 4), torch.zeros(9).int()
    run(in_mode(Mode(), 75), "copies", x, out, block=1, shared=48)
    assert out.reshape(3, 3).tolist() == [[int(x[0, 1]), int(x[1, 1]), 0]] * 3


def rounds_are_right(entry: str, mode: Mode) -> bool:
    x, out = numbers(128), torch.zeros(128, dtype=torch.int32)
    run(in_mode(mode), entry, x, out, block=128, shared=512)
    return torch.equal(out, 4 * x.roll(-32) + 6)


def test_a_missing_barrier_shows_in_greedy_orders():
    assert all(rounds_are_right("safe_rounds", mode) for mode in MODES)
    assert not all(rounds_are_right("racing_rounds", mode) for mode in MODES)


FAULTS = (
    "memory was touched that belongs to no buffer",
    "memory was touched that belongs to no buffer",
    "wrote before the beginning of shared memory",
    "",  # lanes that end are not waited for
    "deadlock: 1 of 32 threads wait at a barrier, 31 for lanes of their warp",
    "lanes of a warp come to different operations or masks",
    "an address that is not aligned, or an index",
    "a thread ends while 1 of its copies are under way",
    "a copy of 16 bytes is not aligned",
    "a copy to outside shared memory",
    "an index that is out of its array",
    "shuffles from lane 16, which does not take part",
    "a lane that is not in its own mask 00000001",
)


@pytest.mark.parametrize(("what", "said"), list(enumerate(FAULTS)))
@pytest.mark.parametrize("mode", [MODES[0], MODES[3]])
def test_faults_end_the_launch(what: int, said: str, mode: Mode):
    x = guarded(torch.zeros(128, dtype=torch.int32))
    if not said:
        return run(in_mode(mode), "fault", what, x, 128, shared=512)
    with pytest.raises(EmulationError, match=rf"^fault: block \(0, 0, 0\), thread \d+: .*{re.escape(said)}"):
        run(in_mode(mode), "fault", what, x, 128, shared=512)
    run(PROBES, "shuffles", numbers(32), torch.zeros(32, 8, dtype=torch.int32))  # and the next one runs
    return None


def write_unit(folder: Path, body: str) -> Emulator:
    text = '#include "device.cuh"\nextern "C" __global__ void probe(float* out) { %s }\n'
    (folder / "unit.cu").write_text(text % body)
    return Emulator(sources=folder)


def test_shared_memory_is_poisoned(tmp_path: Path):
    out = torch.zeros(2, 64)
    emulator = write_unit(
        tmp_path, "float* s = shared_memory<float>() + threadIdx.x; *(out + threadIdx.x) = *s; *s = 1;"
    )
    for row in out:
        emulator.launch("unit", "probe", (2, 1, 1), 64, 256, row)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("__shared__ float s[4];", "the emulator knows no static shared memory"),
        ("atomicAdd(out, 1.0f);", "sums of floats in no fixed order are not deterministic"),
    ],
)
def test_what_is_not_ours_does_not_compile(tmp_path: Path, body: str, said: str):
    with pytest.raises(BuildError, match=said):
        write_unit(tmp_path, body).launch("unit", "probe", (1, 1, 1), 32, 0, torch.zeros(1))


PROGRAMS = {  # the emulator on this machine; with ucontext for its fibers; on an Arm CPU
    "native": (["g++"], []),
    "ucontext": (["g++", "-DEMU_UCONTEXT"], []),
    "arm": (["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64"]),
}


def output(name: str, folder: Path) -> str:
    (compiler, *flags), runner = PROGRAMS[name]
    if missing := [tool for tool in (compiler, *runner) if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}: see scripts/setup --dev")
    program, source = folder / name, Path(__file__).parent / "emulator_program.cpp"
    words = [f"-I{build.EMULATOR}", f"-I{build.EMULATOR / 'include'}", f"-I{build.KERNELS}", "-include", "emulator.h"]
    fixed = ["-std=c++17", "-O1", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing", "-DTINYCHAT_GROUP=32"]
    sources = [str(source), *map(str, build.EMULATOR.glob("*.cpp"))]
    subprocess.run([compiler, *flags, *fixed, *words, *sources, "-o", str(program)], check=True)
    return subprocess.run([*runner, str(program)], capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ucontext", "arm"])
def test_other_machines_and_contexts_compute_the_same(name: str, tmp_path: Path):
    expected, found = output("native", tmp_path), output(name, tmp_path)
    lines = expected.splitlines()
    assert len(lines) == 9 and len(set(lines[:8])) == 1 and lines[0].startswith("0 ")
    assert lines[8].startswith("1 block (0, 0, 0), thread 0: memory was touched that belongs to no buffer")
    assert found == expected
