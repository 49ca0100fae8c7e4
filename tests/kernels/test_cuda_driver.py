"""Launching through the driver's C interface, against a library that keeps what it is asked for."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from tinychat_kernels import build, cuda_driver
from tinychat_kernels.cuda_driver import Driver, word
from tinychat_kernels.errors import BuildError, KernelError


class Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("words", ctypes.c_uint64 * 8),
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        compiler = build.find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda_driver.cpp")
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(out)], check=True)
    return out


@pytest.fixture
def fake(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    for name in ("fake_pushes", "fake_pops", "fake_fail", "fake_current"):
        (ctypes.c_uint64 if name == "fake_current" else ctypes.c_int).in_dll(loaded, name).value = 0
    return loaded


def test_arguments_arrive_as_their_types(library: Path, fake: ctypes.CDLL) -> None:
    tensor = torch.zeros(4)
    words = [word(argument) for argument in (tensor, None, -5, 1.5, 0, 2**31 - 1, 0.0, 7)]
    driver = Driver(str(library))
    driver.launch(99, (3, 2, 1), (128, 1, 1), 512, 1234, words)
    last = Launch.in_dll(fake, "fake_last")
    assert (last.function, last.stream, last.shared) == (99, 1234, 512)
    assert (list(last.grid), list(last.block)) == ([3, 2, 1], [128, 1, 1])
    assert last.words[0] == tensor.data_ptr() and last.words[1] == 0
    low = ctypes.cast(last.words, ctypes.POINTER(ctypes.c_int32))
    assert (low[4], low[8], low[10], low[14]) == (-5, 0, 2**31 - 1, 7)
    assert ctypes.cast(last.words, ctypes.POINTER(ctypes.c_float))[6] == 1.5


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1])
def test_wide_ints_are_refused(number: int) -> None:
    with pytest.raises(KernelError, match=f"the argument {number} of a kernel is no 32-bit int"):
        word(number)


def test_a_module_and_its_entries(library: Path, fake: ctypes.CDLL) -> None:
    driver = Driver(str(library))
    module = driver.load(b"A cubin")
    function = driver.function(module, "entry")
    assert (module, function) == (500 + ord("A"), (500 + ord("A")) * 1000 + 5)
    driver.raise_shared(function, 99 * 1024)
    assert list((ctypes.c_int * 2).in_dll(fake, "fake_attribute")) == [8, 99 * 1024]
    assert driver.version == (12, 8)


def test_another_context_is_put_back(library: Path, fake: ctypes.CDLL) -> None:
    driver, current = Driver(str(library)), ctypes.c_uint64.in_dll(fake, "fake_current")
    with driver.on(0):
        assert current.value == 1010
        with driver.on(0):
            pass
    counts = [ctypes.c_int.in_dll(fake, name).value for name in ("fake_pushes", "fake_pops")]
    assert counts == [1, 1]


def test_what_the_driver_says_is_said(library: Path, fake: ctypes.CDLL) -> None:
    driver = Driver(str(library))
    with pytest.raises(KernelError, match=r"cuModuleGetFunction missing failed: out of cheese \(CUDA error 500\)"):
        driver.function(1, "missing")
    ctypes.c_int.in_dll(fake, "fake_fail").value = 1
    with pytest.raises(KernelError, match=r"cuLaunchKernel failed: out of cheese \(CUDA error 700\)"):
        driver.launch(1, (1, 1, 1), (1, 1, 1), 0, 0, [0] * 8)


def test_no_driver_is_a_sentence(library: Path) -> None:
    with pytest.raises(KernelError, match="the CUDA driver does not load: .*no-such-library"):
        Driver("no-such-library.so.1")
    with pytest.raises(KernelError, match=r"the CUDA driver libm.so.6 has no cuInit"):
        Driver("libm.so.6")
    assert library.name == cuda_driver.LIBRARY
