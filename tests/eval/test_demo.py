"""The demo model's data: the same at every call, split apart, true to its pictures, and all of it can be tokenized."""

from __future__ import annotations

import json
import random
import re
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import demo_tokenizer
from tinychat.eval import demo
from tinychat.eval.demo import (
    beyond,
    dense,
    dialogues,
    heldout,
    phrases,
    pictures,
    questions,
    samples,
    scenes,
    showcase,
)
from tinychat.eval.demo.questions import Asker, Turn
from tinychat.eval.demo.scenes import GRID, IMAGE_SIZE, PATCH, Background, Scene, Shape

GROUND = (1, 2, 3)
PLAIN = Background("plain", GROUND, GROUND)


@pytest.fixture(scope="module")
def tokens() -> PreTrainedTokenizerFast:
    return demo_tokenizer.build_tokenizer()


def written(drawn: samples.Dialogue | demo.Sample) -> str:
    system = f"<|system|>{drawn.system}<|end|>" if drawn.system else ""
    return system + "".join(f"<|user|>{t.question}<|end|><|assistant|>{t.answer}<|end|>" for t in drawn.turns)


@pytest.mark.parametrize("split", demo.SPLITS)
def test_a_sample_is_the_same_at_every_call(split: demo.Split):
    for index in range(8):
        once, again = demo.sample_at(split, index), demo.sample_at(split, index)
        assert once.turns == again.turns and once.system == again.system
        assert all(np.array_equal(a, b) for a, b in zip(once.pictures, again.pictures, strict=True))
        assert np.array_equal(once.dense, again.dense)


def test_splits_and_seeds_share_no_picture():
    drawn = [demo.sample_at(split, i, seed) for split in demo.SPLITS for seed in (0, 1) for i in range(60)]
    painted = [picture.tobytes() for sample in drawn for picture in sample.pictures]
    # two pictures of one sample may be the same: "what is different?" - "Nothing."
    assert len(set(painted)) > 0.98 * len(painted)
    first = [sample.pictures[0].tobytes() for sample in drawn if sample.pictures]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("split", demo.SPLITS)
def test_shapes_and_types_of_a_sample(split: demo.Split):
    for index in range(30):
        sample = demo.sample_at(split, index)
        assert sample.dense.shape == (len(sample.pictures), len(demo.CLASSES), GRID, GRID)
        assert all(p.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and p.dtype == np.uint8 for p in sample.pictures)
        assert sum(turn.pictures for turn in sample.turns) == len(sample.pictures)
        assert 1 <= len(sample.turns) <= dialogues.MAX_TURNS
        assert all((sample.dense[:, i] < classes).all() for i, classes in enumerate(demo.CLASSES.values()))
        assert {turn.task for turn in sample.turns} <= set(demo.TASKS)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_number_of_pictures_can_be_asked_for(count: int):
    assert all(len(demo.sample_at("train", i, pictures=count).pictures) == count for i in range(10))


