"""Our whole model against transformers' LlavaForConditionalGeneration in fp32, and the same tokens in any chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.tiny import IMAGE_ID, PATCHES, ids, llava_pair, pixels
from same import assert_close, assert_same
from torch import Tensor

from tinychat.models.vila_fusion import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinychat.models.vila_llama import VilaLlamaForCausalLM

HERE = IMAGE_TOKEN_INDEX


def prompt(*parts: int, seed: int = 0) -> Tensor:
    """Text of these lengths, HERE for a picture: prompt(3, HERE, 4) is `[8]` ids."""
    pieces = [torch.tensor([HERE]) if n == HERE else ids(n, seed=seed + i) for i, n in enumerate(parts)]
    return torch.cat(pieces)


def expanded(row: Tensor, features: int = PATCHES) -> Tensor:
    """As transformers takes it: the image token once a feature."""
    return torch.cat([torch.full((features,), IMAGE_ID) if t == HERE else t[None] for t in row])


def batch(rows: list[Tensor], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """ids and mask of rows, padded on one side."""
    length = max(map(len, rows))
    tokens, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


ROWS = [prompt(3, HERE, 4), prompt(2, HERE, 1, HERE, 2, seed=5), prompt(6, seed=9), prompt(HERE, 2, seed=11)]


@torch.no_grad()
def test_text_only() -> None:
    theirs, ours = llava_pair()
    assert_close(ours(input_ids=ids(2, 9)).logits, theirs(input_ids=ids(2, 9)).logits)


@pytest.mark.parametrize("row", ROWS[:2])
@pytest.mark.parametrize(
    ("changes", "features"),
    [
        ({}, 16),
        ({"vision_feature_layer": -1}, 16),
        ({"vision_feature_layer": 1}, 16),  # 0 is an error in transformers 5.23
        ({"vision_feature_layer": 2}, 16),
        ({"vision_feature_select_strategy": "full"}, 17),
        ({"projector_hidden_act": "relu", "multimodal_projector_bias": False}, 16),
    ],
)
@torch.no_grad()
def test_pictures_layers_and_strategies(row: Tensor, changes: dict[str, Any], features: int) -> None:
    theirs, ours = llava_pair(**changes)
    pictures = pixels(int((row == HERE).sum()))
    expected = theirs(input_ids=expanded(row, features)[None], pixel_values=pictures).logits
    assert_close(ours(input_ids=row[None], images=pictures).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_unequal_rows_padded_on_either_side(side: str) -> None:
    theirs, ours = llava_pair()
    ours.config.tokenizer_padding_side = side
    tokens, mask = batch(ROWS, side)
    wide, wide_mask = batch([expanded(row) for row in ROWS], side, pad=1)
    # transformers counts positions over padding too, unless it is told them; only differences matter to RoPE
    expected = theirs(input_ids=wide, attention_mask=wide_mask, pixel_values=pixels(4)).logits
    found = ours(input_ids=tokens, attention_mask=mask, images=pixels(4)).logits
    kept = wide_mask.bool()
    assert_close(found[kept], expected[kept])
    assert not found[~kept].any()


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    _, ours = llava_pair()
    tokens, mask = batch(ROWS, "right")
    together = ours(input_ids=tokens, attention_mask=mask, images=pixels(4)).logits
    pictures = iter(pixels(4).split([1, 2, 0, 1]))
    for row, found in zip(ROWS, together, strict=True):
        alone = ours(input_ids=row[None], images=next(pictures)).logits[0]
        assert_same(found[: len(alone)], alone)


def loss_pair(side: str) -> tuple[Any, VilaLlamaForCausalLM, Tensor, Tensor]:
    theirs, ours = llava_pair()
    ours.config.tokenizer_padding_side = side
    tokens, mask = batch(ROWS, side)
    labels = tokens.masked_fill(mask == 0, IGNORE_INDEX).masked_fill(tokens == HERE, IGNORE_INDEX)
    wide, wide_mask = batch([expanded(row) for row in ROWS], side, pad=1)
    wide_labels = wide.masked_fill((wide_mask == 0) | (wide == IMAGE_ID), IGNORE_INDEX)
    wide_labels[:, 1:][wide_mask[:, :-1] == 0] = IGNORE_INDEX  # a first token has nothing that could predict it
    expected = theirs(input_ids=wide, attention_mask=wide_mask, pixel_values=pixels(4), labels=wide_labels)
    found = ours(input_ids=tokens, attention_mask=mask, images=pixels(4), labels=labels)
    return theirs, ours, expected.loss, found.loss


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_every_gradient_equal_transformers(side: str) -> None:
    theirs, ours, expected, found = loss_pair(side)
    assert abs(float(found.detach()) - float(expected.detach())) < 1e-5
    expected.backward()
    found.backward()
    from tinychat.checkpoint import rename

    grads = {rename(name, "llava_hf"): p.grad for name, p in theirs.named_parameters()}
    reached = 0
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None), name
        if parameter.grad is not None:
            assert_close(parameter.grad, grads[name], 1e-4)
            reached += bool(parameter.grad.any())
    parts = {name.split(".")[0] for name, p in ours.named_parameters() if p.grad is not None and p.grad.any()}
    assert parts == {"llm", "vision_tower", "mm_projector"} and reached > 50


@pytest.mark.parametrize("row", ROWS[:2])
@torch.no_grad()
def test_one_shot_chunks_and_single_tokens_agree(row: Tensor) -> None:
    _, ours = llava_pair()
    pictures = pixels(int((row == HERE).sum()))
    whole = ours(input_ids=row[None], images=pictures).logits
    embeds = ours.prepare_inputs_labels_for_multimodal(row[None], None, None, None, None, pictures)[4]
    assert embeds is not None and embeds.shape[1] == whole.shape[1]
    for chunk in (1, 3, 16, 100):
        assert_same(ours.prefill(embeds, ours.make_cache(1), 0, chunk), whole[:, -1:])
    for sizes in (1, 7):
        pieces, at = [], 0
        for piece in embeds.split(sizes, dim=1):
            pieces.append(ours(inputs_embeds=piece, start_pos=at).logits)
            at += piece.shape[1]
        assert_same(torch.cat(pieces, 1), whole)


@torch.no_grad()
def test_turns_with_pictures_at_the_first_and_the_third() -> None:
    """Turn by turn into one cache, and undone and asked again, equals the whole conversation at once."""
    _, ours = llava_pair()
    turns = [ROWS[0], ids(5, seed=3), ROWS[1]]
    shots = [pixels(1, seed=1), None, pixels(2, seed=2)]
    everything = ours(input_ids=torch.cat(turns)[None], images=torch.cat([shots[0], shots[2]])).logits
    at = 0
    for turn, shot in zip(turns, shots, strict=True):
        before = at
        found = ours(input_ids=turn[None], start_pos=at, images=shot, chunk_prefilling=True).logits
        at += len(turn) + (PATCHES - 1) * int((turn == HERE).sum())
        assert_same(found, everything[:, at - 1 : at])
    ours(input_ids=ids(1, 4, seed=8), start_pos=at)
    again = ours(input_ids=turns[2][None], start_pos=before, images=shots[2], chunk_prefilling=True).logits
    assert_same(again, everything[:, -1:])
