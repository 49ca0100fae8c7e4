#!/usr/bin/env python3
"""Check and time the CUDA kernels on this machine's GPU, in stages that may be run one by one and gone on with.

    scripts/gpu_check.py [--stage correctness|sanitize|kernels|endtoend] [--out FOLDER] [--again] [--dry-run]

Needs torch, transformers and a compiler (NVRTC or nvcc), and no installation. Writes gpu_check.json and gpu_check.md,
and prints a block to paste. A stage ends after 8 minutes at most; run it again, and it goes on where it was. All
take some 20 minutes together on a large GPU.

Exit codes: 0, nothing is wrong; 3, something is; 4, the time was too short; 5, there is no GPU that the kernels run on.
A target that is missed is shown, and is no failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

STAGES = ("correctness", "sanitize", "kernels", "endtoend")
SECONDS = 8 * 60 - 30.0  # of a stage


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    args = _arguments(given)
    os.environ.setdefault("TINYCHAT_CACHE", str(args.out.absolute() / "cache"))  # nothing else may say where
    if args.once:
        from gpu_checks import sanitize

        return sanitize.once(args.dry_run)
    if args.worker:
        from gpu_checks import stages

        return stages.work(args.out, args.stage or STAGES, args.seconds, args.until, dry=args.dry_run)
    return _supervised(args, given)


def _supervised(args: argparse.Namespace, given: list[str]) -> int:
    """Run the stages in a process that may be stopped and started again, and then say what was found."""
    from gpu_checks import report, supervise
    from gpu_checks.store import read

    names = args.stage or list(STAGES)
    path, until = args.out / "gpu_check.json", time.time() + args.seconds * len(names)
    if args.again:
        supervise.forget(path, names)
    command = [sys.executable, str(Path(__file__).resolve()), *given, "--worker", "--until", str(until)]
    code = supervise.Worker(command, path, until).run()
    data = read(path)
    if code == supervise.NO_GPU or not data:
        return code
    (args.out / "gpu_check.md").write_text(report.markdown(data), "utf-8")
    print(report.summary(data, names))
    return supervise.WRONG if report.wrong_results(data) else code


def _arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all, in this order")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the results")
    parser.add_argument("--again", action="store_true", help="forget what these stages found before")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes through the emulator, on a CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each stage, at most")
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
