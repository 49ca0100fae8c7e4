#!/usr/bin/env python3
"""Train the embedded demo model on generated pictures and dialogues, with tinychat's own model classes.

    scripts/train_demo_model.py --run runs/demo --samples 150000 --minutes 60   # stops cleanly; the same call resumes
    scripts/train_demo_model.py --run runs/demo --export tinychat/assets/demo

The learning rate rises over the first 1 % of --samples, stays, and falls to nothing over the last 75 %. Matrices are
trained with Muon, everything else with AdamW. On Linux glibc's malloc lets the memory grow and the speed sink with the
hours: preload jemalloc. Two losses: the next token of every answer, and, on the vision tower's features, what covers
each patch and how it stands among the others (tinychat/eval/demo/dense.py), which generated pictures give for free.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from demo_export import add_scores, export
from demo_tokenizer import build_tokenizer
from tinychat.config import VilaConfig
from tinychat.eval.demo import CLASSES, GRID, IMAGE_SIZE, PATCH, Sample, sample_at
from tinychat.models.vila_fusion import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinychat.models.vila_llama import VilaLlamaForCausalLM

CONTEXT = 2048
MUON_LR, ADAM_LR = 0.015, 1.5e-3
DENSE_WEIGHTS = {"kind": 2.0, "colour": 2.0}  # of the rest: 0.7
EMPTY_PATCH_WEIGHT = 0.15  # most patches show background: they must not drown the rest
BLOCK = 16  # batches that are drawn together and sorted by length


def demo_config(vocabulary: int) -> VilaConfig:
    """The demo model's sizes: widths of the decoder's linears divide by 128 so that it can be quantized."""
    return VilaConfig(
        llm_cfg={
            "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 256, "intermediate_size": 768,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 10000.0,
            "max_position_embeddings": CONTEXT, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        },
        vision_tower_cfg={
            "model_type": "clip_vision_model", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 7,
            "num_attention_heads": 6, "image_size": IMAGE_SIZE, "patch_size": PATCH, "hidden_act": "gelu",
        },
        mm_projector_cfg={"mm_projector_type": "mlp2x_gelu"},
        mm_vision_select_layer=-1, image_aspect_ratio="pad",
    )  # fmt: skip


class DenseHeads(nn.Module):
    """The auxiliary classifier of each patch; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(CLASSES.values()))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """features `[N, patches, Dv]`, labels `[N, C, GRID, GRID]` -> a scalar."""
        parts = self.heads(self.norm(features)).float().split(list(CLASSES.values()), dim=-1)
        total = features.new_zeros((), dtype=torch.float32)
        for name, logits, wanted in zip(CLASSES, parts, labels.flatten(2).unbind(1), strict=True):
            each = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            share = DENSE_WEIGHTS.get(name, 0.7)
            total = total + share * (each * torch.where(wanted.flatten() > 0, 1.0, EMPTY_PATCH_WEIGHT)).mean()
        return total


