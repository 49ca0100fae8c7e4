#!/usr/bin/env python3
"""Compare our speed on a CPU with other programs', on random weights of one shape, in interleaved rounds.

    scripts/setup_peers && scripts/bench_peers.py --shape 1b|3b|8b [--rounds 9] [--threads 2] [--only tinychat,llama]

Each program is a process of its own, and is stopped while another one is measured. Before each turn the machine's
read bandwidth and int8 speed are taken. A round's order is drawn anew; ratios are taken round by round. Whole models:
tinychat, llama.cpp, transformers, GPTQModel. Linears alone, with neither attention nor norms: ONNX Runtime, OpenVINO,
torch. The weights are made once and kept in --folder, where the results go too: .json, .md, .png.

With --picture N a CLIP ViT-L/14-336 stands before the decoder, and two tasks are measured instead, tinychat beside
transformers: encoding a picture, and the way from its pixels and N tokens of text to the first token of an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import psutil

from make_tiny_model import make_tiny_model
from peers import report
from peers.process import Peer, PeerError, Process
from peers.protocol import Decoder, Json, Setup, Tower
from tinychat import doctor

ROOT = Path(__file__).parents[1]
SHAPES = {
    "tiny": Decoder(512, 256, 512, 2, 4, 2),
    "1b": Decoder(32000, 2048, 5632, 22, 32, 4),  # TinyLlama-1.1B
    "3b": Decoder(32000, 2560, 6912, 32, 20, 20),  # VILA-1.5-3B
    "8b": Decoder(128256, 4096, 14336, 32, 32, 8),  # VILA-1.5-8B
}
CLIP_L = Tower(1024, 4096, 24, 16, 336, 14)
TOWERS = {"tiny": Tower(64, 128, 2, 2, 56, 14)}  # of other shapes it is CLIP_L
GROUP = 128
GGUF = ("q4_0", "q4_k_m")
PEERS = (
    Peer("tinychat", "tinychat_peer", "own", {"checkpoint": "awq"}, ("awq",)),
    Peer("tinychat exact", "tinychat_peer", "own", {"checkpoint": "awq", "exact": True}, ("awq",)),
    *(
        Peer(f"llama.cpp {kind.upper()}", "llama_cpp_peer", "runtimes", {"file": f"{kind}.gguf"}, (f"{kind}.gguf",))
        for kind in GGUF
    ),
    Peer("onnxruntime g128", "onnx_peer", "runtimes", {"group": 128}),
    Peer("onnxruntime g32", "onnx_peer", "runtimes", {"group": 32}),
    Peer("openvino int8 activations", "openvino_peer", "runtimes", {"dynamic": 128, "precision": "bf16"}),
    Peer("openvino f32", "openvino_peer", "runtimes", {"dynamic": 0, "precision": "f32"}),
    Peer("torch bf16", "torch_peer", "own", {"kind": "bf16"}),
    Peer("torch int8", "torch_peer", "own", {"kind": "int8"}),
    Peer("torch int4", "torch_peer", "own", {"kind": "int4"}),
    Peer("transformers bf16", "transformers_peer", "own"),
    Peer("transformers GPTQModel", "transformers_peer", "gptqmodel", {"checkpoint": "awq"}, ("awq",)),
)
WITH_PICTURES = (
    Peer("tinychat", "picture_peer", "own", {"checkpoint": "vila"}, ("vila",)),
    Peer("float tower of tinychat", "picture_peer", "own", {"checkpoint": "vila", "tower": "float"}, ("vila",)),
    Peer("transformers bf16", "transformers_picture_peer", "own"),
)
MACHINE = Peer("machine", "machine", "own")
MACHINE_KINDS = ("read", "int8")
LEAST_FREE = 0.25  # of the memory: below it a program is closed after its turn
LEAST_TOKENS = 8


@dataclass(frozen=True)
class Task:
    """`tokens` tokens, from a context of `depth` on."""

    kind: str
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.tokens}" + (f" at {self.depth}" if self.depth else "")

    @property
    def is_once(self) -> bool:
        """Whether it is one thing that takes its time, rather than so many tokens."""
        return self.kind in ("encode", "picture")


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    setup: Setup
    peers: tuple[Peer, ...]
    tasks: tuple[Task, ...]
    rounds: int
    seconds: float
    environments: Path

    def python(self, peer: Peer) -> Path:
        if peer.environment == "own":
            return Path(sys.executable)
        return self.environments / peer.environment / "bin" / "python"


class Comparison:
    """Rounds of all programs. A program that fails is left out from then on, and its error kept."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.samples: defaultdict[tuple[str, str], list[float | None]] = defaultdict(list)
        self.machine: defaultdict[str, list[float]] = defaultdict(list)
        self.programs: dict[str, Json] = {}
        self.open: dict[str, Process] = {}
        self.lengths: dict[tuple[str, str], int] = {}

    def run(self) -> None:
        """The warm-up and every round."""
        try:
            for number in range(self.plan.rounds + 1):
                order = random.Random(number).sample(self.plan.peers, len(self.plan.peers))
                for peer in order:
                    if "error" not in self.programs.get(peer.name, {}):
                        self._turn(peer, number)
        finally:
            for process in self.open.values():
                process.close()

    def _turn(self, peer: Peer, number: int) -> None:
        try:
            if number:
                self._measure_machine()
            process, fresh = self._opened(peer)
            for task in self.plan.tasks:
                if task.kind in process.facts.kinds:
                    self._measure(process, task, number, fresh)
            self.programs[peer.name]["peak_memory"] = process.peak_memory()
        except PeerError as error:
            say(f"{peer.name} is left out: {error}")
            self.programs.setdefault(peer.name, {})["error"] = str(error)
            self._close(peer.name)
        memory = psutil.virtual_memory()
        if memory.available < LEAST_FREE * memory.total:
            self._close(peer.name)

    def _measure(self, process: Process, task: Task, number: int, fresh: bool) -> None:
        """One task of one program; what was just opened does it once before that."""
        key = process.peer.name, task.name
        if not number:
            some = min(task.tokens, LEAST_TOKENS) if task.kind in ("decode", "rows") else task.tokens
            speed = process.run(task.kind, some, task.depth)
            self.lengths[key] = self._length(task, speed)
            return
        if fresh:
            process.run(task.kind, self.lengths[key], task.depth)
        speed = process.run(task.kind, self.lengths[key], task.depth)
        values = self.samples[key]
        values += [None] * (number - 1 - len(values)) + [speed]
        what = f"{1000 * task.tokens / speed:.0f} ms" if task.is_once else f"{speed:.1f} tokens/s"
        say(f"round {number} {process.peer.name}: {task.name} {what}")

    def _length(self, task: Task, speed: float) -> int:
        """Tokens of a decoding that takes no more than the seconds allowed."""
        if task.kind not in ("decode", "rows"):
            return task.tokens
        return max(LEAST_TOKENS, min(task.tokens, int(speed * self.plan.seconds)))

    def _measure_machine(self) -> None:
        if "error" in self.programs.get(MACHINE.name, {}):
            return
        try:
            process, _ = self._opened(MACHINE)
            for kind in MACHINE_KINDS:
                self.machine[kind].append(process.run(kind, 10**9, 0))
        except PeerError as error:
            say(f"the machine is not measured: {error}")
            self.programs[MACHINE.name] = {"error": str(error)}

    def _opened(self, peer: Peer) -> tuple[Process, bool]:
        """The program's process, and whether it is a new one."""
        if peer.name in self.open:
            return self.open[peer.name], False
        folder = Path(self.plan.setup.folder)
        if missing := [name for name in peer.files if not (folder / name).exists()]:
            raise PeerError(f"{missing[0]} was not made")
        say(f"opening {peer.name}")
        setup = replace(self.plan.setup, options=peer.options)
        self.open[peer.name] = process = Process(peer, self.plan.python(peer), setup)
        self.programs.setdefault(peer.name, {}).update(asdict(process.facts))
        return process, True

    def _close(self, name: str) -> None:
        if process := self.open.pop(name, None):
            process.close()


