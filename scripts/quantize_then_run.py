#!/usr/bin/env python3
"""Load a model, round its decoder to 4 bits, save it, and ask the saved one a question.

scripts/quantize_then_run.py MODEL OUT "What is in the picture?" picture.png
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tinychat.core import Failed, Image, Message, Request, Text, Token
from tinychat.engine.engine import Engine
from tinychat.load import load, load_model, resolve
from tinychat.quantize import quantize_to_nearest

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*")


def quantize(source: str, out: Path) -> None:
    """Write OUT, a VILA folder with a 4-bit decoder that every tinychat command takes."""
    model = load_model(source, device="cpu")
    for step in quantize_to_nearest(model):
        print(f"layer {step.done} of {step.total}", end="\r", flush=True)
    model.save_pretrained(out)
    folder = resolve(source)
    for part in ("llm", "vision_tower", "."):
        for path in (folder / part).glob("preprocessor_config.json"):
            shutil.copy(path, out / "vision_tower")
        for pattern in TOKENIZER:
            for path in (folder / part).glob(pattern):
                shutil.copy(path, out / "llm")


def ask(folder: Path, question: str, pictures: list[str]) -> None:
    """Print the answer as it comes."""
    model, processor = load(folder)
    parts = (*(Image(path=path) for path in pictures), Text(question))
    for event in Engine(model, processor).run([Request("1", (Message("user", parts),))]):
        if isinstance(event, Token):
            print(event.text, end="", flush=True)
        elif isinstance(event, Failed):
            raise SystemExit(f"{event.message}; {event.remedy}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("question")
    parser.add_argument("pictures", nargs="*")
    args = parser.parse_args()
    quantize(args.model, args.out)
    ask(args.out, args.question, args.pictures)


if __name__ == "__main__":
    main()
