#!/usr/bin/env python3
"""What 8-bit activations, head and vision tower cost a 4-bit model on a CPU: KL from exact ones, and right answers.

    scripts/int8_quality.py [MODEL] [--samples 64] [--per-task 100] [--threads N] [--json]

MODEL is a folder or a hub id (the embedded model). All settings read the same held-out sequences. `exact` keeps
activations in float32, the head and the tower as they are stored, and is what the others are compared with;
`down_proj exact` has 8-bit activations in every linear but the one whose inputs are the most uneven. A text model's
settings leave out the tower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tinychat import load
from tinychat.engine.engine import Engine
from tinychat.eval import divergence, report
from tinychat.eval.card import sees
from tinychat.eval.divergence import Held
from tinychat.eval.heldout import heldout, speaks_demo
from tinychat.layers.head import PackedHead
from tinychat.layers.linear import QuantLinear
from tinychat.placement import Placement


@dataclass(frozen=True)
class Setting:
    """How the model is placed, and which linears of a layer are exact all the same."""

    name: str
    exact: bool
    head: str
    tower: str = "float"
    spared: tuple[str, ...] = ()


SETTINGS = (
    Setting("exact", True, "float"),
    Setting("int8 head", True, "int8"),
    Setting("int8 activations", False, "float"),
    Setting("int8 activations, down_proj exact", False, "float", spared=("down_proj",)),
    Setting("int8 activations and head", False, "int8"),
    Setting("int8 tower", True, "float", "int8"),
    Setting("int8 activations, head and tower", False, "int8", "int8"),
)


def opened(model: str | None, setting: Setting, threads: int | None) -> Engine:
    placement = Placement(device="cpu", head=setting.head, tower=setting.tower, threads=threads)
    ready = load.load_folder(load.resolve(model), placement)
    for name, module in ready.model.named_modules():
        if isinstance(module, QuantLinear):
            if not module.prepared:
                raise SystemExit("the CPU kernels do not run here: see `tinychat doctor`")
            module.exact = setting.exact or name.rpartition(".")[2] in setting.spared
        if isinstance(module, PackedHead):
            module.exact = setting.exact
    return Engine(ready.model, ready.processor, context=ready.context)


def results(args: argparse.Namespace, say: Callable[[str], None]) -> Iterable[dict[str, Any]]:
    """A row a setting, the exact one first."""
    held: list[Held] = []
    base: list[dict[str, Any]] = []
    source = load.open_source(load.resolve(args.model))
    for setting in SETTINGS:
        if setting.tower == "int8" and source.config.vision is None:
            continue
        say(setting.name)
        engine = opened(args.model, setting, args.threads)
        demo = speaks_demo(engine.processor)
        if not held:
            pictures = sees(engine.processor)
            items = heldout("demo" if demo else "plain").items(args.samples)
            held = [divergence.continued(engine, item) for item in items if pictures or item.kind == "text"]
            base = [divergence.coded(divergence.read(engine, one).logits) for one in held]
        compared = [
            divergence.compare(one, known, divergence.read(engine, one).logits)
            for one, known in zip(held, base, strict=True)
        ]
        found = divergence.summarize(compared)
        row: dict[str, Any] = {"setting": setting.name, "tokens": found.tokens, "unchanged": found.unchanged}
        row |= {name: asdict(getattr(found, name)) for name in ("kl", "kl_p99", "top1")}
        if demo and args.per_task:
            scores = report.measure(report.Plan(setting.name, args.per_task), engine, say)["scores"]
            row["right"], row["asked"] = (sum(score[key] for score in scores) for key in ("right", "asked"))
            row["scores"] = scores
        yield row


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
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = list(results(args, lambda text: print(text, file=sys.stderr, flush=True)))
    if args.json:
        print(json.dumps(rows))
    else:
        Console(width=140).print(draw(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
