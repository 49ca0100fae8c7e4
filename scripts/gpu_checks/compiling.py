"""Machine code for everything that is launched, on all cores at once: at first use it would be compiled bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpu_checks.machine import Machine
from gpu_checks.store import Json
from tinychat_kernels import cuda_build
from tinychat_kernels.cpu import cache_folder
from tinychat_kernels.cuda_build import Target
from tinychat_kernels.errors import BuildError

NO_BF16 = "sm_75"


def compile_all(machine: Machine) -> Json:
    """Every unit, in all parts that are ever loaded, for the machine's GPU."""
    launch: Any = machine.launch
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda wanted: _compiled(launch, *wanted), _wanted(launch.target.arch)))
    wrong = [said for said in done if said]
    return {"right": not wrong, "said": "; ".join(wrong) or f"{len(done)} cubins"}


def _wanted(arch: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Units with defines; of those with many entries only parts are ever loaded (cuda_linear.defines)."""
    for unit in cuda_build.units():
        if not unit.startswith("w4_"):
            yield unit, ()
            continue
        for dtype in ("f16",) if arch == NO_BF16 else ("f16", "bf16"):
            yield from ((unit, (f"TINYCHAT_TYPE={dtype}", f"TINYCHAT_GROUP={group}")) for group in (128, 64, 32))


def _compiled(launch: Any, unit: str, defines: tuple[str, ...]) -> str:
    """What the compiler complains of; empty where it does not."""
    try:
        cuda_build.cubin(unit, Target(launch.target.arch, defines), cache_folder(), launch.compiler)
    except BuildError as error:
        return f"{unit} {' '.join(defines)}: {error}"
    return ""
