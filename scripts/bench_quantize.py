#!/usr/bin/env python3
"""Compare quantizers on the same models, in one run: round to nearest, our AWQ with its options, GPTQModel's AWQ.

    scripts/bench_quantize.py MODEL [MODEL ...] [--bits 4,3] [--groups 128,64] [--search duo,joint] [--peer PYTHON]

MODEL is a 16-bit folder: tinychat's embedded kind (held-out dialogues about pictures), or a text model of
scripts/train_text_model.py (held-out modules of Python's library). Each quantizer is a process of its own, whose wall
time and peak memory are taken. Against the 16-bit model: KL divergence in nats a token with a bootstrap 95 % interval
over sequences, and perplexity. `--peer` is the Python of an environment that has gptqmodel, which reads text alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tinychat.core import Request, StoppingParams, Text
from tinychat.engine.engine import Engine
from tinychat.eval import divergence
from tinychat.eval.demo import sample_at
from tinychat.eval.divergence import Held
from tinychat.eval.heldout import Item, heldout
from tinychat.eval.perplexity import answer_perplexity, perplexity, text_ids
from tinychat.load import load
from train_text_model import library_text

WINDOW = 256  # tokens of a text sequence, which are bytes
RESAMPLES = 2000
PEER_NAME = "gptqmodel"
PEER = Path(__file__).with_name("peer_gptqmodel.py")


@dataclass(frozen=True)
class Data:
    """Held-out sequences and the text for perplexity (None: that of the right answers), our calibration flags, and
    the same words, as far as they are words, for a peer: a file of {"text": ...}."""

    items: tuple[Item, ...]
    text: str | None
    calibration: tuple[str, ...]
    words: Path


@dataclass(frozen=True)
class Result:
    """One quantizer on one model; `kl` is the mean of each sequence."""

    model: str
    bits: int
    group: int
    method: str
    kl: np.ndarray
    perplexity: float
    seconds: float
    peak_mib: float


def text_data(samples: int, folder: Path) -> Data:
    """Windows of held-out text to read, and as many of training text, in a file, to calibrate on."""
    text = library_text(held_out=True)
    step = len(text) // samples
    stopping = StoppingParams(max_new_tokens=1)
    windows = [text[i * step : i * step + WINDOW] for i in range(samples)]
    items = tuple(
        Item("text", Request(f"{i}", parts=(Text(window),), stopping=stopping), reads_prompt=True)
        for i, window in enumerate(windows)
    )
    seen = library_text(held_out=False)
    path = folder / "calibration.jsonl"
    write_texts(path, [seen[at : at + 2 * WINDOW] for at in range(0, len(seen), len(seen) // 64)][:64])
    return Data(items, text[: samples * WINDOW], ("--calib", str(path), "--calib-samples", "64"), path)


def demo_data(samples: int, folder: Path) -> Data:
    """Held-out dialogues; we calibrate on the generated set, a peer that reads text alone on dialogues without
    pictures."""
    turns = [turn for i in range(256) for turn in sample_at("train", i, 0, 0).turns]
    path = folder / "calibration.jsonl"
    write_texts(path, [" ".join(f"{turn.question} {turn.answer}" for turn in turns[i::64]) for i in range(64)])
    return Data(tuple(heldout("demo").items(samples)), None, (), path)


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """A line {"text": ...} each."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


class Yardstick:
    """The 16-bit model's predictions, and what others lose against them."""

    def __init__(self, folder: Path, data: Data) -> None:
        self.data = data
        engine = Engine(*load(folder, dtype="float32", device="cpu"))
        self.held: list[Held] = [divergence.continued(engine, item) for item in data.items]
        self.base = [divergence.coded(divergence.read(engine, held).logits) for held in self.held]
        self.perplexity = self._perplexity(engine)

    def measure(self, folder: Path) -> tuple[np.ndarray, float]:
        """Mean KL of each sequence, and perplexity."""
        engine = Engine(*load(folder, dtype="float32", device="cpu"))
        kl = [
            divergence.compare(held, base, divergence.read(engine, held).logits).kl.mean()
            for held, base in zip(self.held, self.base, strict=True)
        ]
        return np.array(kl), self._perplexity(engine)

    def _perplexity(self, engine: Engine) -> float:
        if self.data.text is None:
            return answer_perplexity(engine, self.data.items)
        model: Any = engine.model
        return perplexity(model, text_ids(engine.processor, self.data.text), WINDOW)


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a process. Ends the run where it fails."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said[-2000:]}")
    return time.monotonic() - started, usage.ru_maxrss / 1024


