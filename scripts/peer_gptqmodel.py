#!/usr/bin/env python3
"""GPTQModel's AWQ on a text model, for scripts/bench_quantize.py; runs in an environment of its own.

    python scripts/peer_gptqmodel.py MODEL OUT CALIBRATION.jsonl [--group 128]

Needs gptqmodel, which is a peer to measure against and not a dependency.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--group", type=int, default=128)
    args = parser.parse_args()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports]
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig  # pyright: ignore[reportMissingImports]

    lines = args.calibration.read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    config = QuantizeConfig(bits=4, group_size=args.group, quant_method=METHOD.AWQ, format=FORMAT.GEMM, device="cpu")
    model = GPTQModel.load(args.model, config)
    model.quantize(texts, batch_size=1, backend=BACKEND.AWQ_TORCH)
    model.save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
