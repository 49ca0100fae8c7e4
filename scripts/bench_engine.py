#!/usr/bin/env python3
"""Compare many streams at once with other programs, on random weights of one shape, in interleaved rounds.

    scripts/setup_peers && scripts/bench_engine.py --shape 1b [--streams 1,2,4,8] [--rounds 5] [--threads 2]

Total tokens a second of so many streams (a prompt of 32 tokens and --tokens new ones each): our engine at once and one
after another, transformers' generate with a padded batch, llama.cpp with as many sequences as its server has slots.
Then our longest wait between two tokens while a prompt of --long tokens is taken in, and what filtering and
concatenating batches of eight rows takes by context. Programs and figures are those of scripts/bench_peers.py.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bench_peers import SHAPES, Comparison, Plan, Task, chosen, common_parser, make_weights, numbers, result, say
from peers import report
from peers.process import Peer
from peers.protocol import Setup
from tinychat import doctor

PEERS = (
    Peer("tinychat", "engine_peer", "own", {"checkpoint": "awq"}, ("awq",)),
    Peer("llama.cpp Q4_0", "llama_cpp_streams_peer", "runtimes", {"file": "q4_0.gguf"}, ("q4_0.gguf",)),
    Peer("transformers bf16", "transformers_streams_peer", "own"),
)
DEPTHS = (256, 4096)


@dataclass(frozen=True)
class Streams(Task):
    """`tokens` tokens of `depth` streams together, or one after another."""

    @property
    def name(self) -> str:
        return f"{self.depth} streams" + (" one after another" if self.kind == "after" else "")


@dataclass(frozen=True)
class Wait(Task):
    """What takes its time."""

    @property
    def name(self) -> str:
        return f"{self.kind} at {self.depth}"

    @property
    def is_once(self) -> bool:
        return True


def tasks(streams: Sequence[int], tokens: int, long: int) -> Iterator[Task]:
    for count in streams:
        yield Streams("streams", count * tokens, count)
    yield Streams("after", max(streams) * tokens, max(streams))
    yield Wait("stall", 1, long)
    for kind in ("filter", "concatenate"):
        for depth in DEPTHS:
            yield Wait(kind, 1, depth)


def plan_of(args: argparse.Namespace) -> Plan:
    folder = args.folder or doctor.cache_folder() / "bench-peers" / args.shape
    folder.mkdir(parents=True, exist_ok=True)
    context = max(args.long + args.tokens, args.long + args.long // 8 + 512)
    setup = Setup(SHAPES[args.shape], args.threads, context, str(folder.resolve()))
    environments = args.peers or doctor.cache_folder() / "peers"
    made = tuple(tasks(args.streams, args.tokens, args.long))
    return Plan(setup, chosen(args.only, PEERS), made, args.rounds, 600.0, environments.resolve())


def parser() -> argparse.ArgumentParser:
    made = common_parser(__doc__, rounds=5)
    made.add_argument("--streams", type=numbers, default=[1, 2, 4, 8])
    made.add_argument("--tokens", type=int, default=48, help="new ones of a stream (%(default)s)")
    made.add_argument("--long", type=int, default=2000, help="tokens of the prompt that is taken in (%(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or stopped programs stay behind
    plan = plan_of(args)
    make_weights(plan, SHAPES[args.shape])
    comparison = Comparison(plan)
    comparison.run()
    found = result(plan, comparison, args.shape)
    path = Path(plan.setup.folder) / f"engine-{datetime.now().astimezone():%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(found, indent=1))
    text = report.markdown(found)
    path.with_suffix(".md").write_text(text)
    print(text)
    say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
