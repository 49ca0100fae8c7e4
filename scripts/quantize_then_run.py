#!/usr/bin/env python3
"""Quantize a model to 4 bits with AWQ, a layer at a time, and ask the result a question.

    scripts/quantize_then_run.py MODEL OUT "What is in the picture?" picture.png [--group 64] [--samples 64]

The answer goes to stdout, the rest to stderr. What cannot work ends in one line and the exit code of its kind.
`tinychat quantize` is the same with every option, a plan beforehand, and resuming.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinychat.core import Failed, Image, Message, Request, Text
from tinychat.engine.engine import Engine
from tinychat.errors import TinychatError
from tinychat.load import load, resolve
from tinychat.quantize.job import Calibration, Job
from tinychat.quantize.run import LayerDone, Run
from tinychat.quantize.verb import layer_text
from tinychat.terminal.answers import print_answer
from tinychat.terminal.clean import clean_line
from tinychat_kernels.layout import QuantSpec

GROUPS = (32, 64, 128)


def quantize(model: str, out: Path, group: int, samples: int) -> None:
    """Write OUT, a folder of the model's own layout with a 4-bit decoder. Raises TinychatError."""
    job = Job(resolve(model), out, spec=QuantSpec(group_size=group), calibration=Calibration(samples=samples))
    for event in Run(job).events():
        if isinstance(event, LayerDone):
            print(layer_text(event), file=sys.stderr)


def ask(folder: Path, question: str, pictures: list[str]) -> int:
    """Print the answer as it comes; returns the exit code."""
    model, processor = load(folder)
    parts = (*(Image(path=path) for path in pictures), Text(question))
    events = Engine(model, processor).run([Request("1", (Message("user", parts),))])
    end = print_answer(events, out=sys.stdout, err=sys.stderr)
    return end.exit_code if isinstance(end, Failed) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("question")
    parser.add_argument("pictures", nargs="*")
    parser.add_argument("--group", type=int, choices=GROUPS, default=128, help="weights a scale (%(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences (%(default)s)")
    args = parser.parse_args(argv)
    try:
        quantize(args.model, args.out, args.group, args.samples)
        return ask(args.out, args.question, args.pictures)
    except TinychatError as error:
        print(clean_line(f"error: {error}"), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
