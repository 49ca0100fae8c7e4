"""The GPU check without a GPU: a dry run of every stage, ops that are wrong, and how times are taken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import needs_compiler

import gpu_check
from gpu_checks import compiling, decoders, random_ops, sanitize, stages, supervise
from gpu_checks import machine as machines
from gpu_checks.store import Store, read
from tinychat_kernels import cuda, cuda_build, cuda_golden
from tinychat_kernels.errors import BuildError, KernelError

ROOT = Path(__file__).parents[2]
FACTS = {"gpu": "NVIDIA H100", "arch": "sm_90", "build": "0123456789", "dry": False, "torch": "2.11", "cuda": "13.0"}
FACTS |= {"compiler": "NVRTC 13.0", "date": "2026-11-21"}
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]
# What a GPU box need not have: it has torch, transformers and what these need.
ABSENT = ("prompt_toolkit", "rich", "typer", "platformdirs", "accelerate", "psutil", "PIL", "matplotlib", "pytest")


def run(folder: Path, *arguments: str) -> int:
    return gpu_check.main(["--dry-run", "--out", str(folder), *arguments])


def in_this_process(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str, dry: bool) -> int:
    """A run whose worker is this process, which starts at once and can be broken."""
    work = lambda self: stages.work(folder, names, 100.0, float("inf"), dry=dry)  # noqa: E731
    monkeypatch.setattr(supervise.Worker, "run", work)
    words = [word for name in names for word in ("--stage", name)]
    return gpu_check.main(["--out", str(folder), *words, *(["--dry-run"] if dry else [])])


# Whole runs


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """All stages once: their exit code and folder."""
    folder = tmp_path_factory.mktemp("gpu_check")
    return run(folder), folder


@needs_compiler
@pytest.mark.timeout(600)
def test_a_dry_run_of_every_stage(dry_run: tuple[int, Path]) -> None:
    code, folder = dry_run
    data = json.loads((folder / "gpu_check.json").read_text())
    wrong = {name: found for stage in data["stages"].values() for name, found in stage.items() if "said" in found}
    assert (code, [found for found in wrong.values() if not found["right"]]) == (0, [])
    assert list(data["stages"]) == list(gpu_check.STAGES) and data["facts"]["dry"]
    correct = data["stages"]["correctness"]
    assert {f"random {op} float16" for op in random_ops.RANDOM} < correct.keys()
    assert all("right" in found for name, found in correct.items() if name != "autoawq")
    assert [found["right"] for found in data["stages"]["sanitize"].values()] == [True, True]
    for name, found in data["stages"]["endtoend"].items():
        assert name == "copy" or (found["decode"] and (found["prefill"] or "compiled" in name)), name


@needs_compiler
@pytest.mark.timeout(600)
def test_a_dry_run_writes_a_table_that_claims_no_times(dry_run: tuple[int, Path]) -> None:
    text = (dry_run[1] / "gpu_check.md").read_text()
    assert text.startswith("# emulator (dry run: times mean nothing)")
    titles = "tiny, 4-bit head", "geometric mean, times ours", "decoded, then torch's product", "the engine's answer"
    for title in (*gpu_check.STAGES, *titles):
        assert title in text
    assert "Targets" not in text


@needs_compiler
@pytest.mark.timeout(600)
def test_a_second_run_finds_nothing_anew(
    dry_run: tuple[int, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = dry_run
    before = (folder / "gpu_check.json").read_text()
    assert in_this_process(monkeypatch, folder, "correctness", "kernels", dry=True) == 0
    assert (folder / "gpu_check.json").read_text() == before
    said = capsys.readouterr().out
    assert said.startswith("## correctness") and "## kernels" in said and "## endtoend" not in said
    assert said.rstrip().endswith("```") and "checks are right" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_this_process(monkeypatch, tmp_path, "kernels", dry=False) == supervise.NO_GPU
    assert capsys.readouterr().err.startswith("there is no GPU that the kernels run on: torch")
    assert list(tmp_path.iterdir()) == []


def test_it_needs_no_package_but_those_of_a_gpu_box() -> None:
    code = f"import sys; sys.path[:0] = {PATHS}; sys.modules |= dict.fromkeys({ABSENT}); from gpu_checks import stages"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Faults


def only(monkeypatch: pytest.MonkeyPatch, op: str, check: Callable[..., Any]) -> None:
    """Of stage correctness, this op alone, computed by this check."""

    def checked(machine: machines.Machine, store: Store) -> None:
        for name in (op, "norm"):
            find = lambda name=name: stages.correctness.at_random(machine, name, torch.float16)  # noqa: E731
            store.get("correctness", name, find)

    monkeypatch.setitem(random_ops.RANDOM, op, check)
    monkeypatch.setitem(stages.RUNS, "correctness", checked)


@needs_compiler
def test_an_op_that_is_off_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, "swiglu", lambda place, sizes: ("3x4096", 0.5, 4e-3))
    assert in_this_process(monkeypatch, tmp_path, "correctness", dry=True) == supervise.WRONG
    said = capsys.readouterr().out
    assert "WRONG: correctness: swiglu: 3x4096 is off by 5.0e-01; 4e-03 is allowed" in said
    assert "kernels" in said and "WRONG: swiglu" in said
    assert read(tmp_path / "gpu_check.json")["stages"]["correctness"]["norm"]["right"]  # the next one is tried


@needs_compiler
def test_an_op_that_raises_fails_the_run_and_names_its_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(place: cuda_golden.Place, sizes: random_ops.Sizes) -> random_ops.Case:
        sizes.one((5, 7)), sizes.one((4096,))
        raise KernelError("cuLaunchKernel failed: out of resources")

    only(monkeypatch, "swiglu", broken)
    assert in_this_process(monkeypatch, tmp_path, "correctness", dry=True) == supervise.WRONG
    expected = "swiglu: with the sizes [5, 4096]: KernelError: cuLaunchKernel failed: out of resources"
    assert f"WRONG: correctness: {expected}" in capsys.readouterr().out


@needs_compiler
@pytest.mark.parametrize("op", random_ops.RANDOM)
def test_an_op_that_writes_nothing_is_seen(op: str) -> None:
    place = cuda_golden.Place(lambda *args: None, torch.device("cpu"), torch.float16, 2)
    sizes = random_ops.Sizes(random_ops.random.Random(3), dry=True)
    _, error, bound = random_ops.RANDOM[op](place, sizes)
    assert not error <= bound


def test_a_stage_that_is_cut_off_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "dry_machine", lambda: SimpleNamespace(wait=None, faults=(KernelError,)))
    monkeypatch.setattr(stages, "facts", lambda machine: {**FACTS, "dry": True})
    monkeypatch.setitem(stages.RUNS, "kernels", lambda machine, store: store.get("kernels", "copy", dict))
    assert stages.work(tmp_path, ["kernels"], -1.0, float("inf"), dry=True) == supervise.CUT_OFF
    assert "kernels: the time is over before copy; run this stage again to go on" in capsys.readouterr().err


# The parts


def test_random_weights_are_what_the_layout_says() -> None:
    machine = machines.Machine("cpu", torch.device("cpu"), lambda *args: None, 2, 1 << 20, "sm_80", "", dry=True)
    for bits, inputs, group in ((4, 256, 128), (8, 256, 128), (4, 160, 32)):
        packed = decoders.random_packed(machine, 40, inputs, bits)
        assert (packed.bits, packed.group, packed.inputs, packed.outputs) == (bits, group, inputs, 40)
        weight = torch.cat(list(cuda.floats(packed, torch.float32)))
        assert weight.shape == (40, inputs) and 0.02 < float(weight.std()) < 0.09
        assert len(weight.unique()) > 300


def test_times_take_turns_among_weights_that_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machines.Machine("G", torch.device("cuda"), lambda *a: None, 132, 50 << 20, "sm_90", "NVRTC")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    assert machine.sets(8 << 20) == 20
    assert machine.sets(1 << 20) == machines.MOST_SETS
    assert machine.sets(500 << 20) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 20, 80 << 30))
    assert machine.sets(8 << 20) == 2


class FakeGpu:
    """torch.cuda's graphs and events with a clock of their own: each run takes 10 microseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.captured = 0.0, None
        for name, fake in {"CUDAGraph": self, "graph": self, "Event": self.event, "synchronize": None}.items():
            monkeypatch.setattr(torch.cuda, name, fake if callable(fake) else lambda *args: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: self)

    def __enter__(self) -> None:
        self.captured = 0

    def __exit__(self, *_: object) -> None:
        self.runs, self.captured = self.captured, None

    def run(self) -> None:
        if self.captured is None:
            self.now += 1e-5
        else:
            self.captured += 1

    def replay(self) -> None:
        self.now += 1e-5 * self.runs

    def event(self, enable_timing: bool) -> Any:
        found = SimpleNamespace(at=0.0, synchronize=lambda: None)
        found.record = lambda: setattr(found, "at", self.now)
        found.elapsed_time = lambda end: 1e3 * (end.at - found.at)
        return found

    __call__ = run


