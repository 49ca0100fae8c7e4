"""Every argument of forward works or raises: embeddings, masks, positions, labels, outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.tiny import PATCHES, VOCABULARY, ids, llava_pair, pixels, text_pair
from same import assert_close, assert_same
from torch import Tensor

from tinychat.errors import UsageError
from tinychat.layers.kv_cache import KVCache
from tinychat.models.vila_fusion import IMAGE_TOKEN_INDEX
from tinychat.models.vila_llama import VilaLlamaForCausalLM

HERE = IMAGE_TOKEN_INDEX
PICTURE = torch.tensor([[5, 6, HERE, 7, 8, 9]])


@pytest.fixture
def text() -> VilaLlamaForCausalLM:
    return text_pair("llama")[1]


@pytest.fixture
def eyes() -> VilaLlamaForCausalLM:
    return llava_pair()[1]


# Stateless forward


@torch.no_grad()
def test_embeddings_in_place_of_ids(text: VilaLlamaForCausalLM) -> None:
    embeds = text.get_input_embeddings()(ids(2, 7))
    assert torch.equal(text(inputs_embeds=embeds).logits, text(input_ids=ids(2, 7)).logits)


@torch.no_grad()
def test_what_comes_back(text: VilaLlamaForCausalLM) -> None:
    plain = text(input_ids=ids(1, 5))
    assert (plain.loss, plain.past_key_values, plain.hidden_states, plain.attentions) == (None,) * 4
    assert plain.logits.dtype == torch.float32
    assert [type(value) for value in text(input_ids=ids(1, 5), return_dict=False)] == [Tensor]
    full = text(input_ids=ids(1, 5), labels=ids(1, 5), return_dict=False, output_hidden_states=True)
    assert full[0].dim() == 0 and full[1].shape == (1, 5, VOCABULARY) and len(full[2]) == 3
    assert text(input_ids=ids(1, 5), use_cache=False).past_key_values is None
    assert isinstance(text(input_ids=ids(1, 5), use_cache=True).past_key_values, KVCache)
    assert text.bfloat16()(input_ids=ids(1, 5)).logits.dtype == torch.float32


@torch.no_grad()
def test_states_and_attentions_with_pictures_and_padding(eyes: VilaLlamaForCausalLM) -> None:
    tokens = torch.cat([PICTURE, torch.tensor([[3, HERE, 4, 0, 0, 0]])])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    both = eyes(
        input_ids=tokens, attention_mask=mask, images=pixels(2), output_hidden_states=True, output_attentions=True
    )
    alone = eyes(input_ids=tokens[1:, :3], images=pixels(2)[1:], output_hidden_states=True, output_attentions=True)
    n = 2 + PATCHES
    for mine, other in zip(both.hidden_states, alone.hidden_states, strict=True):
        assert_close(mine[1:, :n], other)
        assert not mine[1, n:].any()
    for mine, other in zip(both.attentions, alone.attentions, strict=True):
        assert_close(mine[1:, :, :n, :n], other)
        assert not mine[1, :, n:].any()


@pytest.mark.parametrize("given", [True, False])
@torch.no_grad()
def test_positions_of_padded_rows(given: bool) -> None:
    """dynamic RoPE looks at the length seen: padding must not lengthen it."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    _, ours = text_pair("llama", rope_parameters=rope, max_position_embeddings=32)
    tokens, mask = ids(2, 60), torch.ones(2, 60)
    mask[1, 40:] = 0
    positions = torch.where(mask > 0, torch.arange(60.0), 0).long() if given else None
    found = ours(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    assert_same(found[1, :40], ours(input_ids=tokens[1:, :40]).logits[0])


@torch.no_grad()
def test_one_row_of_positions_serves_all(text: VilaLlamaForCausalLM) -> None:
    positions = torch.tensor([[2, 3, 9]])
    found = text(input_ids=ids(2, 3), position_ids=positions).logits
    assert torch.equal(found, text(input_ids=ids(2, 3), position_ids=positions.expand(2, -1)).logits)


# Losses


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_text_loss_and_gradients_equal_transformers(family: str) -> None:
    theirs, ours = text_pair(family)
    labels = ids(2, 9).clone()
    labels[0, :4] = -100
    expected, found = theirs(ids(2, 9), labels=labels).loss, ours(input_ids=ids(2, 9), labels=labels).loss
    assert abs(float(expected.detach()) - float(found.detach())) < 1e-5
    expected.backward()
    found.backward()
    for name, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(f"llm.{name}").grad, parameter.grad, 1e-4)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_loss_does_not_depend_on_padding(text: VilaLlamaForCausalLM) -> None:
    """Even where the labels at padding were left in."""
    tokens = ids(1, 6)
    alone = text(input_ids=tokens, labels=tokens).loss
    for side in ("left", "right"):
        pad, ones, zeros = torch.full((1, 3), 7), torch.ones(1, 6), torch.zeros(1, 3)
        wide = torch.cat([pad, tokens] if side == "left" else [tokens, pad], 1)
        mask = torch.cat([zeros, ones] if side == "left" else [ones, zeros], 1)
        assert_close(text(input_ids=wide, attention_mask=mask, labels=wide).loss, alone, 1e-6)


