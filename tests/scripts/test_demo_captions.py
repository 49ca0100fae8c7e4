"""Captions of generated scenes: true of their own scene, false where they have to be, in words that the model knows."""

from __future__ import annotations

import random

import pytest
import torch

from demo_captions import (
    HELD_OUT,
    caption,
    compose,
    facts,
    holds_out,
    plural,
    tell_all,
    tell_part,
    words,
)  # fmt: skip
from tinychat.eval.demo.samples import SPLITS, Split
from tinychat.eval.demo.scenes import ANCHORS, Background, Bar, Scene, Shape
from train_demo_clip import GROUP, LENGTH, batch_of, build_tokenizer, contrast, trial

WHITE = Background("plain", (255, 255, 255), (255, 255, 255))


def shape(kind: str, colour: str, x: float, y: float) -> Shape:
    return Shape(kind, colour, ANCHORS[colour][0], x, y, 10, 0)


SHAPES = Scene(WHITE, (shape("circle", "red", 20, 20), shape("circle", "red", 20, 76), shape("square", "blue", 76, 22)))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("telling", [tell_all, tell_part])
def test_a_caption_is_true_of_its_scene(split: Split, telling: object):
    for seed in range(300):
        rng = random.Random(f"{split}{seed}")
        scene = compose(rng, split)
        told = caption(rng, scene, telling)  # type: ignore[arg-type]
        assert told.needs <= facts(scene), told.text
        assert told.text == told.text.lower()


@pytest.mark.parametrize(
    ("needs", "true"),
    [
        ("red circle", True), ("=2 red circle", True), ("=1 red circle", False), ("blue circle", False),
        ("=3 shape", True), ("=2 circle", True), ("red circle left of blue square", True),
        ("blue square left of red circle", False), ("blue square right of red circle", True),
        ("red circle above red circle", True), ("blue square at the top right", True), ("nothing", False),
        ("chart", False),
    ],
)  # fmt: skip
def test_facts_of_shapes(needs: str, true: bool):
    assert (needs in facts(SHAPES)) == true


def test_facts_of_a_chart():
    bars = (Bar("red", (255, 0, 0), 10, 40, 20, 80), Bar("blue", (0, 0, 255), 30, 20, 40, 80))
    found = facts(Scene(WHITE, bars=bars))
    assert {"chart", "=2 bars", "tallest blue", "shortest red", "red bar"} <= found
    assert "tallest red" not in found


def test_the_whole_is_told_in_any_order():
    told = {caption(random.Random(seed), SHAPES, tell_all).text for seed in range(200)}
    assert {"two red circles and a blue square", "a blue square and two red circles"} <= told
    turned = Scene(WHITE, SHAPES.shapes[::-1])
    assert caption(random.Random(0), SHAPES, tell_all).needs <= facts(turned)
    assert not caption(random.Random(0), SHAPES, tell_all).needs <= facts(Scene(WHITE, SHAPES.shapes[:2]))


def test_plurals():
    assert (plural("cross"), plural("star")) == ("crosses", "stars")


def test_captions_are_whole_words_but_for_what_is_read():
    tokenizer = build_tokenizer()
    for word in words():
        assert len(tokenizer(f"a {word}")["input_ids"]) == 4
    assert tokenizer("Two RED Circles")["input_ids"] == tokenizer("two red circles")["input_ids"]
    assert tokenizer.decode(tokenizer("größe 🙂")["input_ids"], skip_special_tokens=True) == "größe 🙂"
    assert tokenizer.eos_token_id != 2, "that id has a meaning of its own in CLIP configs"


def test_held_out_combinations_are_never_shown_in_training():
    scenes, _ = batch_of(0, 200)
    assert len(scenes) == 200
    assert not any(map(holds_out, scenes))
    assert any(holds_out(compose(random.Random(seed), "train")) for seed in range(100))
    assert len(HELD_OUT) == 4


def test_a_trial_has_one_right_answer_each():
    for unseen in (False, True):
        made = trial("validation", 0, unseen)
        assert len(made.pictures) == len(made.whole) == GROUP
        for i, told in enumerate(made.whole):
            assert [told.needs <= known for known in made.known] == [i == j for j in range(GROUP)]
        tokens = build_tokenizer()([each.text for each in made.whole])["input_ids"]
        assert max(map(len, tokens)) <= LENGTH  # type: ignore[arg-type]


def test_what_is_true_by_chance_is_no_mistake():
    logits = torch.tensor([[5.0, 9.0], [0.0, 5.0]])
    alone = contrast(logits, torch.eye(2, dtype=torch.bool))
    forgiven = contrast(logits, torch.tensor([[True, True], [False, True]]))
    assert alone > 2
    assert forgiven < 0.01
