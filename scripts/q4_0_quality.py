#!/usr/bin/env python3
"""What llama.cpp's Q4_0 costs a decoder, beside our 4 bits: KL to the 16-bit model on held-out sequences.

    python -m pip install gguf && scripts/q4_0_quality.py SIXTEEN_BIT [QUANTIZED] [--samples 64] [--json]

SIXTEEN_BIT is the folder that QUANTIZED (the embedded model) was made from. gguf, llama.cpp's own package, rounds the
decoder's linears to Q4_0 (blocks of 32, one scale each); their activations and the head then stay in float32, which
llama.cpp does not do: that flatters it. Ours runs as it always does, with 8-bit activations and head.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import torch
from torch import nn

from tinychat import load
from tinychat.engine.engine import Engine
from tinychat.eval import divergence
from tinychat.eval.card import sees
from tinychat.eval.heldout import heldout, speaks_demo
from tinychat.placement import Placement

Q4_0 = gguf.GGMLQuantizationType.Q4_0


def opened(model: str | None, **placement: Any) -> Engine:
    ready = load.load_folder(load.resolve(model), Placement(device="cpu", **placement))
    return Engine(ready.model, ready.processor, context=ready.context)


def round_to_q4_0(engine: Engine) -> None:
    """Every linear of the decoder's layers becomes what Q4_0 makes of it."""
    layers: nn.Module = engine.model.get_submodule("llm.model.layers")  # pyright: ignore[reportAttributeAccessIssue]
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            blocks = gguf.quants.quantize(module.weight.detach().float().numpy(), Q4_0)
            rounded = torch.from_numpy(gguf.quants.dequantize(blocks, Q4_0))
            module.weight.data = rounded.to(module.weight.dtype)


def results(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row each for Q4_0 and ours."""
    base = opened(args.sixteen_bit, dtype="float32")
    kind = "demo" if speaks_demo(base.processor) else "plain"
    pictures = sees(base.processor)
    items = [item for item in heldout(kind).items(args.samples) if pictures or item.kind == "text"]
    held = [divergence.continued(base, item) for item in items]
    known = [divergence.coded(divergence.read(base, one).logits) for one in held]
    round_to_q4_0(base)
    rows: list[dict[str, Any]] = []
    for name, engine in (("Q4_0", base), ("tinychat", opened(args.quantized))):
        compared = [
            divergence.compare(one, there, divergence.read(engine, one).logits)
            for one, there in zip(held, known, strict=True)
        ]
        found = divergence.summarize(compared)
        rows.append({"weights": name, "tokens": found.tokens, "kl": asdict(found.kl), "top1": asdict(found.top1)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sixteen_bit")
    parser.add_argument("quantized", nargs="?")
    parser.add_argument("--samples", type=int, default=64, help="held-out sequences (%(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = results(args)
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        kl, top1 = row["kl"], row["top1"]
        print(
            f"{row['weights']:9} KL {kl['value']:.2e} ({kl['low']:.1e} to {kl['high']:.1e}) nats a token, "
            f"same likeliest token {100 * top1['value']:.2f} %, of {row['tokens']} tokens"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
