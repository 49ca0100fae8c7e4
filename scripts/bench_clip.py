#!/usr/bin/env python3
"""How long a vision tower takes for a picture: ours, on one process and on several, and transformers' on a CPU.

    scripts/bench_clip.py [--models clip-l-336,siglip-so400m] [--dtypes fp32,bf16] [--batch 1] [--rounds 5]

Random weights, the same ones for both; all layers are run and the pooled output is made. A round's order is drawn anew,
one round is not measured, and a turn is taken again where other programs computed meanwhile ("others": processors that
they kept busy). Ratios are taken round by round: transformers' time over the column's. With --threads 2 the columns
are ours and transformers' (sdpa) on two threads, ours on one, ours split over two processes of a thread each (as by
--tp), and the tower in 8 bits on two threads, as the chat runs it beside a 4-bit decoder.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor, nn

from peers.protocol import Json
from peers.report import spread
from tinychat import doctor
from tinychat.config import VisionConfig
from tinychat.layers.local_ranks import LocalRanks
from tinychat.layers.packed_linear import PackedLinear
from tinychat.layers.parallel import Later
from tinychat.models.vision_tower import VisionTower
from tinychat_kernels import cpu, cpu_tower

SCHEMA = "tinychat.bench_clip/1"
CLIP = (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, {"hidden_act": "quick_gelu"})
SIGLIP = (transformers.SiglipVisionConfig, transformers.SiglipVisionModel, {"vision_use_head": False})
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
MODELS = {
    "clip-tiny": (CLIP, (64, 128, 2, 4, 28, 14)),
    "siglip-tiny": (SIGLIP, (64, 128, 2, 4, 28, 14)),
    "clip-l-336": (CLIP, (1024, 4096, 24, 16, 336, 14)),
    "siglip-so400m": (SIGLIP, (1152, 4304, 27, 16, 384, 14)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NOISE = 2**20 - 3  # numbers that are drawn, and come again and again
TRIES, MOST_OTHERS = 3, 0.1  # a turn is tried again while other programs take more than so much of a processor
OURS, THEIRS, ALONE, INT8 = "tinychat", "transformers", "tinychat, 1 thread", "tinychat, 8 bits"
Encode = Callable[[], Any]


@dataclass(frozen=True)
class Turn:
    """Seconds, and how many processors other programs kept busy meanwhile."""

    seconds: float
    others: float


@dataclass(frozen=True)
class Case:
    """What is encoded by what."""

    model: str
    dtype: str
    batch: int
    threads: int

    @property
    def config(self) -> Any:
        (kind, _, more), sizes = MODELS[self.model]
        return kind(**dict(zip(SIZES, sizes, strict=True)), **more)

    @property
    def pixels(self) -> Tensor:
        side = self.config.image_size
        shape = (self.batch, 3, side, side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[self.dtype])

    @property
    def split(self) -> str:
        return f"tinychat, {self.threads} processes"


def tower_of(case: Case, weights: Later | None = None) -> VisionTower:
    """Ours with noise for weights, the same however often it is made."""
    raw = VisionConfig.of(case.config)
    config = VisionConfig(**{**{name: getattr(raw, name) for name in raw.__slots__}, "select_layer": -1})
    with torch.device("meta"):
        tower = VisionTower(config, weights).eval().requires_grad_(False).to(DTYPES[case.dtype])
    tower.to_empty(device="cpu")
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(DTYPES[case.dtype])
    for parameter in tower.parameters():
        flat, width = parameter.view(-1), parameter.shape[-1]
        for start in range(0, len(flat), NOISE):
            flat[start : start + NOISE] = noise[: len(flat) - start]
        parameter *= 1.0 if parameter.ndim < 2 else width**-0.5
    return tower


def theirs_of(case: Case, ours: nn.Module) -> nn.Module:
    """transformers' class around our parameters."""
    (_, kind, _), _ = MODELS[case.model]
    with torch.device("meta"):
        made = kind(case.config)
    made.load_state_dict(ours.state_dict(), assign=True)
    for module in made.modules():
        if (ids := module._buffers.get("position_ids")) is not None:
            module.register_buffer("position_ids", torch.arange(ids.shape[-1]).expand(1, -1), persistent=False)
    return made.eval().requires_grad_(False)


def in_8_bits(tower: VisionTower) -> VisionTower:
    """Its linears as the CPU kernels hold them; the float ones go. Those of one shape hold the same, each its own."""
    encoder: Any = tower.vision_model.encoder
    made: dict[torch.Size, cpu.Packed] = {}
    for name, module in list(encoder.named_modules()):
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            if weight.shape not in made:
                outputs, inputs = (cpu_tower.widened(size) for size in weight.shape)
                made[weight.shape] = cpu_tower.round_linear(weight.float(), inputs, outputs)
            held = made[weight.shape]
            own = dataclasses.replace(held, blocks=held.blocks.clone())
            encoder.set_submodule(name, PackedLinear(own, partial(torch.clone, weight), module.bias))
    return tower


@contextmanager
def processes(case: Case) -> Generator[Encode]:
    """Our tower split over processes of one thread each; a call is over when all have the result."""
    context = multiprocessing.get_context("spawn")
    ends, started = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(case.threads):
            ours, rankside = context.Pipe()
            process = context.Process(
                target=serve, args=(rankside, case, rank, str(Path(folder, "store"))), daemon=True
            )
            process.start()
            rankside.close()
            ends.append(ours)
            started.append(process)

        def encode() -> None:
            for end in ends:
                end.send(None)
            for end in ends:
                end.recv()

        try:
            for end in ends:
                end.recv()  # it is ready
            yield encode
        finally:
            for end in ends:
                end.close()
            for process in started:
                process.join(10)
                process.kill()


