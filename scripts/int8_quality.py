#!/usr/bin/env python3
"""What 8-bit activations, head, vision tower, keys and values cost a 4-bit model on a CPU: KL, and right answers.

    scripts/int8_quality.py [MODEL] [--samples 64] [--per-task 100] [--outliers N:FACTOR] [--only WORD] [--json|--card]

MODEL is a folder or a hub id (the embedded model). All settings read the same held-out sequences. `exact` keeps
activations, keys and values in float32, the head and the tower as they are stored, and is what the others are compared
with; `down_proj exact` has 8-bit activations in every linear but the one whose inputs are the most uneven. Where
activations have 8 bits, keys and values have 16, but in the settings that name them. A text model's settings leave out
the tower. --outliers makes a tower with loud channels first, N before each linear, FACTOR times as loud as they were:
what they mean stays the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinychat import load
from tinychat.engine.engine import Engine
from tinychat.engine.prefill import embed_rest, running
from tinychat.eval import divergence, page, report
from tinychat.eval.card import sees
from tinychat.eval.divergence import Held
from tinychat.eval.heldout import heldout, speaks_demo
from tinychat.layers.head import PackedHead
from tinychat.layers.linear import QuantLinear
from tinychat.placement import Placement
from tinychat_kernels import cpu_tower


@dataclass(frozen=True)
class Setting:
    """How the model is placed, which linears of a layer are exact all the same, and whether a row of the tower's has
    one scale instead of one a group."""

    name: str
    exact: bool
    head: str
    tower: str = "float"
    spared: tuple[str, ...] = ()
    rows: bool = False
    kv_cache: str | None = None


SETTINGS = (
    Setting("exact", True, "float"),
    Setting("int8 head", True, "int8"),
    Setting("int8 activations", False, "float"),
    Setting("int8 activations, down_proj exact", False, "float", spared=("down_proj",)),
    Setting("int8 activations and head", False, "int8"),
    Setting("int8 tower", True, "float", "int8"),
    Setting("int8 tower, a scale a row", True, "float", "int8", rows=True),
    Setting("int8 activations, head and tower", False, "int8", "int8"),
    Setting("int8 keys and values", True, "float", kv_cache="int8"),
    Setting("int8 activations, head, keys and values", False, "int8", kv_cache="int8"),
)


@contextmanager
def scale_a_row() -> Iterator[None]:
    """What is rounded meanwhile has one scale for all inputs of an output."""
    groups, cpu_tower.GROUPS = cpu_tower.GROUPS, (2**30,)  # longer than any row
    try:
        yield
    finally:
        cpu_tower.GROUPS = groups


LOUD = (  # what makes a linear's inputs, and the linears
    ("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.out_proj",)),
    ("layer_norm2", ("mlp.fc1",)),
)


def with_outliers(folder: Path, out: Path, channels: int, factor: float) -> Path:
    """A copy of a VILA folder: some channels between layers of the tower are louder, and the weights after them are
    smaller in return."""
    shutil.copytree(folder, out)
    home = out / "vision_tower" / "model.safetensors"
    tensors, draw = load_file(home), torch.Generator().manual_seed(0)
    for maker in sorted(name for name in tensors if name.endswith("layer_norm1.weight")):
        layer = maker.removesuffix("layer_norm1.weight")
        for before, after in LOUD:
            loud = torch.randperm(len(tensors[f"{layer}{before}.bias"]), generator=draw)[:channels]
            for part in ("weight", "bias"):
                tensors[f"{layer}{before}.{part}"][loud] *= factor
            for name in after:
                tensors[f"{layer}{name}.weight"][:, loud] /= factor
    save_file(tensors, home)
    return out


def opened(model: str | Path | None, setting: Setting, threads: int | None) -> Engine:
    kept = setting.kv_cache or ("float" if setting.exact else "auto")
    placement = Placement(device="cpu", head=setting.head, tower=setting.tower, threads=threads, kv_cache_dtype=kept)
    with scale_a_row() if setting.rows else nullcontext():
        ready = load.load_folder(load.resolve(model), placement)
    for name, module in ready.model.named_modules():
        if isinstance(module, QuantLinear):
            if not module.prepared:
                raise SystemExit("the CPU kernels do not run here: see `tinychat doctor`")
            module.exact = setting.exact or name.rpartition(".")[2] in setting.spared
        if isinstance(module, PackedHead):
            module.exact = setting.exact
    return Engine(ready.model, ready.processor, context=ready.context)


def logits(engine: Engine, sequence: Held) -> list[Tensor]:
    """As the engine computes them, by the kernels and through a cache: one part `[scored, V]`."""
    model, prompt = cast("Any", engine.model), sequence.prompt
    with running():
        pixels = [engine.processor.pixels(prompt, [slot.image]) for slot in prompt.slots]
        features = [found for one in pixels for found in model.encode_images(one)]
        whole = replace(prompt, ids=(*prompt.ids, *sequence.answer))
        embeds = embed_rest(engine.model, whole, 0, features)
        return [model.verify(embeds, model.make_cache(1, embeds.shape[1]))[0, list(sequence.scored)]]


def results(args: argparse.Namespace, say: Callable[[str], None]) -> Iterable[dict[str, Any]]:
    """A row a setting, the exact one first."""
    held: list[Held] = []
    base: list[dict[str, Any]] = []
    source = load.open_source(load.resolve(args.model))
    for setting in SETTINGS:
        leaves_out = args.only and setting is not SETTINGS[0] and not any(word in setting.name for word in args.only)
        if leaves_out or (setting.tower == "int8" and source.config.vision is None):
            continue
        say(setting.name)
        engine = opened(args.model, setting, args.threads)
        demo = speaks_demo(engine.processor)
        if not held:
            pictures = sees(engine.processor)
            items = heldout("demo" if demo else "plain").items(args.samples)
            held = [divergence.continued(engine, item) for item in items if pictures or item.kind == "text"]
            base = [divergence.coded(logits(engine, one)) for one in held]
        compared = [divergence.compare(one, known, logits(engine, one)) for one, known in zip(held, base, strict=True)]
        found = divergence.summarize(compared)
        row: dict[str, Any] = {"setting": setting.name, "tokens": found.tokens, "unchanged": found.unchanged}
        row |= {name: asdict(getattr(found, name)) for name in ("kl", "kl_p99", "top1")}
        if demo and args.per_task:
            scores = report.measure(report.Plan(setting.name, args.per_task), engine, say)["scores"]
            row["right"], row["asked"] = (sum(score[key] for score in scores) for key in ("right", "asked"))
            row["scores"] = scores
        yield row


def for_card(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a card says of the default, the last of the settings measured."""
    exact, default = rows[0], rows[-1]
    kept = {name: default[name] for name in ("setting", "tokens", "kl", "top1", "right", "asked")}
    return {**kept, "exact_right": exact["right"]}


