#!/usr/bin/env python3
"""GPTQModel's AWQ on a text model, for scripts/bench_quantize.py; runs in an environment of its own.

    python scripts/peer_gptqmodel.py MODEL OUT CALIBRATION.jsonl [--bits 4] [--group 128]

Needs gptqmodel, which is a peer to measure against and not a dependency. Of 3 bits, which nobody else reads, it writes
16-bit weights that stand for them: each linear's answer to the identity.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    args = parser.parse_args()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports]
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig  # pyright: ignore[reportMissingImports]

    lines = args.calibration.read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    kind = {"quant_method": METHOD.AWQ, "format": FORMAT.GEMM, "device": "cpu"}
    model = GPTQModel.load(args.model, QuantizeConfig(bits=args.bits, group_size=args.group, **kind))
    model.quantize(texts, batch_size=1, backend=BACKEND.AWQ_TORCH)
    packed = args.out if args.bits == 4 else f"{args.out}.packed"
    model.save(packed)
    if packed != args.out:
        write_dense(args.model, GPTQModel.load(packed, backend=BACKEND.AWQ_TORCH, device="cpu").model, args.out)
        shutil.rmtree(packed)
    return 0


def write_dense(source: str, quantized: Any, out: str) -> None:
    """The source with the weights that the quantized linears stand for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    found = dict(quantized.named_modules())
    with torch.no_grad():
        for name, linear in dense.named_modules():
            if isinstance(linear, torch.nn.Linear) and name != "lm_head":
                unit = torch.eye(linear.in_features, dtype=torch.float16)
                answer = found[name](unit)
                linear.weight.copy_((answer - (0 if linear.bias is None else found[name].bias)).T)
                if linear.bias is not None:
                    linear.bias.copy_(found[name].bias)
        for name, parameter in dense.named_parameters():
            if "norm" in name:
                parameter.copy_(quantized.get_parameter(name))
    dense.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
