"""The worker: runs stages one after the other in this process, and keeps every figure as it is found."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_checks import correctness, endtoend, report, sanitize, sweeps
from gpu_checks.machine import Machine, dry_machine, facts, gpu_machine
from gpu_checks.store import BrokenDeviceError, Store
from gpu_checks.supervise import BROKEN, CUT_OFF, NO_GPU
from tinychat_kernels.errors import KernelError

RUNS = {"correctness": correctness.run, "sanitize": sanitize.run, "kernels": sweeps.run, "endtoend": endtoend.run}


def work(out: Path, names: Sequence[str], seconds: float, until: float, *, dry: bool) -> int:
    """Exit code: 0 where all stages have come to their end."""
    try:
        machine = dry_machine() if dry else gpu_machine()
    except KernelError as error:
        print(f"there is no GPU that the kernels run on: {error}", file=sys.stderr)
        return NO_GPU
    known = facts(machine)
    codes = [_stage(machine, out, known, name, min(time.time() + seconds, until)) for name in names]
    return max(codes)


def _stage(machine: Machine, out: Path, known: dict[str, object], name: str, until: float) -> int:
    store = Store(out / "gpu_check.json", known, until, machine.wait, machine.faults)
    try:
        RUNS[name](machine, store)
    except TimeoutError as error:
        print(f"{name}: {error}; run this stage again to go on", file=sys.stderr)
        return CUT_OFF
    except BrokenDeviceError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(BROKEN)
    finally:
        store.save()
        (out / "gpu_check.md").write_text(report.markdown(store.data), "utf-8")
    return 0
