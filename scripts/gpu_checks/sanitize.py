"""Stage sanitize: every op once under compute-sanitizer, for memory that is not its own and for races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from gpu_checks import compiling
from gpu_checks.machine import DRY_OPS, Machine, dry_machine, gpu_machine
from gpu_checks.store import Json, Store

STAGE = "sanitize"
TOOLS = ("memcheck", "racecheck")
SCRIPT = Path(__file__).parents[1] / "gpu_check.py"
WARM, LIMIT = "compiled with line numbers", 190.0  # seconds of a run
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
DONE = "checked: "  # said after each op
LINES = "-lineinfo"
QUIET = ("--print-limit", "5", "--report-api-errors", "no")  # libraries try what a driver may refuse
WRONG = 3


def run(machine: Machine, store: Store) -> None:
    """Every op without a tool, which compiles it, and then under each tool; or why one cannot be asked."""
    folder = store.path.parent
    store.get(STAGE, WARM, partial(checked, machine, folder, None), LIMIT + 20)
    for tool in TOOLS[:1] if machine.dry else TOOLS:
        store.get(STAGE, tool, partial(checked, machine, folder, tool), LIMIT + 20)


def checked(machine: Machine, folder: Path, tool: str | None) -> Json:
    """What a tool says of every op once, in a process of its own. A dry run goes without the tool."""
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(PLACES))
    if tool is not None and path is None and not machine.dry:
        return {"missing": "compute-sanitizer is not here: it comes with CUDA's toolkit"}
    under = [] if tool is None or machine.dry else [str(path), "--tool", tool, *QUIET]
    once = [sys.executable, str(SCRIPT), "--once", *(["--dry-run"] if machine.dry else [])]
    # Each tensor as memory of its own: in torch's pool nobody sees where one ends.
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if not machine.dry:
        more["TINYCHAT_CACHE"] = str(Path(os.environ["TINYCHAT_CACHE"]) / "with-lines")
    log = folder / f"sanitize-{tool or 'none'}.log"
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                [*under, *once], stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT, env={**os.environ, **more},
                check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    return judged(log.read_text("utf-8", "replace"), code, with_tool=bool(under))


def judged(said: str, code: int | None, *, with_tool: bool) -> Json:
    """A verdict from what was printed and the exit code, which is None where the time ran out."""
    done = [line.removeprefix(DONE) for line in said.splitlines() if line.startswith(DONE)]
    first = next((line.strip("= ").strip() for line in said.splitlines() if "=====" in line and " at " in line), "")
    if code is None:
        reached = ", ".join(done) or "nothing"
        return {"missing": f"the time ran out after {reached}" + (f"; it had found: {first}" if first else "")}
    summary = SUMMARY.search(said)
    if with_tool and (summary is None or "Device not supported" in said):
        return {"missing": f"the tool does not run here: {' '.join(said.split())[-300:]}"}
    problems = int(summary[1]) if summary else 0
    if problems == 0 and code == 0:
        return {"right": True, "said": f"0 found in {', '.join(done)}"}
    return {"right": False, "said": f"{problems} found, code {code}: {first or ' '.join(said.split())[-300:]}"}


def once(dry: bool) -> int:
    """Every op once in float16, small, with line numbers in the machine code; the exit code."""
    import torch

    from tinychat_kernels import cuda_compilers, cuda_golden

    cuda_compilers.OPTIONS = (*cuda_compilers.OPTIONS, LINES)  # the cache folder is another one
    machine = dry_machine() if dry else gpu_machine()
    if not dry:
        compiling.compile_all(machine)
    place = cuda_golden.Place(machine.launch, machine.device, torch.float16, machine.processors)
    wrong = 0
    for found in cuda_golden.results(place, DRY_OPS if dry else tuple(cuda_golden.CASES)):
        machine.wait()
        print(f"{DONE}{found.op}", flush=True)
        if not found.right:
            wrong += 1
            print(f"{found.op} is wrong: {found.error or f'{found.case} is off by {found.worst:.1e}'}", flush=True)
    return WRONG if wrong else 0