def test_dense_labels_lie_on_what_they_name():
    shape = Shape("star", "red", (255, 0, 0), 40.0, 60.0, 14.0, 0.0)
    labels = dense.dense(Scene(PLAIN, (shape,)))
    row, column = int(60 // PATCH), int(40 // PATCH)
    assert labels[0, row, column] == 1 + scenes.SHAPES.index("star")
    assert labels[1, row, column] == 1 + scenes.COLOURS.index("red")
    assert np.argwhere(labels[2]).tolist() == [[row, column]]
    things = np.delete(labels, dense.CHANNELS.index("total"), axis=0)
    assert things[:, 0].sum() == 0 and things[:, :, -1].sum() == 0


def test_dense_labels_tell_how_a_thing_stands_among_the_others():
    red, blue = (255, 0, 0), (0, 0, 255)
    shapes = (
        Shape("star", "red", red, 20.0, 80.0, 8.0, 0.0),
        Shape("heart", "blue", blue, 48.0, 16.0, 14.0, 0.0),
        Shape("star", "blue", blue, 78.0, 50.0, 10.0, 0.0),
    )
    labels = dense.dense(Scene(PLAIN, shapes))
    told = {
        name: [int(labels[i, int(s.y // PATCH), int(s.x // PATCH)]) for s in shapes]
        for i, name in enumerate(dense.CHANNELS)
    }
    assert told["size"] == [1, 4, 2]
    assert told["place"] == [7, 2, 6]
    assert told["order"] == [1, 2, 3]
    assert told["down_order"] == [3, 1, 2]
    assert told["extent_order"] == [3, 1, 2]
    assert told["across"] == [dense.FIRST, dense.BETWEEN, dense.LAST]
    assert told["down"] == [dense.LAST, dense.FIRST, dense.BETWEEN]
    assert told["extent"] == [dense.LAST, dense.FIRST, dense.BETWEEN]
    assert told["like_colour"] == [1, 2, 2]
    assert told["like_kind"] == [2, 1, 2]
    assert (labels[dense.CHANNELS.index("total")] == 3).all()


def test_dense_labels_agree_with_the_pixels():
    rng, inside = random.Random(5), []
    for _ in range(40):
        scene = replace(scenes.compose_shapes(rng, pictures.TRAINING, 4), background=PLAIN)
        painted = np.asarray(pictures.render(rng, scene, 1, vary=False))
        inked = (painted != GROUND).any(-1).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))
        labelled = dense.dense(scene)[0] > 0
        assert labelled[inked > 0.8].all()
        inside += list(inked[labelled] > 0)
    assert np.mean(inside) > 0.9


@pytest.mark.parametrize("style", [pictures.TRAINING, heldout.STYLE], ids=["training", "heldout"])
def test_glyph_boxes_lie_on_ink(style: scenes.Style):
    rng = random.Random(7)
    for _ in range(60):
        scene = scenes.compose_lettering(rng, style)
        text = replace(scene.lettering, rgb=(255, 255, 255))  # type: ignore[type-var]
        painted = style.paint(rng, Scene(Background("plain", (0, 0, 0), (0, 0, 0)), lettering=text)).astype(int).sum(-1)
        assert "".join(glyph.character for glyph in text.glyphs) == text.text
        for glyph in text.glyphs:
            top, bottom, left, right = (
                round(min(IMAGE_SIZE, max(0.0, edge))) for edge in (glyph.top, glyph.bottom, glyph.left, glyph.right)
            )
            assert painted[top:bottom, left:right].max() > 250, text


def components(pixels: np.ndarray) -> list[np.ndarray]:
    """The connected spots of a picture that are not ground, each as its (row, column) pairs."""
    left = {tuple(p) for p in np.argwhere((pixels != GROUND).any(-1)).tolist()}
    found = []
    while left:
        queue = deque([left.pop()])
        spot = []
        while queue:
            row, column = queue.popleft()
            spot.append((row, column))
            for near in [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    queue.append(near)
        found.append(np.array(spot))
    return found


def colour_of(pixels: np.ndarray, spot: np.ndarray) -> str:
    row, column = spot[len(spot) // 2]
    tone = pixels[row, column].astype(int)
    return min(scenes.COLOURS, key=lambda c: min(abs(tone - np.array(a)).sum() for a in scenes.ANCHORS[c]))


def probes() -> dict[str, tuple[str, ...]]:
    """Templates that spell out which question it is and about what."""
    fields = {key: dict.fromkeys(re.findall(r"\{\w\}", group[0])) for key, group in phrases.QUESTIONS.items()}
    fields["text_colour"] = {}
    return {key: ("/".join((key, *names)),) for key, names in fields.items()}


def test_answers_agree_with_a_recount_of_the_pixels():
    rng, checked = random.Random(11), set()
    for _ in range(120):
        scene = scenes.compose_shapes(rng, pictures.TRAINING, rng.randint(1, 5))
        scene = replace(scene, background=PLAIN)
        pixels = np.asarray(pictures.render(rng, scene, 1, vary=False))
        spots = components(pixels)
        colours = [colour_of(pixels, spot) for spot in spots]
        middles = [spot.mean(0) for spot in spots]
        ends = {
            "leftmost": min(range(len(spots)), key=lambda i: spots[i][:, 1].min()),
            "rightmost": max(range(len(spots)), key=lambda i: spots[i][:, 1].max()),
            "topmost": min(range(len(spots)), key=lambda i: spots[i][:, 0].min()),
            "bottom": max(range(len(spots)), key=lambda i: spots[i][:, 0].max()),
            "largest": max(range(len(spots)), key=lambda i: len(spots[i])),
            "smallest": min(range(len(spots)), key=lambda i: len(spots[i])),
        }
        for turn in (turn for chain in questions.about_shapes(Asker(rng, probes()), scene) for turn in chain):
            key, *about = turn.question.split("/")
            checked.add(key)
            if key == "count":
                assert turn.answer == str(len(spots))
            elif key == "count_of" and about[0].endswith(" shapes"):
                assert turn.answer == str(colours.count(about[0].split()[0]))
            elif key in ends:
                assert turn.answer.split()[1] == colours[ends[key]], (key, scene)
            elif key == "where" and "shape" in about[0]:
                middle = middles[colours.index(about[0].split()[0])]
                assert ("top" in turn.answer) == (middle[0] < IMAGE_SIZE / 3), turn
                assert ("right" in turn.answer) == (middle[1] > IMAGE_SIZE * 2 / 3), turn
    assert checked >= {
        "count",
        "count_of",
        "where",
        "leftmost",
        "rightmost",
        "topmost",
        "bottom",
        "largest",
        "smallest",
    }


def test_chart_answers_agree_with_the_columns_of_the_picture():
    rng = random.Random(13)
    for _ in range(60):
        scene = scenes.compose_chart(rng, pictures.TRAINING)
        pixels = np.asarray(pictures.render(random.Random(0), replace(scene, background=PLAIN), 1, vary=False))
        heights = {}
        for name, rgb in ((bar.colour, bar.rgb) for bar in scene.bars):
            heights[name] = int((pixels == rgb).all(-1).any(1).sum())
        for turn in (turn for chain in questions.about_bars(Asker(rng, probes()), scene) for turn in chain):
            key, *about = turn.question.split("/")
            if key in ("tallest", "shortest"):
                wanted = (max if key == "tallest" else min)(heights, key=lambda name: heights[name])
                assert turn.answer == questions.say(wanted)
            elif key == "taller":
                assert turn.answer == ("Yes." if heights[about[0]] > heights[about[1]] else "No.")
            elif key == "count_bars":
                assert turn.answer == str(len(heights))


def test_a_question_with_one_answer_has_one_answer():
    for index in range(400):
        drawn = samples.dialogue_at("validation", index)
        if len(drawn.scenes) != 1:
            continue
        known: dict[str, str] = {}
        for turn in (turn for turn in drawn.turns if turn.task not in ("follow_up", "describe")):
            assert known.setdefault(turn.question.lower(), turn.answer) == turn.answer


def test_what_changed_is_said():
    rng = random.Random(3)
    seen = set()
    for _ in range(80):
        first = scenes.compose_shapes(rng, pictures.TRAINING, 3)
        second, (kind, index) = scenes.change(rng, pictures.TRAINING, first)
        seen.add(kind)
        differing = sum(a not in second.shapes for a in first.shapes)
        assert differing == (kind != "none")
        chains = questions.about_two(Asker(rng, probes()), (first, second), (kind, index))
        said = {turn.question: turn.answer for chain in chains for turn in chain}
        assert (
            said["differs"] == "Nothing." if kind == "none" else first.shapes[index].kind or first.shapes[index].colour
        )
    assert seen == {"colour", "shape", "missing", "none"}


def test_yes_and_no_are_about_as_frequent():
    turns = [turn for index in range(1500) for turn in samples.dialogue_at("validation", index).turns]
    for task in ("exist", "position", "size", "chart"):
        said = [turn.answer for turn in turns if turn.task == task and turn.answer in ("Yes.", "No.")]
        assert 0.35 < said.count("Yes.") / len(said) < 0.65, task


def test_every_task_is_asked():
    asked = {turn.task for index in range(400) for turn in samples.dialogue_at("train", index).turns}
    assert asked == set(demo.TASKS)


def test_held_out_phrasings_and_words_are_new():
    trained = {q.lower() for group in phrases.QUESTIONS.values() for q in group} | {q.lower() for q in beyond.UNKNOWN}
    assert not trained & {q.lower() for group in heldout.QUESTIONS.values() for q in group}
    assert set(heldout.QUESTIONS) >= set(phrases.QUESTIONS)
    assert not set(heldout.WORDS) & set(scenes.WORDS)


def fields(template: str) -> set[str]:
    return set(re.findall(r"\{\w+\}", template))


def test_phrasings_of_a_question_fill_the_same_gaps():
    for key, group in phrases.QUESTIONS.items():
        allowed = set().union(*map(fields, group))
        assert all(fields(q) <= allowed for q in heldout.QUESTIONS[key]), key
        if key != "text_colour":
            assert all(fields(q) == allowed for q in (*group, *heldout.QUESTIONS[key])), key


def test_dialogues_are_short(tokens: PreTrainedTokenizerFast):
    drawn = [samples.dialogue_at(split, i) for split in demo.SPLITS for i in range(700)]
    lengths = tokens([written(replace(d, system=None)) for d in drawn], return_attention_mask=False)["input_ids"]
    assert max(map(len, lengths)) <= dialogues.MAX_TOKENS


def test_the_words_of_the_answers_are_one_token_each(tokens: PreTrainedTokenizerFast):
    names = [*scenes.COLOURS, *scenes.SHAPES]
    whole = [f(name) for name in names for f in (str.capitalize, lambda name: " " + name)]
    whole += [
        *"0123456789",
        " shapes",
        " bars",
        "Yes",
        "No",
        "There",
        "Both",
        "What",
        " largest",
        " leftmost",
        " middle",
    ]
    assert not {text: tokens.tokenize(text) for text in whole if len(tokens.encode(text)) > 1}


def test_what_is_read_is_spelled(tokens: PreTrainedTokenizerFast):
    for word in (*scenes.WORDS, *heldout.WORDS, "731", "42", "CAT"):
        assert len(tokens.encode(word)) == len(word)
    assert tokens.encode("731") == [tokens.encode(digit)[0] for digit in "731"]


@given(st.text())
def test_any_text_comes_back(tokens: PreTrainedTokenizerFast, text: str):
    if not any(special in text for special in demo_tokenizer.SPECIALS):
        assert tokens.decode(tokens.encode(text)) == text


def test_the_tokenizer_is_the_same_at_every_call_and_after_saving(tokens: PreTrainedTokenizerFast, tmp_path: Path):
    again = demo_tokenizer.build_tokenizer()
    assert again.get_vocab() == tokens.get_vocab()
    assert len(tokens) == demo_tokenizer.VOCABULARY and sorted(tokens.get_vocab().values()) == list(range(len(tokens)))
    tokens.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|><image>What colour is the circle? é世<|end|><|assistant|>Red.<|end|>"
    assert loaded.encode(text) == tokens.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == ("<|end|>", None, "<pad>")
    assert loaded.chat_template == demo_tokenizer.CHAT_TEMPLATE


def test_the_template_writes_what_training_sees(tokens: PreTrainedTokenizerFast):
    turn = Turn("How many shapes are there?", "3", "count")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": turn.question},
        {"role": "assistant", "content": turn.answer},
    ]
    dialogue = samples.Dialogue((), (turn,), "Be brief.")
    assert tokens.apply_chat_template(messages, tokenize=False) == written(dialogue)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is written?"}]}]
    prompt = tokens.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|><image>What is written?<|end|><|assistant|>"


@pytest.mark.parametrize("task", demo.TASKS)
def test_task_questions_open_a_fresh_dialogue(task: str):
    asked = demo.task_questions("validation", task, 12)
    assert len(asked) == 12
    for sample, at in asked:
        assert sample.turns[at].task == task and sample.system is None
        assert len(sample.turns) == at + 1 == (2 if task == "follow_up" else 1)
        assert sample.turns[0].pictures == len(sample.pictures)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"no task 'smell'; the tasks are colour, shape"):
        demo.task_questions("validation", "smell", 1)


@pytest.mark.parametrize(
    ("answer", "expected", "task", "right"),
    [
        (" red ", "Red.", "colour", True),
        ("grey", "Gray.", "colour", True),
        ("The  red circle", "The red circle.", "size", True),
        ("Blue.", "Red.", "colour", False),
        ("7 3 1", "731", "read", True),
        ("cat", "CAT", "read", True),
        ("73", "731", "read", False),
        ("", "Red.", "colour", False),
    ],
)
def test_correct(answer: str, expected: str, task: str, right: bool):
    assert demo.correct(answer, expected, task) is right


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_exported_questions_name_their_pictures(tmp_path: Path):
    path = demo.export_task_set(tmp_path, "validation", 3)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(rows) == 3 * len(demo.TASKS)
    for row in rows:
        assert row["question"] and row["answer"] and bool(row["history"]) == (row["task"] == "follow_up")
        assert all(size_of(tmp_path / name) == (IMAGE_SIZE, IMAGE_SIZE) for name in row["pictures"])


def test_sample_pictures_are_small_and_asked_about(tmp_path: Path):
    asked = demo.draw_samples(tmp_path)
    files = {path.name: path for path in tmp_path.iterdir()}
    assert {name for question in asked for name in question.pictures} == set(files) == set(showcase.showcase())
    for path in files.values():
        assert path.stat().st_size < 15_000 and size_of(path) == (384, 384)
    for question in (q for q in asked if len(q.pictures) == 1 and q.task != "unknown"):
        scene = showcase.showcase()[question.pictures[0]]
        chains = [c for seed in range(20) for c in questions.about_one(Asker(random.Random(seed), probes()), scene)]
        assert question.answer in {turn.answer for chain in chains for turn in chain if turn.task == question.task}
