#!/usr/bin/env python3
"""Quantize some layers of a model's width in a process of its own, and hold its peak memory and time against the plan.

scripts/bench_quantize_memory.py [--shape 1b] [--layers 2] [--tokens 4096] [--max-ram 2GiB] [--layout text] [--no-card]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from make_tiny_model import SHAPES, make_tiny_model

SEQLEN = 512


def measure(model: Path, out: Path, tokens: int, more: Sequence[str]) -> dict[str, Any]:
    """Plan and result of a run. Raises CalledProcessError."""
    samples = str(-(-tokens // SEQLEN))
    command = [sys.executable, "-m", "tinychat", "quantize", str(model), str(out), "--json", "--calib-samples", samples]
    command += ["--calib-seqlen", str(SEQLEN), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    plan = next(event["plan"] for event in events if event["event"] == "began")
    facts = next(event["facts"] for event in events if event["event"] == "written")
    return {"plan": plan, "peak_ram": facts["peak_ram"], "wall_s": facts["wall_s"]}


def report(found: dict[str, Any]) -> str:
    """The measured against the planned."""
    plan = found["plan"]
    stages = ", ".join(f"{name} {count / 2**20:,.0f}" for name, count in plan["ram"].items())
    kept = "in memory" if plan["hold"] else "on the disk"
    return "\n".join(
        (
            f"planned  {plan['peak_ram'] / 2**20:7,.0f} MiB ({stages}; states {kept}), {plan['seconds']:6.1f} s",
            f"measured {found['peak_ram'] / 2**20:7,.0f} MiB, {found['wall_s']:6.1f} s",
        )
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b", help="widths (%(default)s)")
    parser.add_argument("--layout", choices=["text", "vila", "llava_hf"], default="text", help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (%(default)s)")
    parser.add_argument("--hidden-size", type=int, help="another width of the decoder")
    parser.add_argument("--intermediate-size", type=int, help="another width of its MLP")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration (%(default)s)")
    parser.add_argument("--no-card", action="store_true", help="the layers alone, without a quality card")
    parser.add_argument("--max-ram", help="as for tinychat quantize")
    args = parser.parse_args(argv)
    more = ["--no-card"] * args.no_card + (["--max-ram", args.max_ram] if args.max_ram else [])
    changes: dict[str, Any] = {"layers": args.layers, "vocab_size": 320}
    changes |= {name: value for name in ("hidden_size", "intermediate_size") if (value := getattr(args, name))}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", args.layout, shape=args.shape, dtype="bfloat16", **changes)
        found = measure(model, Path(folder) / "out", args.tokens, more)
    print(report(found))
    return int(found["peak_ram"] > found["plan"]["peak_ram"])


if __name__ == "__main__":
    sys.exit(main())
