"""The kernels with sanitizers, and on an Arm CPU that is emulated: their digests are those of a plain native build."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_cpu_kernels"
TOOLS = {
    "address": ["c++"],
    "thread": ["c++", "setarch"],
    "arm": ["c++", "aarch64-linux-gnu-g++", "qemu-aarch64"],
    "tests": ["c++"],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("check", TOOLS)
def test_a_check_is_clean(check: str) -> None:
    if missing := [tool for tool in TOOLS[check] if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}: see scripts/setup --dev")
    done = subprocess.run([SCRIPT, check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("check_cpu_kernels: clean\n")


def test_what_is_no_check_is_refused() -> None:
    done = subprocess.run([SCRIPT, "memory"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("there is no check memory; there are: address, thread, arm, tests\n")