def make_weights(plan: Plan, shape: Decoder) -> None:
    """The model's files, where they are not there yet; what a missing peer would have made is left out."""
    folder = Path(plan.setup.folder)
    wanted = {name for peer in plan.peers for name in peer.files}
    for name, layout in (("awq", "text"), ("vila", "vila")):
        if name in wanted and not (folder / name / "config.json").exists():
            say(f"making our checkpoint {name}")
            sizes = {**asdict(shape), **_tower_sizes(plan.setup.tower)}
            part = folder / f"{name}.part"
            make_tiny_model(part, layout, dtype="float16", quantize=GROUP, max_positions=16384, **sizes)
            part.rename(folder / name)
    kinds = [kind for kind in GGUF if f"{kind}.gguf" in wanted]
    python = plan.environments / "runtimes" / "bin" / "python"
    if kinds and python.exists() and not all((folder / f"{kind}.gguf").exists() for kind in kinds):
        say("making llama.cpp's files")
        command = [python, "-m", "peers.make_gguf", json.dumps(asdict(shape)), str(folder), *kinds]
        with (folder / "make_gguf.log").open("w") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
            if subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=False).returncode:
                say(f"llama.cpp's files were not made: see {folder / 'make_gguf.log'}")


def _tower_sizes(tower: Tower | None) -> Json:
    """In make_tiny_model's words."""
    if tower is None:
        return {}
    sizes = asdict(tower)
    return {key if key in ("image_size", "patch_size") else f"vision_{key}": value for key, value in sizes.items()}