def test_what_is_not_tuned_stays_in_eval_mode(eyes: VilaLlamaForCausalLM) -> None:
    def modes() -> tuple[bool, ...]:
        assert eyes.vision_tower and eyes.mm_projector
        return eyes.llm.training, eyes.vision_tower.training, eyes.mm_projector.training

    eyes(input_ids=ids(1, 2))
    assert modes() == (False, False, False)
    eyes.train()
    eyes(input_ids=ids(1, 2))
    assert modes() == (True, False, False)
    eyes.train()
    eyes.config.tune_mm_projector = eyes.config.tune_vision_tower = True
    eyes(input_ids=ids(1, 2))
    assert modes() == (True, True, True)


# What cannot be


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "forward cannot work with input_ids or inputs_embeds like this; give one of both"),
        ({"input_ids": ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 64)}, "input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(1, 2, 64), "images": pixels(1)}, "inputs_embeds with images"),
        ({"input_ids": ids(1, 2), "use_cache": False, "start_pos": 0}, "use_cache=False with start_pos or a cache"),
        ({"input_ids": ids(1, 2), "labels": ids(1, 2), "chunk_prefilling": True}, "labels with chunk_prefilling"),
        ({"input_ids": ids(1, 2), "output_attentions": True, "chunk_prefilling": True}, "states or attentions with"),
        ({"input_ids": ids(1, 2), "position_ids": ids(1, 2), "chunk_prefilling": True}, "position_ids with chunk"),
        ({"input_ids": PICTURE, "images": pixels(1), "position_ids": ids(1, 6)}, "position_ids with images"),
        (
            {"input_ids": ids(1, 2), "special_token": True},
            "special_token=True, but input_ids hold no image placeholder",
        ),
        ({"input_ids": PICTURE}, "the ids hold 1 image placeholders, 0 images came"),
        ({"input_ids": PICTURE, "images": pixels(2)}, "the ids hold 1 image placeholders, 2 images came"),
        ({"input_ids": ids(1, 2), "images": pixels(1)}, "the ids hold 0 image placeholders, 1 images came"),
        (
            {"input_ids": ids(2, 3), "attention_mask": torch.ones(2, 2)},
            r"attention_mask has shape \[2, 2\], the tokens",
        ),
        ({"input_ids": ids(2, 3), "attention_mask": torch.ones(2, 5)}, r"keeps \[2, 2\] past tokens a row, the cache"),
        ({"input_ids": ids(2, 3), "attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \[1, 3\]"),
        ({"input_ids": ids(2, 3), "position_ids": ids(2, 4)}, r"position_ids have shape \[2, 4\], the tokens \[2, 3\]"),
        ({"input_ids": ids(1, 3), "labels": ids(1, 2)}, r"labels have shape \[1, 2\], logits \[1, 3, 99\]"),
        ({"input_ids": ids(1, 0)}, r"input_ids have shape \[1, 0\]; give at least one token"),
        ({"input_ids": ids(1, 3), "past_key_values": [torch.zeros(1)]}, "past_key_values is not a KVCache of 1 rows"),
        (
            {"input_ids": ids(2, 2), "attention_mask": torch.tensor([[1, 1], [0, 0]]), "chunk_prefilling": True},
            "a row has no tokens to prefill",
        ),
    ],
)
def test_arguments_that_contradict_each_other(eyes: VilaLlamaForCausalLM, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        eyes(**given)


def test_a_cache_of_another_number_of_rows(text: VilaLlamaForCausalLM) -> None:
    with pytest.raises(UsageError, match="past_key_values is not a KVCache of 2 rows; take one from model.make_cache"):
        text(input_ids=ids(2, 2), past_key_values=text.make_cache(1))


@torch.no_grad()
def test_a_placeholder_that_is_demanded_and_there(eyes: VilaLlamaForCausalLM) -> None:
    found = eyes(input_ids=PICTURE, images=pixels(1), special_token=True).logits
    assert torch.equal(found, eyes(input_ids=PICTURE, images=pixels(1)).logits)


def test_padded_attentions_after_a_cache(text: VilaLlamaForCausalLM) -> None:
    text(input_ids=ids(2, 3), start_pos=0)
    with pytest.raises(UsageError, match="attentions of padded rows need a start at 0"):
        mask = torch.tensor([[1, 1], [1, 0]])
        text(input_ids=ids(2, 2), attention_mask=mask, start_pos=3, output_attentions=True)


@pytest.mark.parametrize("cached", [{"start_pos": 0}, {"use_cache": True}])
def test_labels_with_a_cache_would_train_nothing(cached: dict[str, object]) -> None:
    _, ours = text_pair("llama")
    tokens = ids(1, 6)
    with pytest.raises(UsageError, match="labels with a cache, which holds no gradients"):
        ours(input_ids=tokens, labels=tokens, **cached)
    with torch.no_grad():
        assert float(ours(input_ids=tokens, labels=tokens, **cached).loss) > 0