def draw(rows: Iterable[dict[str, Any]]) -> Table:
    table = Table("setting", "KL, nats a token", "95 %", "99th percentile", "same top-1", "same answers", "right")
    for row in rows:
        kl = row["kl"]
        table.add_row(
            row["setting"], f"{kl['value']:.2e}", f"{kl['low']:.1e} .. {kl['high']:.1e}",
            f"{row['kl_p99']['value']:.1e}", f"{100 * row['top1']['value']:.2f} %", f"{100 * row['unchanged']:.1f} %",
            f"{row['right']} of {row['asked']}" if "right" in row else "",
        )  # fmt: skip
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--samples", type=int, default=64, help="held-out sequences of each kind (%(default)s)")
    parser.add_argument("--per-task", type=int, default=100, help="questions of each task and split (%(default)s)")
    parser.add_argument("--threads", type=int, help="of the kernels (one a core)")
    parser.add_argument("--outliers", metavar="N:FACTOR", help="of the tower; a VILA folder's")
    parser.add_argument("--only", action="append", metavar="WORD", help="settings whose names have it; repeatable")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--card", action="store_true", help="add the default's figures to the card of a demo model")
    args = parser.parse_args()
    if args.card:
        args.only = ["head and tower"]
    with tempfile.TemporaryDirectory() as folder:
        if args.outliers:
            channels, factor = args.outliers.split(":")
            args.model = with_outliers(load.resolve(args.model), Path(folder) / "loud", int(channels), float(factor))
        rows = list(results(args, lambda text: print(text, file=sys.stderr, flush=True)))
    if args.card:
        page.with_int8(load.resolve(args.model), for_card(rows))
    if args.json:
        print(json.dumps(rows))
    else:
        Console(width=140).print(draw(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
