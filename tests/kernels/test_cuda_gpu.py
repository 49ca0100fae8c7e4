"""A GPU as the launcher sees it: what it compiles and loads, when, and what it puts on which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinychat_kernels import cuda_build, cuda_checks, cuda_gpu
from tinychat_kernels.cuda_build import Target
from tinychat_kernels.cuda_compilers import Nvcc
from tinychat_kernels.cuda_gpu import Gpu
from tinychat_kernels.errors import BuildError, KernelError


class FakeDriver:
    """Keeps what it is asked for."""

    version = (12, 8)

    def __init__(self) -> None:
        self.said: list[tuple] = []

    @contextmanager
    def on(self, device: int):
        yield

    def load(self, cubin: bytes) -> int:
        self.said.append(("load", cubin))
        return 7

    def function(self, module: int, name: str) -> int:
        self.said.append(("function", module, name))
        return len(name)

    def raise_shared(self, function: int, size: int) -> None:
        self.said.append(("shared", function, size))

    def launch(self, function, grid, block, shared, stream, words) -> None:
        self.said.append(("launch", function, tuple(grid), tuple(block), shared, stream, list(words)))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(cuda_gpu, "driver", lambda: fake)
    monkeypatch.setattr(cuda_checks, "driver", lambda: fake)
    monkeypatch.setattr(
        cuda_build,
        "cubin",
        lambda unit, target, folder, compiler: " ".join((unit, target.arch, *target.defines)).encode(),
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1000 + device))
    return fake


def test_a_unit_is_loaded_once_and_launched_on_torchs_stream(driver: FakeDriver) -> None:
    device = Gpu(3, Target("sm_87"), BuildError("none"))
    device("norm", "first", (2, 1, 1), 64, 128, None, 5)
    device("norm", "first", (2, 1, 1), (32, 2), 128, None, 5)
    device("norm", "second", (1, 1, 1), 32, 0)
    assert driver.said == [
        ("load", b"norm sm_87"),
        ("function", 7, "first"),
        ("launch", 5, (2, 1, 1), (64, 1, 1), 128, 1003, [0, 5]),
        ("launch", 5, (2, 1, 1), (32, 2, 1), 128, 1003, [0, 5]),
        ("function", 7, "second"),
        ("launch", 6, (1, 1, 1), (32, 1, 1), 0, 1003, []),
    ]


def test_no_more_of_a_unit_is_compiled_than_an_entry_needs(driver: FakeDriver) -> None:
    device = Gpu(0, Target("sm_87"), BuildError("none"))
    for entry in ("w4_gemv_f16_g128_m1", "w4_gemv_f16_g128_m8", "w4_gemv_bf16_g32_m1"):
        device("w4_gemv", entry, (1, 1, 1), 32, 0)
    device.load("w4_gemv")
    assert [said[1].decode() for said in driver.said if said[0] == "load"] == [
        "w4_gemv sm_87 TINYCHAT_TYPE=f16 TINYCHAT_GROUP=128",
        "w4_gemv sm_87 TINYCHAT_TYPE=bf16 TINYCHAT_GROUP=32",
        "w4_gemv sm_87",
    ]


def test_more_shared_memory_is_asked_for_when_more_is_needed(driver: FakeDriver) -> None:
    device = Gpu(0, Target("sm_87"), BuildError("none"))
    for shared in (48 * 1024, 50_000, 49_500, 70_000):
        device("norm", "entry", (1, 1, 1), 32, shared)
    assert [said[2] for said in driver.said if said[0] == "shared"] == [50_000, 70_000]


def test_machine_code_that_does_not_load_is_made_once_more(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    held, kept = [b"old"], True

    def load(cubin: bytes) -> int:
        if cubin == b"old":
            raise KernelError("cuModuleLoadData failed")
        return 9

    def forget(*args: object) -> bool:
        if kept:
            held[0] = b"new"
        return kept

    monkeypatch.setattr(driver, "load", load)
    monkeypatch.setattr(cuda_build, "cubin", lambda *args: held[0])
    monkeypatch.setattr(cuda_build, "forget", forget)
    assert Gpu(0, Target("sm_87"), BuildError("none")).load("norm") == 9
    held[0], kept = b"old", False
    with pytest.raises(KernelError, match="cuModuleLoadData failed"):
        Gpu(0, Target("sm_87"), BuildError("none")).load("norm")


def test_a_tensor_of_another_device_is_refused(driver: FakeDriver) -> None:
    with pytest.raises(KernelError, match="entry runs on cuda:1, a tensor of it is on cpu"):
        Gpu(1, Target("sm_87"), BuildError("none"))("norm", "entry", (1, 1, 1), 32, 0, torch.zeros(1))
    assert not driver.said


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_gpu.why_none() == f"torch {torch.__version__} is a build without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_gpu.why_none() == "torch finds no CUDA device; it is built for CUDA 13.0"
    cuda_gpu.gpu.cache_clear()
    with pytest.raises(KernelError, match="torch finds no CUDA device"):
        cuda_gpu.gpu(0)


def test_the_compiler_is_asked_for_as_driver_and_torch_are(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 7))
    asked: list[tuple] = []
    monkeypatch.setattr(cuda_gpu, "find_compiler", lambda *asks: asked.append(asks) or "compiler")
    cuda_gpu.gpu.cache_clear()
    device = cuda_gpu.gpu(0)
    cuda_gpu.gpu.cache_clear()
    assert (device.target, device.compiler, asked) == (Target("sm_87"), "compiler", [(12, 12, "sm_87")])


# What is known of a GPU


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> Path:
    monkeypatch.setattr(cuda_checks, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cuda_build, "build_digest", lambda: "0123456789")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(cuda_checks, "DRIVER_SIGNS", (tmp_path / "driver",))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """As a new process would begin."""
    cuda_checks._known.cache_clear()
    cuda_checks.place.cache_clear()


def test_a_check_is_made_once_and_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Gpu(0, Target("sm_87"), BuildError("none"))
    made: list[str] = []

    def wrong(result: str | None):
        return lambda: made.append("asked") or result

    assert cuda_checks.passed(device, "gemv", wrong(None)) and cuda_checks.passed(device, "gemv", wrong(None))
    assert not cuda_checks.passed(device, "gemm", wrong("is off by 1"))
    assert cuda_checks.failures(device) == ["gemm is off by 1"]
    forget()
    assert cuda_checks.passed(device, "gemv", wrong("new")) and not cuda_checks.passed(device, "gemm", wrong(None))
    assert len(made) == 2 and not list(folder.glob("*.part"))
    monkeypatch.setattr(cuda_build, "build_digest", lambda: "another")
    forget()
    assert cuda_checks.passed(device, "gemm", wrong(None)) and len(made) == 3
    assert not cuda_checks.passed(Gpu(1, Target("sm_90"), BuildError("none")), "gemm", wrong("is off"))


def test_nothing_is_checked_while_a_graph_is_captured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Gpu(0, Target("sm_87"), BuildError("none"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda_checks.passed(device, "gemv", lambda: pytest.fail("asked"))
    assert not list(folder.iterdir())


def gone() -> str:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return str(child.pid)


def fail(error: BaseException):
    def wrong() -> str | None:
        raise error

    return wrong


def test_a_kernel_that_does_not_run_fails_for_this_process_alone(folder: Path) -> None:
    device = Gpu(0, Target("sm_87"), BuildError("none"))
    assert not cuda_checks.passed(device, "gemv", fail(BuildError("no compiler")))
    assert not cuda_checks.passed(device, "gemv", lambda: pytest.fail("asked"))
    assert cuda_checks.failures(device) == ["gemv does not run: no compiler"]
    forget()
    assert cuda_checks.passed(device, "gemv", lambda: None)


def test_a_check_that_ended_its_process_is_not_made_again(folder: Path) -> None:
    device, path = Gpu(0, Target("sm_87"), BuildError("none")), folder / cuda_checks.FILE

    def crash() -> None:
        path.write_text(path.read_text().replace(f"process {os.getpid()}", f"process {gone()}"))
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        cuda_checks.passed(device, "gemv", crash)
    forget()
    with pytest.warns(UserWarning, match="^gemv ended the process that checked it; `tinychat doctor --cache --clear`"):
        assert not cuda_checks.passed(device, "gemv", lambda: pytest.fail("asked"))
    assert cuda_checks.failures(device)[0].startswith("gemv ended the process that checked it")


def test_a_check_that_a_running_process_makes_is_made_here_too(folder: Path) -> None:
    device, path = Gpu(0, Target("sm_87"), BuildError("none")), folder / cuda_checks.FILE
    path.write_text(json.dumps({f"{cuda_checks.place(device)} gemv": f"{cuda_checks.BEGUN}{os.getppid()}"}))
    assert cuda_checks.passed(device, "gemv", lambda: None)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("full")])
def test_a_check_that_was_interrupted_is_made_again(folder: Path, error: BaseException) -> None:
    device = Gpu(0, Target("sm_87"), BuildError("none"))
    with pytest.raises(type(error)):
        cuda_checks.passed(device, "gemv", fail(error))
    forget()
    assert cuda_checks.passed(device, "gemv", lambda: None)


def test_what_a_result_counts_for(folder: Path) -> None:
    compiler = Nvcc("/a/nvcc", (12, 6))
    places = [cuda_checks.place(Gpu(0, Target(arch), made)) for arch in ("sm_87", "sm_90") for made in (compiler,)]
    places.append(cuda_checks.place(Gpu(0, Target("sm_87"), BuildError("none"))))
    (folder / "driver").write_text("NVRM version: Module  580.65.06\nGCC")
    places.append(cuda_checks.place(Gpu(0, Target("sm_87"), compiler)))
    assert places[0] == "GPU 0 / CUDA 12.8  / sm_87 by nvcc 12.6 / 01234567 /"
    assert places[3] == "GPU 0 / CUDA 12.8 NVRM version: Module 580.65.06 / sm_87 by nvcc 12.6 / 01234567 /"
    assert len(set(places)) == 4


def test_a_damaged_file_counts_as_none(folder: Path) -> None:
    (folder / cuda_checks.FILE).write_text("{")
    device = Gpu(0, Target("sm_87"), BuildError("none"))
    assert cuda_checks.failures(device) == [] and cuda_checks.passed(device, "gemv", lambda: None)
    forget()
    assert cuda_checks.passed(device, "gemv", lambda: pytest.fail("asked"))


def test_a_models_own_gpu_is_the_current_one_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or nullcontext())
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        for name in ("cpu", "cuda:1"):
            with cuda_gpu.current(torch.device(name)):
                pass
    assert made == [torch.device("cuda:1")]