def commands(model: Path, out: Path, bits: int, group: int, args: argparse.Namespace, data: Data) -> Iterator[Any]:
    """(name, command) of every quantizer."""
    ours = [sys.executable, "-m", "tinychat", "quantize", str(model), str(out), "--bits", str(bits)]
    ours += ["--group-size", str(group), "--plain", "--pseudo", "--no-card"]
    yield "rtn", [*ours, "--method", "rtn"]
    yield "awq", [*ours, *data.calibration]
    for option in args.search:
        yield f"awq {option}", [*ours, *data.calibration, *(f"--{name}" for name in option.split("+"))]
    if args.peer:
        decoder, made = (model / "llm", out / "llm") if (model / "llm").is_dir() else (model, out)
        named = [args.peer, str(PEER), str(decoder), str(made), str(data.words)]
        yield PEER_NAME, [*named, "--bits", str(bits), "--group", str(group)]


def results(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    """Every quantizer on every model, the 16-bit model first."""
    for model in args.models:
        data = (demo_data if (model / "llm").is_dir() else text_data)(args.samples, folder)
        stick = Yardstick(model, data)
        yield Result(model.name, 16, 0, "16 bit", np.zeros(len(data.items)), stick.perplexity, 0, 0)
        for bits in args.bits:
            for group in args.groups:
                for name, command in commands(model, folder / "out", bits, group, args, data):
                    seconds, peak = timed(command)
                    if name == PEER_NAME:
                        complete(model, folder / "out")
                    kl, found = stick.measure(folder / "out")
                    shutil.rmtree(folder / "out")
                    yield Result(model.name, bits, group, name, kl, found, seconds, peak)


def complete(model: Path, made: Path) -> None:
    """Add what a decoder alone lacks: the rest of the source's folder."""
    for path in model.iterdir():
        if path.is_dir() and not (made / path.name).exists():
            shutil.copytree(path, made / path.name)
        elif path.is_file() and (model / "llm").is_dir():
            shutil.copyfile(path, made / path.name)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean."""
    chance = np.random.default_rng(0)
    means = values[chance.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def row(result: Result, nearest: Result | None) -> dict[str, Any]:
    """The figures of a line: KL and its interval, and the same of the difference from round to nearest, paired."""
    low, high = interval(result.kl)
    made: dict[str, Any] = {
        "model": result.model, "bits": result.bits, "group": result.group, "method": result.method,
        "kl": float(result.kl.mean()), "kl_95": [low, high], "perplexity": result.perplexity,
        "seconds": round(result.seconds, 1), "peak_mib": round(result.peak_mib),
    }  # fmt: skip
    if nearest is not None:
        made["kl_over_rtn"] = made["kl"] / float(nearest.kl.mean())
        made["kl_less_rtn_95"] = list(interval(result.kl - nearest.kl))
    return made


def draw(rows: Sequence[dict[str, Any]]) -> Table:
    """The table that is printed."""
    table = Table(
        "model", "bits", "group", "method", "KL", "95 %", "of RTN", "KL - RTN, 95 %", "perplexity", "s", "MiB"
    )
    for r in rows:
        over, less = r.get("kl_over_rtn"), r.get("kl_less_rtn_95")
        cells = (
            r["model"], str(r["bits"]), str(r["group"]), r["method"], f"{r['kl']:.5f}",
            "{:.5f} .. {:.5f}".format(*r["kl_95"]), "" if over is None else f"{over:.2f}",
            "" if less is None else "{:+.5f} .. {:+.5f}".format(*less),
            f"{r['perplexity']:.4f}", f"{r['seconds']:.0f}", str(r["peak_mib"]),
        )  # fmt: skip
        table.add_row(*cells)
    return table


def numbers(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--bits", type=numbers, default=[4, 3])
    parser.add_argument("--groups", type=numbers, default=[128, 64])
    parser.add_argument("--search", type=lambda text: text.split(","), default=[], help="such as duo,joint,duo+joint")
    parser.add_argument("--samples", type=int, default=64, help="held-out sequences (%(default)s)")
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with gptqmodel")
    parser.add_argument("--json", action="store_true", help="a JSON object a line, as they come")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    nearest: Result | None = None
    with tempfile.TemporaryDirectory() as folder:
        for result in results(args, Path(folder)):
            if result.method in ("rtn", "16 bit"):
                nearest = None
            rows.append(row(result, nearest))
            nearest = result if result.method == "rtn" else nearest
            if args.json:
                print(json.dumps(rows[-1]), flush=True)
            else:
                print(f"{result.model} {result.bits} {result.group} {result.method}", file=sys.stderr)
    if not args.json:
        Console(width=160).print(draw(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