class Encoder:
    """Samples -> token ids, labels and pixels, exactly as the chat template and the image processor make them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        names = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
        self.user, self.assistant, self.system, self.end = (vocabulary[name] for name in names)

    def text(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def row(self, sample: Sample) -> tuple[list[int], list[int]]:
        """ids and labels of a whole dialogue; a picture is IMAGE_TOKEN_INDEX before the question it comes with."""
        ids = [self.system, *self.text(sample.system), self.end] if sample.system else []
        labels = [IGNORE_INDEX] * len(ids)
        for turn in sample.turns:
            asked = [
                self.user,
                *[IMAGE_TOKEN_INDEX] * turn.pictures,
                *self.text(turn.question),
                self.end,
                self.assistant,
            ]
            answer = [*self.text(turn.answer), self.end]
            ids += asked + answer
            labels += [IGNORE_INDEX] * len(asked) + answer
        return ids, labels

    def batch(self, samples: list[Sample]) -> dict[str, Tensor]:
        """input_ids, labels, attention_mask `[B, T]`, images `[N, 3, S, S]`, dense `[N, C, GRID, GRID]`."""
        rows = [self.row(sample) for sample in samples]
        length = max(len(ids) for ids, _ in rows)
        out = {
            "input_ids": torch.zeros((len(rows), length), dtype=torch.long),
            "labels": torch.full((len(rows), length), IGNORE_INDEX),
            "attention_mask": torch.zeros((len(rows), length), dtype=torch.bool),
        }
        for i, (ids, labels) in enumerate(rows):
            out["input_ids"][i, : len(ids)] = torch.tensor(ids)
            out["labels"][i, : len(ids)] = torch.tensor(labels)
            out["attention_mask"][i, : len(ids)] = True
        out["images"] = pixels([picture for sample in samples for picture in sample.pictures])
        out["dense"] = torch.from_numpy(np.concatenate([sample.dense for sample in samples])).long()
        return out


def pixels(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures `[S, S, 3]` -> `[N, 3, S, S]` in -1..1 (mean and deviation 0.5)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass
class State:
    """Everything that a checkpoint holds."""

    model: VilaLlamaForCausalLM
    dense: DenseHeads
    optimizers: list[torch.optim.Optimizer]
    seen: int = 0

    def save(self, path: Path) -> None:
        beside = path.with_suffix(".tmp")
        parts = {"model": self.model.state_dict(), "dense": self.dense.state_dict(), "seen": self.seen}
        torch.save({**parts, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, beside)
        beside.replace(path)

    def load(self, path: Path) -> None:
        parts = torch.load(path, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.dense.load_state_dict(parts["dense"])
        for optimizer, saved in zip(self.optimizers, parts["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.seen = parts["seen"]


def sines(grid: int, width: int) -> Tensor:
    """[grid * grid, width]: sine and cosine of row and column at falling frequencies (arXiv 1706.03762, in 2-D)."""
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4 + 1)[:-1]
    angles = torch.arange(grid)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows, columns = waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)
    return torch.cat((rows, columns), dim=2).reshape(grid * grid, width)


@torch.no_grad()
def initialize(model: VilaLlamaForCausalLM) -> None:
    """Begin with token embeddings as loud as what attention adds to them, and patches that know their place.

    Under the usual deviation of 0.02 a word of the question drowns in the first layer's output: then colours are looked
    up by shape no better than by chance, after 130,000 dialogues still (tinychat/docs/decisions.md).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
    assert model.vision_tower is not None
    nn.init.normal_(model.get_input_embeddings().weight)
    table: Tensor = model.vision_tower.vision_model.embeddings.position_embedding.weight
    table[1:] = 0.4 * sines(GRID, table.shape[1])


def new_state(tokenizer: PreTrainedTokenizerFast, device: str) -> State:
    torch.manual_seed(0)
    model = VilaLlamaForCausalLM(demo_config(len(tokenizer)))
    initialize(model)
    nn.Module.to(model, device)
    assert model.config.vision is not None
    dense = DenseHeads(model.config.vision.hidden_size).to(device)
    parts = [*model.named_parameters(), *dense.named_parameters()]
    blocks = ("layers.", "mm_projector")
    matrices = [p for name, p in parts if p.ndim == 2 and any(block in name for block in blocks)]
    rest = [p for name, p in parts if not (p.ndim == 2 and any(block in name for block in blocks))]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=ADAM_LR, weight_decay=0.02, betas=(0.9, 0.98))
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return State(model, dense, [muon, adam])


def schedule(done: float) -> float:
    """The share of the peak learning rate after `done` (0 to 1) of the training."""
    return min(1.0, done / 0.01, (1.0 - done) / 0.75)


