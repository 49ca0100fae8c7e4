"""The team of threads: with busy neighbours, after a fork, on fewer cores, called from several threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tinychat_kernels import cpu
from tinychat_kernels.errors import KernelError
from tinychat_kernels.layout import QuantSpec, from_logical, quantize

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)

KERNELS = Path(__file__).parents[2] / "kernels"
SPIN = "import sys; sys.stdout.write('.'); sys.stdout.flush()\nwhile True: pass"


@pytest.fixture(autouse=True)
def team() -> Iterator[None]:
    """Threads share even the smallest work."""
    cpu.set_least_work(0)
    yield
    cpu.set_least_work()
    cpu.set_threads(0)


def linear() -> cpu.Packed:
    spec = QuantSpec()
    weight = torch.randn((200, 256), generator=torch.Generator().manual_seed(0))
    return cpu.pack(from_logical(quantize(weight, spec), spec), spec)


def rows(count: int = 12) -> torch.Tensor:
    return torch.randn((count, 256), generator=torch.Generator().manual_seed(1))


def test_any_number_of_threads_is_taken_at_once() -> None:
    packed, x = linear(), rows()
    whole = cpu.linear(x, packed)
    for threads in (1, 4, 2, 3, 1, 8):
        cpu.set_threads(threads)
        assert cpu.threads() == threads
        assert torch.equal(cpu.linear(x, packed), whole)
    cpu.set_threads(0)
    assert cpu.threads() >= 1


@pytest.mark.parametrize("count", [-1, 1025])
def test_odd_numbers_of_threads_are_refused(count: int) -> None:
    with pytest.raises(KernelError, match=f"{count} threads were asked for; 1 to 1024 run, 0 means the default"):
        cpu.set_threads(count)


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """Another program on every core."""
    programs = [
        subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE) for _ in range(os.cpu_count() or 1)
    ]
    for program in programs:
        assert program.stdout is not None and program.stdout.read(1) == b"."
    yield
    for program in programs:
        program.kill()
        program.wait()
        assert program.stdout is not None
        program.stdout.close()


def test_threads_that_wait_sleep() -> None:
    cpu.set_threads(4)
    cpu.linear(rows(), linear())
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25  # of 1.5 if they looked all the time


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("busy_cores")
def test_busy_neighbours_do_not_stop_it() -> None:
    packed, x = linear(), rows()
    whole = cpu.linear(x, packed)
    for threads in (2, 4):
        cpu.set_threads(threads)
        for _ in range(200):
            assert torch.equal(cpu.linear(x, packed), whole)


def test_several_threads_may_call_at_once() -> None:
    packed, x = linear(), rows()
    whole = cpu.linear(x, packed)
    cpu.set_threads(2)
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda _: cpu.linear(x, packed), range(80)))
    assert all(torch.equal(result, whole) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's own, about forking with threads
def test_a_child_of_fork_has_threads_of_its_own() -> None:
    packed, x = linear(), rows()
    cpu.set_threads(3)
    whole = cpu.linear(x, packed)
    child = os.fork()
    if child == 0:
        same = torch.equal(cpu.linear(x, packed), whole) and cpu.threads() == 3
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(cpu.linear(x, packed), whole)


def in_python(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own that sees the kernels, and the library that is compiled already."""
    cache = str(cpu.cache_folder().parent)
    variables = {**os.environ, "PYTHONPATH": str(KERNELS), "TINYCHAT_CACHE": cache, **environment}
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=variables, check=False)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a cpuset")
def test_only_the_cores_of_the_process_are_used() -> None:
    core = min(os.sched_getaffinity(0))
    pin = f"import os; os.sched_setaffinity(0, {{{core}}})"
    done = in_python(f"{pin}; from tinychat_kernels import cpu; print(cpu.threads())")
    assert done.stdout == "1\n", done.stderr


def test_the_environment_forces_instructions() -> None:
    text = "from tinychat_kernels import cpu; print(cpu.available())"
    forced = in_python(text, TINYCHAT_ISA="generic").stdout
    assert forced.startswith("(True, 'generic instructions, ")
    missing = next(name for name in cpu.ISAS if name not in cpu.isas())
    for wrong in (missing, "mmx"):
        ended = in_python(text, TINYCHAT_ISA=wrong)
        assert ended.returncode == 1
        assert f"SettingError: TINYCHAT_ISA is '{wrong}', this CPU has generic" in ended.stderr


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of a process's memory")
def test_large_memory_may_lie_in_huge_pages() -> None:
    memory = cpu.empty(8 << 20)
    address, flags = memory.data_ptr(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            flags = line
    assert " hg" in flags  # asked for
    assert " sh" not in flags  # the system has none for shared memory by default