def result(plan: Plan, done: Comparison, shape: str) -> Json:
    """The object that is written."""
    machine: Json = {"cpu": doctor.cpu()["name"], "cores": os.cpu_count(), "load": os.getloadavg()}
    machine |= {kind: report.spread(values) for kind, values in done.machine.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    speeds = report.speeds(done.samples)
    best = machine.get("read", {}).get("max")
    once = {task.name: task.tokens for task in plan.tasks if task.is_once}
    for row in speeds:
        if row["task"] in once:
            row["milliseconds"] = 1000 * once[row["task"]] / row["median"]
        streamed = done.programs[row["program"]].get("bytes_per_token")
        if best and streamed and row["task"].startswith(("decode", "linears 1")):
            row["of_best_read"] = row["median"] * streamed / best
    return {
        "schema": report.SCHEMA,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "shape": shape,
        "sizes": asdict(plan.setup.shape),
        "tower": None if plan.setup.tower is None else asdict(plan.setup.tower),
        "threads": plan.setup.threads,
        "rounds": plan.rounds,
        "machine": machine,
        "programs": {name: facts for name, facts in done.programs.items() if name != MACHINE.name},
        "speeds": speeds,
        "ratios": report.ratios(done.samples),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tasks_of(args: argparse.Namespace) -> Iterator[Task]:
    if args.picture is not None:
        yield from (Task("encode", 1), Task("picture", args.picture))
        return
    for depth in args.depth:
        yield Task("decode", args.decode, depth)
    for tokens in args.prefill:
        yield Task("prefill", tokens)
    for rows in args.linears:
        yield Task("linears", rows)
    yield Task("rows", args.decode)


def chosen(names: Sequence[str], peers: Sequence[Peer] = PEERS) -> tuple[Peer, ...]:
    """The peers with these names, or whose names begin with one where none is called so; all where none is given."""
    called = {peer.name for peer in peers}

    def meant(peer: Peer, name: str) -> bool:
        return peer.name == name if name in called else peer.name.startswith(name)

    found = tuple(peer for peer in peers if not names or any(meant(peer, name) for name in names))
    if not found:
        raise SystemExit(
            f"no program's name begins with {' or '.join(names)}; there are {', '.join(p.name for p in peers)}"
        )
    return found


def plan_of(args: argparse.Namespace) -> Plan:
    folder = args.folder or doctor.cache_folder() / "bench-peers" / args.shape
    folder.mkdir(parents=True, exist_ok=True)
    tasks = tuple(tasks_of(args))
    context = max(task.depth + task.tokens for task in tasks) + 64
    tower = None if args.picture is None else TOWERS.get(args.shape, CLIP_L)
    setup = Setup(SHAPES[args.shape], args.threads, context, str(folder.resolve()), tower=tower)
    environments = args.peers or doctor.cache_folder() / "peers"
    peers = chosen(args.only, PEERS if tower is None else WITH_PICTURES)
    return Plan(setup, peers, tasks, args.rounds, args.seconds, environments.resolve())


def numbers(text: str) -> list[int]:
    """1,2,4 -> [1, 2, 4]."""
    return [int(part) for part in text.split(",") if part]


def common_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """What every comparison of programs may be told."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    made.add_argument("--rounds", type=int, default=rounds, help="after one that is not measured (%(default)s)")
    made.add_argument("--threads", type=int, default=doctor.cpu()["usable_cores"])
    made.add_argument("--only", type=lambda text: text.split(","), default=[], help="names, or their beginnings")
    made.add_argument("--peers", type=Path, help="the folder of scripts/setup_peers")
    made.add_argument("--folder", type=Path, help="for the weights and the results")
    return made


def parser() -> argparse.ArgumentParser:
    made = common_parser(__doc__, rounds=9)
    made.add_argument("--decode", type=int, default=128, help="tokens to decode (%(default)s)")
    made.add_argument("--depth", type=numbers, default=[0, 4096], help="contexts to decode at (0,4096)")
    made.add_argument("--prefill", type=numbers, default=[512, 2048], help="prompts (512,2048)")
    made.add_argument("--linears", type=numbers, default=[1, 512], help="rows for the linears alone (1,512)")
    made.add_argument("--picture", type=int, metavar="N", help="measure a picture and N tokens of text instead")
    made.add_argument("--seconds", type=float, default=6, help="of a decoding, at most (%(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or stopped programs stay behind
    plan = plan_of(args)
    make_weights(plan, SHAPES[args.shape])
    comparison = Comparison(plan)
    comparison.run()
    found = result(plan, comparison, args.shape)
    stem = Path(plan.setup.folder) / f"result-{datetime.now():%Y%m%d-%H%M%S}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    page = report.markdown(found)
    stem.with_suffix(".md").write_text(page)
    print(page)
    if not report.draw_chart(found, stem.with_suffix(".png")):
        print(report.text_chart(found))
    say(f"wrote {stem}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