def train(state: State, encoder: Encoder, args: argparse.Namespace) -> None:
    """Train until --samples are seen, --minutes are over, or a signal comes; and save."""
    features: list[Tensor] = []
    state.model.vision_tower.register_forward_hook(lambda _module, _inputs, out: features.append(out))  # type: ignore[union-attr]
    state.model.config.tune_vision_tower = state.model.config.tune_mm_projector = True
    state.model.train()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    started, average = time.monotonic(), None
    for step, samples in enumerate(batches(state.seen, args.batch), 1):
        if stopped.is_set() or state.seen >= args.samples or time.monotonic() - started > args.minutes * 60:
            break
        features.clear()
        loss, dense = losses(state, encoder, samples, features, args)
        step_optimizers(state, loss + dense, schedule(state.seen / args.samples))
        state.seen += args.batch
        now = torch.stack([loss.detach(), dense.detach()])
        average = now if average is None else 0.98 * average + 0.02 * now
        if step % 50 == 0:
            speed = step * args.batch / (time.monotonic() - started)
            loss, dense = average.tolist()
            note(args.run / "log.jsonl", seen=state.seen, loss=loss, dense=dense, samples_per_s=speed)
        if step % 500 == 0:
            state.save(args.run / "checkpoint.pt")
    state.save(args.run / "checkpoint.pt")


def batches(seen: int, size: int) -> Iterator[list[Sample]]:
    """Batches of alike length from the `seen`th dialogue on: blocks are sorted by length, their batches shuffled."""
    block = BLOCK * size
    for first in range(seen - seen % block, sys.maxsize, block):
        drawn = sorted((sample_at("train", first + i) for i in range(block)), key=length_of)
        order = random.Random(first).sample(range(BLOCK), BLOCK)
        for i in order[max(0, seen - first) // size :]:
            yield drawn[i * size : (i + 1) * size]


def run_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a run: made at its start, the same ever after."""
    if not (folder / "tokenizer.json").exists():
        build_tokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def length_of(sample: Sample) -> int:
    """Roughly the characters' worth of a dialogue."""
    words = sum(len(turn.question) + len(turn.answer) for turn in sample.turns)
    return words + 5 * GRID * GRID * len(sample.pictures)


def losses(
    state: State, encoder: Encoder, samples: list[Sample], features: list[Tensor], args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    batch = {name: value.to(args.device) for name, value in encoder.batch(samples).items()}
    labels = batch.pop("dense")
    with torch.autocast(args.device, torch.bfloat16) if args.bf16 else nullcontext():
        loss = state.model(**batch).loss
        return loss, state.dense.loss(features[0], labels)


def step_optimizers(state: State, loss: Tensor, share: float) -> None:
    for optimizer in state.optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * max(share, 1e-3)
    loss.backward()
    nn.utils.clip_grad_norm_([*state.model.parameters(), *state.dense.parameters()], 1.0)
    for optimizer in state.optimizers:
        optimizer.step()


def note(log: Path, **values: float) -> None:
    line = json.dumps({name: round(value, 4) for name, value in values.items()})
    print(line, flush=True)
    with log.open("a") as file:
        file.write(line + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of checkpoint and log")
    parser.add_argument("--samples", type=int, default=150_000, help="dialogues in the whole training")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this long; call again to resume")
    parser.add_argument("--batch", type=int, default=32, help="dialogues a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 matrix products")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write 16 bit, 4 bit and the card, and stop")
    parser.add_argument("--per-task", type=int, default=200, help="questions a task for the card of --export")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.run.mkdir(parents=True, exist_ok=True)
    tokenizer = run_tokenizer(args.run / "tokenizer")
    encoder, state = Encoder(tokenizer), new_state(tokenizer, args.device)
    if (args.run / "checkpoint.pt").exists():
        state.load(args.run / "checkpoint.pt")
        print(f"resumed after {state.seen} samples", flush=True)
    if args.export:
        export(state.model, tokenizer, args.export, args.run, f"{state.seen:,} dialogues")
        add_scores(args.export, args.run, args.per_task)
        return 0
    train(state, encoder, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
