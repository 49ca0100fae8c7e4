"""The model that ships: its size, its card, and right answers about the sample pictures, in a real terminal too."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal.pseudo import CTRL_D, ENTER, Terminal

from tinychat.checkpoint import open_model
from tinychat.config import read_config
from tinychat.core import Finished, Image, Message, Request, Text
from tinychat.engine.engine import Engine
from tinychat.eval import page
from tinychat.eval.demo import TASKS, correct, draw_samples
from tinychat.eval.demo.showcase import QUESTIONS, Question
from tinychat.load import EMBEDDED, load, quant_spec
from tinychat_kernels.layout import QuantSpec

SAMPLES = EMBEDDED.parent / "samples"
LARGEST = 12 * 10**6
FLOAT_PARAMETERS = 4 * 10**6
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_its_card_bears_out_the_8_bits_that_a_cpu_takes_by_default() -> None:
    found = json.loads((EMBEDDED / page.FILE).read_text("utf-8"))["facts"][page.INT8]
    assert found["setting"] == "int8 activations, head and tower"
    assert found["kl"]["high"] < 1e-4 and found["top1"]["value"] > 0.999
    assert found["right"] > 0.99 * found["exact_right"] and found["asked"] >= 2800
    assert "On a CPU, int8 activations, head and tower against" in (EMBEDDED / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*load(device="cpu"))


def test_it_is_small_and_quantized() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.parent.rglob("*") if path.is_file()) <= LARGEST
    config = read_config(EMBEDDED)
    assert quant_spec(config) == QuantSpec(bits=4, group_size=128, zero_point=True)
    index = open_model(EMBEDDED, config.layout)
    floats = [name for name in index.names() if not name.endswith((".qweight", ".qzeros", ".scales"))]
    assert sum(math.prod(index.shape(name)) for name in floats) <= FLOAT_PARAMETERS


def test_the_card_has_a_row_a_task() -> None:
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    assert all(f"\n| {task} | " in card for task in TASKS)


def test_the_sample_pictures_are_those_that_are_drawn(tmp_path: Path) -> None:
    draw_samples(tmp_path)
    assert {p.name: p.read_bytes() for p in SAMPLES.iterdir()} == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def name(question: Question) -> str:
    return f"{'+'.join(question.pictures)}-{question.task}"


@pytest.mark.parametrize("question", QUESTIONS, ids=name)
def test_it_answers_about_the_samples(engine: Engine, question: Question) -> None:
    parts = (*(Image(path=str(SAMPLES / picture)) for picture in question.pictures), Text(question.question))
    *_, end = engine.run([Request("r", (Message("user", parts),))])
    assert isinstance(end, Finished)
    assert correct(end.text, question.answer, question.task), end.text


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(tmp_path, sys.executable, "-m", "tinychat", *arguments))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.child.close(force=True)


def test_chat_answers_about_a_picture_in_a_real_terminal(open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal("chat", "--image", str(SAMPLES / "shapes.png"))
    assert "shapes.png" in terminal.see("[1 picture] >")
    terminal.type(f"What shape is blue?{ENTER}")
    assert "\nSquare." in terminal.wait(lambda text: text.endswith("\n>"))
    terminal.type(f"How many shapes are there?{ENTER}")
    assert "\n4" in terminal.wait(lambda text: text.endswith("\n>") and "How many" in text and text.count("\n>") > 1)
    terminal.type(f"/undo{ENTER}")
    assert "took back: How many shapes are there?" in terminal.see("took back")
    terminal.type(CTRL_D)
    assert terminal.ends_with() == 0


def test_ask_answers_in_words_and_in_json() -> None:
    command = [sys.executable, "-m", "tinychat", "ask", "What shape is blue?", str(SAMPLES / "shapes.png")]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "Square."
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert found["text"] == "Square." and found["finish_reason"] == "eos" and found["usage"]["image_tokens"] > 0
