"""Calibration data: what each source becomes, that it is drawn with the seed, and how bad sources are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image as pillow

from make_tiny_model import make_tiny_model
from tinychat.config import read_config
from tinychat.core import Image, Message, Request, Text
from tinychat.errors import FormatError, MediaError, TinychatError, UsageError
from tinychat.inputs.processor import Processor, Prompt
from tinychat.load import EMBEDDED
from tinychat.quantize.calibration import GENERATED, QUESTION, gather
from tinychat.quantize.job import Calibration

EOS = 258


@pytest.fixture(scope="module")
def sees(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = make_tiny_model(tmp_path_factory.mktemp("sees"), "llava_hf")
    return Processor.from_folder(folder, read_config(folder))


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = make_tiny_model(tmp_path_factory.mktemp("reads"), "text")
    return Processor.from_folder(folder, read_config(folder))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pillow.new("RGB", (9, 7), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def lines(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def one(processor: Processor, source: str, seqlen: int = 10**6) -> Prompt:
    (prompt,) = gather(Calibration((source,), 1, seqlen), processor).prompts
    return prompt


def said(processor: Processor, prompt: Prompt) -> str:
    return processor.tokenizer.decode(list(prompt.ids))


# Sources


def test_a_conversation_is_what_the_model_would_have_seen_and_said(sees, picture, tmp_path):
    turns = [{"role": "user", "content": "What <image>\nis it?"}, {"role": "assistant", "content": "Red."}]
    prompt = one(sees, lines(tmp_path / "a.jsonl", {"messages": turns, "images": ["red.png"]}))
    asked = (Text("What "), Image(path=str(picture)), Text("is it?"))
    question = sees(Request("x", (Message("user", asked),)))
    assert prompt.ids == (*question.ids, *sees.marked.encode("Red."), EOS)
    assert prompt.slots == question.slots and prompt.digests == question.digests
    assert prompt.images[0].data is None, "pictures that have a file do not stay in memory"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}], "images": ["red.png"]},
        {"messages": [{"role": "user", "content": "<image>\nHi"}], "image": "red.png"},
        {"messages": [{"role": "user", "content": [{"image": "red.png"}, {"type": "text", "text": "Hi"}]}]},
        {"conversations": [{"from": "human", "value": "<image>\nHi"}], "image": "red.png"},
    ],
)  # fmt: skip
def test_ways_to_write_a_picture(sees, picture, tmp_path, row):
    expected = sees(Request("x", (Message("user", (Image(path=str(picture)), Text("Hi"))),)))
    prompt = one(sees, lines(tmp_path / "a.jsonl", row))
    assert (prompt.ids, prompt.slots, prompt.digests) == (expected.ids, expected.slots, expected.digests)


def test_a_folder_of_pictures(sees, picture, tmp_path):
    def question() -> str:
        return said(sees, one(sees, str(tmp_path)))

    assert QUESTION in question()
    (tmp_path / "prompt.txt").write_text("Which colour?")
    assert "Which colour?" in question()
    picture.with_suffix(".txt").write_text("How many?")
    assert "How many?" in question() and "Which colour?" not in question()


def test_texts_are_cut_into_windows_that_hold_all_of_it(reads, tmp_path):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(33, 123))))
    data = gather(Calibration((str(tmp_path / "a.txt"),), 99, 40), reads)
    whole = reads(Request("x", parts=(Text((tmp_path / "a.txt").read_text()),))).ids
    windows = sorted(data.prompts, key=lambda prompt: prompt.ids[-1])
    assert [i for prompt in windows for i in prompt.ids] == list(whole[:80]) and data.lengths == (40, 40)
    rows = lines(tmp_path / "a.jsonl", {"text": "one"}, "", {"text": "two"})
    assert sorted(said(reads, p) for p in gather(Calibration((rows,), 9), reads).prompts) == ["one", "two"]
    rows = lines(tmp_path / "b.jsonl", '{"text": "one\u2028two\x85three"}')  # as it is, which JSON allows
    assert said(reads, one(reads, rows)) == "one\u2028two\x85three"


def test_sources_share_the_samples(sees, picture, tmp_path):
    text = lines(tmp_path / "a.jsonl", *({"text": f"line {i}"} for i in range(20)))
    data = gather(Calibration((text, GENERATED, str(tmp_path)), 8), sees)
    assert len(data.prompts) == 3 + 3 + 1, "a folder of one picture has no more to give"
    assert data.pictures == 1 + 2


# The generated set


def test_generated_data_suits_the_model(sees, reads):
    data = gather(Calibration(samples=8, seqlen=64), sees)
    assert data.pictures == 6 and len(data.prompts) == 8
    text = gather(Calibration(samples=8, seqlen=64), reads)
    assert not text.pictures and len(set(text.prompts)) == 8 and text.lengths == (64,) * 8


def test_the_embedded_model_is_calibrated_on_its_own_dialogues():
    config = read_config(EMBEDDED)
    processor = Processor.from_folder(EMBEDDED, config)
    data = gather(Calibration(samples=6), processor)
    assert data.pictures > 2 and all(prompt.ids[-1] in processor.stop_ids for prompt in data.prompts)


def test_equal_data_has_equal_hashes(sees, picture, tmp_path):
    def digest(seed: int = 0, samples: int = 5, seqlen: int = 30) -> str:
        return gather(Calibration(samples=samples, seqlen=seqlen, seed=seed), sees).sha256

    assert digest() == digest() and len({digest(), digest(1), digest(samples=4), digest(seqlen=29)}) == 4
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    (copy / "blue.png").write_bytes(picture.read_bytes())
    here, there = (gather(Calibration((str(folder),), 1), sees).sha256 for folder in (tmp_path, copy))
    pillow.new("RGB", (9, 7), "blue").save(copy / "blue.png")
    assert here == there != gather(Calibration((str(copy),), 1), sees).sha256


# Refusals


@pytest.mark.parametrize(
    ("name", "content", "kind", "sentence"),
    [
        ("a.jsonl", '{"text": "x"}\n{"x', FormatError, r"a\.jsonl, line 2 is not a calibration .* \(JSON"),
        ("a.jsonl", '{"prompt": "x"}', FormatError, r"line 1 is not a calibration sample .*; write \{\"text\""),
        ("a.jsonl", "[1]", FormatError, "line 1 is not a calibration sample"),
        ("a.jsonl", '{"messages": [{"role": "robot", "content": ""}]}', FormatError, "line 1 is not .*robot"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "<image>"}]}', FormatError, "line 1 is not"),
        ("a.jsonl", "", UsageError, "holds nothing to read; give another --calib"),
        ("a.txt", "", UsageError, "holds nothing to read; give another --calib"),
        ("a.jsonl", '{"text": ""}', UsageError, "holds nothing to read; give another --calib"),
        ("a.txt", "\xff".encode("latin-1"), FormatError, "is not text in UTF-8"),
        ("a.csv", "x", UsageError, r"is a \.csv file; give \.jsonl or \.txt"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}], "image": "no.png"}', MediaError, "no.png does"),
    ],
)  # fmt: skip
def test_bad_sources_are_named(sees, tmp_path, name, content, kind, sentence):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=sentence):
        one(sees, str(tmp_path / name))


def test_a_source_that_is_not_there(sees, tmp_path):
    with pytest.raises(UsageError, match="there is no calibration source .*nothing"):
        one(sees, str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="holds nothing to read"):
        one(sees, str(tmp_path))
    with pytest.raises(UsageError, match="0 samples of 5 tokens are asked for; give 1 or more"):
        Calibration(samples=0, seqlen=5)
    with pytest.raises(UsageError, match="3 calibration sources are given for 2 samples; give a --calib-samples of"):
        Calibration(("a.txt", "b.txt", "c.txt"), samples=2)


def test_a_text_model_takes_no_pictures(reads, picture, tmp_path):
    with pytest.raises(TinychatError, match="reads text only and was given an image"):
        one(reads, str(tmp_path))