def test_seconds_are_those_of_one_run_in_a_graph_that_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machines.Machine("G", torch.device("cuda"), lambda *a: None, 132, 50 << 20, "sm_90", "NVRTC")
    fake = FakeGpu(monkeypatch)
    assert machine.seconds([fake.run, fake.run]) == pytest.approx(1e-5)
    assert fake.runs == 500  # 5 ms


def test_everything_that_is_launched_is_compiled_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, cuda_build.Target]] = []
    monkeypatch.setattr(cuda_build, "cubin", lambda unit, target, *_: asked.append((unit, target)))
    launch = SimpleNamespace(target=cuda_build.Target("sm_90"), compiler=None)
    assert compiling.compile_all(SimpleNamespace(launch=launch))["right"]
    assert {unit for unit, _ in asked} == set(cuda_build.units())
    assert ("w4_gemv", cuda_build.Target("sm_90", ("TINYCHAT_TYPE=bf16", "TINYCHAT_GROUP=32"))) in asked

    def refuse(unit: str, target: cuda_build.Target, *_: object) -> bytes:
        raise BuildError("ptxas died")

    monkeypatch.setattr(cuda_build, "cubin", refuse)
    found = compiling.compile_all(SimpleNamespace(launch=launch))
    assert not found["right"] and "norm : ptxas died" in found["said"]


CLEAN = "========= COMPUTE-SANITIZER\nchecked: norm\nchecked: linear\n========= ERROR SUMMARY: 0 errors\n"
RACE = (
    "========= COMPUTE-SANITIZER\nchecked: norm\n"
    "========= Error: Race reported between Write access at w4_gemm+0x10 in w4_gemm.cu:50\n"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)


@pytest.mark.parametrize(
    ("said", "code", "with_tool", "found"),
    [
        (CLEAN, 0, True, {"right": True, "said": "0 found in norm, linear"}),
        ("checked: norm\n", 0, False, {"right": True, "said": "0 found in norm"}),
        (RACE, 0, True, {"right": False, "said": "1 found, code 0: Error: Race reported between Write access at "
                         "w4_gemm+0x10 in w4_gemm.cu:50"}),
        (CLEAN, 3, True, {"right": False, "said": f"0 found, code 3: {' '.join(CLEAN.split())}"}),
        (CLEAN, None, True, {"missing": "the time ran out after norm, linear"}),
        ("Device not supported", 1, True, {"missing": "the tool does not run here: Device not supported"}),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says_is_understood(said: str, code: int | None, with_tool: bool, found: Any) -> None:
    assert sanitize.judged(said, code, with_tool=with_tool) == found
