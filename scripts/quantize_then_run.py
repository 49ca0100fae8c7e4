#!/usr/bin/env python3
"""Load a model, round its decoder to 4 bits, save it, and ask the saved one a question.

    scripts/quantize_then_run.py MODEL OUT "What is in the picture?" picture.png [--group 64]

The answer goes to stdout, the rest to stderr. What cannot work ends in one line and the exit code of its kind.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tinychat.core import Failed, Image, Message, Request, Text
from tinychat.engine.engine import Engine
from tinychat.errors import TinychatError, UsageError
from tinychat.load import load, load_model, resolve
from tinychat.quantize import quantize_to_nearest
from tinychat.terminal.answers import print_answer
from tinychat.terminal.clean import clean_line
from tinychat_kernels.layout import QuantSpec

GROUPS = (32, 64, 128)
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*")


def quantize(source: str, out: Path, group: int) -> None:
    """Write OUT, a VILA folder with a 4-bit decoder that every tinychat command takes."""
    folder = resolve(source)
    if out.exists() and out.resolve() == folder.resolve():
        raise UsageError(f"{out} is the model itself", "give another folder to write")
    model = load_model(folder, device="cpu")
    for step in quantize_to_nearest(model, QuantSpec(group_size=group)):
        print(f"layer {step.done} of {step.total}", file=sys.stderr)
    try:
        model.save_pretrained(out)
        copy_words(folder, out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror or error}", "give another folder") from error


def copy_words(folder: Path, out: Path) -> None:
    """What belongs to the tokenizer and to the pictures is taken over as it is."""
    for part in ("llm", "vision_tower", "."):
        for path in (folder / part).glob("preprocessor_config.json"):
            shutil.copy(path, out / "vision_tower")
        for pattern in TOKENIZER:
            for path in (folder / part).glob(pattern):
                shutil.copy(path, out / "llm")


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
    args = parser.parse_args(argv)
    try:
        quantize(args.model, args.out, args.group)
        return ask(args.out, args.question, args.pictures)
    except TinychatError as error:
        print(clean_line(f"error: {error}"), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
