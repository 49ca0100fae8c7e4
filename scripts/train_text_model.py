#!/usr/bin/env python3
"""Train a small text model on Python's own library, with or without outlier channels: something to quantize.

    scripts/train_text_model.py OUT [--arch llama|qwen2] [--minutes 3] [--outliers 4] [--factor 40] [--start TRAINED]

A random model tells nothing about quantization; this one has learned something, so that its perplexity can suffer.
Outlier channels (few channels of a decoder's activations are far larger than the rest: arXiv 2208.07339) appear in
large models only. Here they are made by scaling a norm's or linear's outputs up and the next linears' columns down,
which changes no logit beyond rounding, and makes rounding to the nearest lose what those columns hold.
"""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from make_tiny_model import tokenizer

WINDOW = 256  # bytes, which are the tokens
BATCH = 16
VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 1024, "bos_token_id": 256, "eos_token_id": 258,
    "pad_token_id": 256, "tie_word_embeddings": False,
}  # fmt: skip


def new_model(arch: str) -> PreTrainedModel:
    """Llama with as many value heads as heads, or Qwen2 with two, and biases."""
    torch.manual_seed(0)
    if arch == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **SIZES))
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, **SIZES))


def library_text(held_out: bool) -> str:
    """The sources of Python's library, every tenth module apart for testing."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(path.read_text("utf-8", "replace") for i, path in enumerate(paths) if (i % 10 == 0) == held_out)


def train(model: PreTrainedModel, ids: Tensor, minutes: float) -> float:
    """Adam on random windows until the time is over; returns the last loss, in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    chance, started, loss = random.Random(0), time.monotonic(), torch.zeros(())
    while (done := (time.monotonic() - started) / (minutes * 60)) < 1:
        at = [chance.randrange(len(ids) - WINDOW) for _ in range(BATCH)]
        windows = torch.stack([ids[i : i + WINDOW] for i in at])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, done / 0.03, 1.05 - done)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def plant_outliers(model: PreTrainedModel, count: int, factor: float) -> None:
    """Make `count` input channels of every linear `factor` times as loud, and their columns as much quieter."""
    chance = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs: list[tuple[Any, list[nn.Linear]]] = [
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            (mlp.up_proj, [mlp.down_proj]),
        ]
        if attention.v_proj.out_features == attention.o_proj.in_features:
            pairs.append((attention.v_proj, [attention.o_proj]))
        for before, linears in pairs:
            channels = torch.randperm(linears[0].in_features, generator=chance)[:count]
            before.weight[channels] *= factor
            if getattr(before, "bias", None) is not None:
                before.bias[channels] *= factor
            for linear in linears:
                linear.weight[:, channels] /= factor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write, in transformers' layout")
    parser.add_argument("--arch", choices=("llama", "qwen2"), default="llama")
    parser.add_argument("--start", type=Path, metavar="TRAINED", help="take this folder's model as it is, untrained on")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--outliers", type=int, default=0, help="loud channels of each linear's inputs")
    parser.add_argument("--factor", type=float, default=40.0, help="how much louder they are (%(default)s)")
    args = parser.parse_args()
    words = tokenizer(image=False)
    if args.start:
        model, said = AutoModelForCausalLM.from_pretrained(args.start, dtype=torch.float32), f"from {args.start}"
    else:
        model = new_model(args.arch)
        ids = torch.tensor(words(library_text(held_out=False), verbose=False)["input_ids"])
        said = f"loss {train(model, ids, args.minutes):.3f} nats a byte after {args.minutes:g} minutes"
    if args.outliers:
        plant_outliers(model, args.outliers, args.factor)
    model.save_pretrained(args.out)
    words.save_pretrained(args.out)
    print(f"wrote {args.out}: {said}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