@torch.inference_mode()
def serve(end: Any, case: Case, rank: int, store: str) -> None:
    """A rank: it encodes whenever it is told to, until the pipe is closed."""
    import torch.distributed

    dist: Any = torch.distributed
    torch.set_num_threads(1)
    shared = dist.FileStore(store, case.threads)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=case.threads)
    tower, pixels = tower_of(case, Later(LocalRanks.of(dist.group.WORLD))).vision_model, case.pixels
    try:
        while True:
            end.send(None)
            end.recv()
            tower(pixels)
    except (EOFError, BrokenPipeError):
        dist.destroy_process_group()


@torch.inference_mode()
def measured(case: Case, rounds: int, with_8_bits: bool) -> tuple[dict[str, list[Turn]], Json]:
    """Seconds of each column, round by round; and how far its output is from transformers'."""
    tower = tower_of(case)
    ours, theirs, pixels = tower.vision_model, theirs_of(case, tower.vision_model), case.pixels
    columns: dict[str, tuple[int, Encode]] = {
        OURS: (case.threads, lambda: ours(pixels).last_hidden_state),
        THEIRS: (case.threads, lambda: theirs(pixel_values=pixels).last_hidden_state),
    }
    expected = columns[THEIRS][1]().float()
    distances = {OURS: distance(columns[OURS][1]().float(), expected)}
    if case.threads > 1:
        columns[ALONE] = (1, columns[OURS][1])
    if with_8_bits and cpu.available()[0]:
        small = in_8_bits(tower_of(case))
        columns[INT8] = (case.threads, lambda: small(pixels))
        plain = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        distances[INT8] = distance(
            small(pixels).float(), (plain[:, 1:] if small.config.has_class_token else plain).float()
        )
    if case.threads == 1:
        return in_rounds(columns, rounds), distances
    with processes(case) as encode:
        return in_rounds({**columns, case.split: (1, encode)}, rounds), distances


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found - expected).norm() / expected.norm())


def in_rounds(columns: dict[str, tuple[int, Encode]], rounds: int) -> dict[str, list[Turn]]:
    """Each column's turns, in an order that is drawn anew each round; the first round is not kept."""
    rng, turns = random.Random(0), defaultdict(list)
    for count in range(rounds + 1):
        for name in rng.sample(sorted(columns), len(columns)):
            threads, encode = columns[name]
            torch.set_num_threads(threads)
            if count:
                turns[name].append(least_disturbed(encode))
            else:
                encode()
    return {name: turns[name] for name in columns}


def least_disturbed(encode: Encode) -> Turn:
    """A turn during which other programs let us be, or the best of TRIES."""
    tries: list[Turn] = []
    while len(tries) < TRIES and not (tries and tries[-1].others < MOST_OTHERS):
        mine, all_of_it, start = own_seconds(), sum(busy_times()), time.perf_counter()
        encode()
        seconds = time.perf_counter() - start
        others = sum(busy_times()) - all_of_it - (own_seconds() - mine)
        tries.append(Turn(seconds, others / seconds))
    return min(tries, key=lambda turn: turn.others)


def busy_times() -> tuple[float, float, float]:
    """Seconds that all processors have computed."""
    times = psutil.cpu_times()
    return times.user, times.system, getattr(times, "nice", 0.0)


def own_seconds() -> float:
    """Seconds that we have computed, and the processes that we have started."""
    family = [me := psutil.Process(), *me.children()]
    return sum(sum(process.cpu_times()[:2]) for process in family)


def rows_of(case: Case, turns: dict[str, list[Turn]], distances: Json) -> list[Json]:
    rows: list[Json] = []
    for name, own in turns.items():
        values = [turn.seconds for turn in own]
        ratios = [theirs.seconds / mine for theirs, mine in zip(turns[THEIRS], values, strict=True)]
        rows.append({
            "model": case.model, "dtype": case.dtype, "column": name, "seconds": spread(values),
            "times_as_fast": spread(ratios), "distance": distances.get(name), "values": values,
            "others": max(turn.others for turn in own),
        })  # fmt: skip
    return rows


def result(args: argparse.Namespace) -> Json:
    rows: list[Json] = []
    for model in args.models:
        for dtype in args.dtypes:
            case = Case(model, dtype, args.batch, args.threads)
            rows += rows_of(case, *measured(case, args.rounds, with_8_bits=dtype == args.dtypes[0]))
            gc.collect()
    return {
        "schema": SCHEMA,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": doctor.cpu()["name"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": args.threads,
        "batch": args.batch,
        "rounds": args.rounds,
        "rows": rows,
    }


def table(found: Json) -> str:
    """The rows as Markdown: medians, and ratios with their quartiles."""
    lines = [
        f"{found['cpu']}; {found['threads']} threads, {found['batch']} pictures, {found['rounds']} rounds",
        "",
        "| model | weights | who | seconds | transformers' time over it | distance | others |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        ratio, far = row["times_as_fast"], row["distance"]
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['column']} | {row['seconds']['median']:.3f} "
            f"| {ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f}) "
            f"| {'' if far is None else f'{far:.1e}'} | {row['others']:.2f} |"
        )
    return "\n".join(lines)


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return chosen


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", type=names([*MODELS]), default=["clip-l-336", "siglip-so400m"])
    made.add_argument("--dtypes", type=names([*DTYPES]), default=[*DTYPES])
    made.add_argument("--batch", type=int, default=1, help="pictures at once (%(default)s)")
    made.add_argument("--rounds", type=int, default=5, help="after one that is not measured (%(default)s)")
    made.add_argument("--threads", type=int, default=doctor.cpu()["usable_cores"])
    made.add_argument("--json", action="store_true", help="print the whole object")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    found = result(args)
    print(json.dumps(found, indent=1) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
