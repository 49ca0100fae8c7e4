"""The model that ships for searching: its size, its card, and what it finds among pictures that it has never seen."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image as pillow

from tinychat import load, search
from tinychat.core import Image
from tinychat.picture_encoder import EMBEDDED, PictureEncoder, open_source
from tinychat.search_flags import SearchFlags
from train_demo_clip import CASES, GROUP, trial

SAMPLES = load.EMBEDDED.parent / "samples"
LARGEST = 3 * 10**6


@pytest.fixture(scope="module")
def encoder() -> PictureEncoder:
    return PictureEncoder(open_source(None, None), torch.device("cpu"), torch.float32)


def test_it_is_small_and_has_a_card():
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= LARGEST
    card = (EMBEDDED / "README.md").read_text("utf-8")
    assert all(f"\n| {name} | " in card for name, *_ in CASES)
    assert "knows drawn shapes only" in card


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("The word CAT", "word.png"),
        ("the number 731", "number.png"),
        ("a chart with three bars", "chart.png"),
        ("purple heart", "more-shapes.png"),
        ("yellow star", "shapes.png"),
    ],
)
def test_it_finds_the_samples(query: str, first: str):
    found = search.perform(SearchFlags(folder=str(SAMPLES), words=[query]), None, lambda _: None)
    assert found.hits[0].path == first
    assert found.json["model"] == "embedded"


@pytest.mark.parametrize(("name", "split", "unseen"), CASES)
def test_it_tells_held_out_pictures_apart(encoder: PictureEncoder, name: str, split: str, unseen: bool):
    """The bound is that of 16-bit weights on the trials below; the card has the figures of many."""
    right = 0
    for index in range(1000, 1002):
        made = trial(split, index, unseen)  # type: ignore[arg-type]
        pictures = torch.stack([encoder.pixels(Image(data=png(picture))) for picture in made.pictures])
        texts = torch.stack([encoder.embed_text(told.text, print) for told in made.whole])
        scores = texts @ encoder.embed(pictures).T
        right += int((scores.argmax(1) == torch.arange(GROUP)).sum())
    assert right >= 0.9 * 2 * GROUP, name


def png(picture: object) -> bytes:
    buffer = io.BytesIO()
    pillow.fromarray(picture).save(buffer, "PNG")  # type: ignore[arg-type]
    return buffer.getvalue()


def test_nothing_else_ships_with_it():
    names = {path.name for path in EMBEDDED.iterdir()}
    assert names == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
