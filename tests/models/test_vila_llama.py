"""VilaLlamaForCausalLM: the seed's usage, every argument of forward, the owned cache, saving and loading."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models.signatures import bare
from models.tiny import PATCHES, TEXT, VOCABULARY, ids, llava_pair, pixels, text_pair
from same import assert_close, assert_same
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinychat.config import VilaConfig
from tinychat.errors import CapacityError, ModelError, UsageError
from tinychat.layers.kv_cache import KVCache
from tinychat.layers.linear import QuantLinear
from tinychat.models import vila_llama
from tinychat.models.vila_fusion import IMAGE_TOKEN_INDEX
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat_kernels.layout import QuantSpec

HERE = IMAGE_TOKEN_INDEX
PICTURE = torch.tensor([[5, 6, HERE, 7, 8, 9]])
WIDE = 5 + PATCHES  # positions that PICTURE takes


@pytest.fixture
def text() -> VilaLlamaForCausalLM:
    return text_pair("llama")[1]


@pytest.fixture
def eyes() -> VilaLlamaForCausalLM:
    return llava_pair()[1]


# The document


def test_signatures_are_the_documents() -> None:
    assert bare(VilaLlamaForCausalLM.__init__) == "(config)"
    assert bare(VilaLlamaForCausalLM.init_vlm) == "(config=None, *args, **kwargs)"
    assert bare(VilaLlamaForCausalLM.forward) == (
        "(input_ids=None, start_pos=None, attention_mask=None, position_ids=None, past_key_values=None, "
        "inputs_embeds=None, labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, "
        "images=None, return_dict=None, special_token=False, chunk_prefilling=False)"
    )


def test_the_usage_of_the_document_as_it_is_written() -> None:
    """No torch.no_grad() there, so there is none here."""
    _, reference = llava_pair()
    config, input_ids, image_tensor = reference.config, PICTURE, pixels(1)

    model = VilaLlamaForCausalLM(config)

    model.load_state_dict(reference.state_dict())
    # Forward with images and chunk prefilling
    output = model.forward(
        input_ids=input_ids,
        start_pos=0,
        images=image_tensor,
        chunk_prefilling=True,
    )
    whole, generated = PICTURE, []
    current_pos = WIDE
    for _ in range(4):
        assert isinstance(output, CausalLMOutputWithPast) and output.logits is not None
        with torch.no_grad():
            expected = reference(input_ids=whole, images=pixels(1)).logits
        assert_same(output.logits.detach(), expected[:, -1:])
        next_token = output.logits[:, -1].argmax(-1, keepdim=True)
        generated.append(int(next_token))
        whole = torch.cat([whole, next_token], 1)
        # After initial prefill, decode token by token
        output = model.forward(
            input_ids=next_token,
            start_pos=current_pos,
        )
        current_pos += 1
    assert len(generated) == 4


# Construction


def test_the_parts_are_made_once(eyes: VilaLlamaForCausalLM) -> None:
    parts = eyes.llm, eyes.vision_tower, eyes.mm_projector
    eyes.init_vlm(eyes.config)
    eyes.init_vlm()
    assert (eyes.llm, eyes.vision_tower, eyes.mm_projector) == parts
    with pytest.raises(UsageError, match=r"init_vlm got unknown arguments \[1, 'model_dtype'\]"):
        eyes.init_vlm(None, 1, model_dtype="x")


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, torch.float32),
        ({"model_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"model_dtype": "float16"}, torch.float16),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "bfloat16", "model_dtype": "torch.float16"}, torch.bfloat16),
    ],
)
def test_the_dtype_is_the_configs(fields: dict[str, Any], dtype: torch.dtype) -> None:
    raw = {**llava_pair()[1].config.to_dict(), "dtype": None, **fields}
    made = VilaLlamaForCausalLM(VilaConfig(**raw))
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}


def test_the_dtype_without_one() -> None:
    """Stated for CUDA without a CUDA device: float16 there, float32 elsewhere."""
    assert vila_llama._dtype_of(VilaConfig(), torch.device("cuda")) is torch.float16
    assert vila_llama._dtype_of(VilaConfig(), torch.device("cpu")) is torch.float32
    with pytest.raises(ModelError, match="model_dtype 'int8' is not a float type; use one of float16"):
        vila_llama._dtype_of(VilaConfig(model_dtype="torch.int8"), torch.device("cpu"))


def test_a_transformers_config_is_taken() -> None:
    made = VilaLlamaForCausalLM(LlamaConfig(**TEXT))
    assert made.config.layout == "text" and made.vision_tower is None


def test_it_can_be_built_without_memory() -> None:
    config = llava_pair()[1].config
    with torch.device("meta"):
        made = VilaLlamaForCausalLM(config)
    assert all(t.is_meta for t in made.state_dict().values()) and not list(made.buffers())


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


# Caches


@torch.no_grad()
def test_a_cache_that_is_passed(text: VilaLlamaForCausalLM) -> None:
    tokens, cache = ids(2, 12), text.make_cache(2, 20)
    whole = text(input_ids=tokens).logits
    first = text(input_ids=tokens[:, :7], past_key_values=cache)
    assert first.past_key_values is cache and cache.lengths == [7, 7]
    assert_same(first.logits, whole[:, :7])
    assert_same(text(input_ids=tokens[:, 7:], past_key_values=cache).logits, whole[:, 7:])
    # a start_pos goes back: what lies behind it is written anew
    assert_same(text(input_ids=tokens[:, 5:], past_key_values=cache, start_pos=5).logits, whole[:, 5:])
    assert cache.lengths == [12, 12]


@torch.no_grad()
def test_use_cache_makes_one(text: VilaLlamaForCausalLM) -> None:
    tokens = ids(1, 9)
    cache = text(input_ids=tokens[:, :8], use_cache=True).past_key_values
    found = text(input_ids=tokens[:, 8:], past_key_values=cache, use_cache=True).logits
    assert_same(found, text(input_ids=tokens).logits[:, 8:])


@torch.no_grad()
def test_the_owned_cache_begins_anew_at_0(text: VilaLlamaForCausalLM) -> None:
    tokens = ids(1, 9)
    whole = text(input_ids=tokens).logits
    text(input_ids=ids(1, 20, seed=4), start_pos=0)
    text(input_ids=tokens[:, :6], start_pos=0)
    assert_same(text(input_ids=tokens[:, 6:], start_pos=6).logits, whole[:, 6:])
    assert_same(text(input_ids=tokens[:, 4:], start_pos=4).logits, whole[:, 4:])  # back, and on again
    text(input_ids=ids(3, 4), start_pos=0)  # another number of rows
    assert_same(text(input_ids=tokens, start_pos=torch.tensor(0)).logits, whole)


@torch.no_grad()
def test_the_owned_cache_follows_the_models_dtype(text: VilaLlamaForCausalLM) -> None:
    text(input_ids=ids(1, 5), start_pos=0)
    text.bfloat16()
    text(input_ids=ids(1, 5), start_pos=0)
    assert text(input_ids=ids(1, 1), start_pos=5).past_key_values.layer(0).k.dtype == torch.bfloat16


def test_continuing_at_the_wrong_place(text: VilaLlamaForCausalLM) -> None:
    with pytest.raises(
        UsageError, match=r"there is no cache of 1 rows to continue from \[3\]; prefill with start_pos=0"
    ):
        text(input_ids=ids(1, 2), start_pos=3)
    text(input_ids=ids(1, 5), start_pos=0)
    with pytest.raises(UsageError, match=r"start_pos is \[7\], the cache is filled to \[5\]; continue at the filled"):
        text(input_ids=ids(1, 2), start_pos=7)
    with pytest.raises(UsageError, match=r"there is no cache of 2 rows to continue from \[5, 5\]"):
        text(input_ids=ids(2, 2), start_pos=5)
    with pytest.raises(UsageError, match="cannot be cut to -1"):
        text(input_ids=ids(1, 2), start_pos=-1)
    with pytest.raises(UsageError, match="3 start positions came for 1 rows"):
        text(input_ids=ids(1, 2), start_pos=torch.tensor([0, 1, 2]))
    with pytest.raises(UsageError, match=r"start_pos is \[9\], the cache is filled to \[4\]"):
        cache = text.make_cache(1)
        text(input_ids=ids(1, 4), past_key_values=cache)
        text(input_ids=ids(1, 4), past_key_values=cache, start_pos=9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunks", [True, False])
@torch.no_grad()
def test_a_padded_batch_then_each_row_at_its_own_place(eyes: VilaLlamaForCausalLM, side: str, chunks: bool) -> None:
    eyes.config.tokenizer_padding_side = side
    rows = [torch.tensor([5, HERE, 6, 7]), torch.tensor([8, 9]), torch.tensor([HERE, 4, HERE])]
    tokens, mask = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(4 - len(row), 4) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    out = eyes(input_ids=tokens, attention_mask=mask, images=pixels(3), start_pos=0, chunk_prefilling=chunks)
    lengths = torch.tensor([3 + PATCHES, 2, 1 + 2 * PATCHES])
    assert out.past_key_values.lengths == lengths.tolist()
    after = ids(3, 3, seed=7)
    pictures = [pixels(3)[:1], None, pixels(3)[1:]]
    alone = [
        eyes(input_ids=torch.cat([row, after[i]])[None], images=pictures[i]).logits[0] for i, row in enumerate(rows)
    ]
    if chunks:
        assert out.logits.shape == (3, 1, VOCABULARY)
        assert_same(out.logits[:, 0], torch.stack([one[-4] for one in alone]))
    steps = [eyes(input_ids=after[:, i : i + 1], start_pos=lengths + i).logits[:, 0] for i in range(3)]
    assert_same(torch.stack(steps, 1), torch.stack([one[-3:] for one in alone]))


@torch.no_grad()
def test_a_mask_of_past_and_new_tokens(text: VilaLlamaForCausalLM) -> None:
    """As generation loops pass it: one column more each step."""
    tokens, mask = ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    text(input_ids=tokens, attention_mask=mask, start_pos=0)
    wider = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    found = text(input_ids=ids(2, 1, seed=3), attention_mask=wider, start_pos=torch.tensor([8, 5])).logits
    alone = text(input_ids=torch.cat([tokens[1:, 3:], ids(2, 1, seed=3)[1:]], 1)).logits
    assert_same(found[1, -1], alone[0, -1])
    with pytest.raises(UsageError, match=r"attention_mask keeps \[9, 5\] past tokens a row, the cache holds \[9, 6\]"):
        again = torch.cat([wider, torch.ones(2, 1)], 1)
        again[1, -2] = 0
        text(input_ids=ids(2, 1), attention_mask=again, start_pos=torch.tensor([9, 6]))


@torch.no_grad()
def test_several_new_tokens_with_padding_after_a_cache(text: VilaLlamaForCausalLM) -> None:
    tokens = ids(2, 9)
    text(input_ids=tokens[:, :5], start_pos=0)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = text(input_ids=tokens[:, 5:], attention_mask=mask, start_pos=5)
    assert found.past_key_values.lengths == [9, 7]
    alone = text(input_ids=torch.cat([tokens[1:, :5], tokens[1:, 7:]], 1)).logits
    assert_same(found.logits[1, 2:], alone[0, 5:])


@torch.no_grad()
def test_overflow_raises_and_nothing_wraps(text: VilaLlamaForCausalLM) -> None:
    cache = text.make_cache(1, 10)
    text(input_ids=ids(1, 8), past_key_values=cache)
    before = cache.view(0, 8)[0].clone()
    for chunks in (True, False):
        with pytest.raises(CapacityError, match="11 tokens of context are needed, the cache holds 10"):
            text(input_ids=ids(1, 3), past_key_values=cache, chunk_prefilling=chunks)
    assert cache.lengths == [8] and torch.equal(cache.view(0, 8)[0], before)
    with pytest.raises(CapacityError, match="129 tokens of context are needed, the cache holds 128"):
        text(input_ids=ids(1, 129), start_pos=0)


@torch.no_grad()
def test_chunks_are_bounded() -> None:
    """No forward of the decoder sees more than 512 tokens, so that activations do not grow with the prompt."""
    _, ours = text_pair("llama", max_position_embeddings=1200)
    seen: list[int] = []
    ours.llm.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    found = ours(input_ids=ids(1, 1100), chunk_prefilling=True).logits
    assert seen == [512, 512, 76]
    assert_same(found, ours(input_ids=ids(1, 1100)).logits[:, -1:])


def test_a_cached_forward_keeps_no_graph(text: VilaLlamaForCausalLM) -> None:
    out = text(input_ids=ids(1, 4), start_pos=0, labels=ids(1, 4))
    assert not out.logits.requires_grad and not out.loss.requires_grad
    assert text(input_ids=ids(1, 4)).logits.requires_grad
    assert not text.prefill(text.embed(ids(4)), text.make_cache(1), 0).requires_grad


def test_a_cache_made_in_inference_mode_goes_on_outside(text: VilaLlamaForCausalLM) -> None:
    with torch.inference_mode():
        text(input_ids=ids(1, 4), start_pos=0)
    with torch.no_grad():
        assert_same(text(input_ids=ids(1, 5)[:, 4:], start_pos=4).logits, text(input_ids=ids(1, 5)).logits[:, 4:])


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


# The engine's entrance


@torch.no_grad()
def test_embeddings_with_slots_equal_the_wide_entrance(eyes: VilaLlamaForCausalLM) -> None:
    tokens = torch.cat([PICTURE[0, :2], torch.ones(PATCHES, dtype=torch.long), PICTURE[0, 3:]])
    embeds = eyes.embed(tokens, [(2, 2 + PATCHES)], list(eyes.encode_images(pixels(1))))
    expected = eyes(input_ids=PICTURE, images=pixels(1)).logits
    assert embeds.shape == (1, WIDE, 64)
    assert_same(eyes.prefill(embeds, eyes.make_cache(1), 0), expected[:, -1:])


# Copies and files


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
@torch.no_grad()
def test_copies_leave_the_owned_cache_out(eyes: VilaLlamaForCausalLM, copied: Any) -> None:
    eyes(input_ids=ids(1, 5), start_pos=0)
    assert not [name for name in eyes.state_dict() if "owned" in name or "cache" in name]
    other = copied(eyes)
    with pytest.raises(UsageError, match="there is no cache of 1 rows"):
        other(input_ids=ids(1, 1), start_pos=5)
    eyes(input_ids=ids(1, 1), start_pos=5)
    found = other(input_ids=PICTURE, images=pixels(1), start_pos=0).logits
    assert torch.equal(found, eyes(input_ids=PICTURE, images=pixels(1)).logits)


def quantized(model: VilaLlamaForCausalLM) -> VilaLlamaForCausalLM:
    """Its decoder's layers rounded to 4 bits, as the config then says."""
    for name, module in list(model.llm.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.llm.model.layers.set_submodule(name, QuantLinear.from_linear(module, QuantSpec(group_size=32)))
    fields = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    model.config.quantization_config = fields
    return model


MODELS = {
    "pictures": lambda: llava_pair()[1],
    "layer": lambda: llava_pair(vision_feature_layer=-1, vision_feature_select_strategy="full")[1],
    "text": lambda: text_pair("llama")[1],
    "tied": lambda: text_pair("llama", tie_word_embeddings=True)[1],
    "qwen2": lambda: text_pair("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)[1],
    "mistral": lambda: text_pair("mistral", sliding_window=6)[1],
    "bfloat16": lambda: llava_pair()[1].bfloat16(),
    "quantized": lambda: quantized(llava_pair()[1]),
    "quantized tied": lambda: quantized(text_pair("llama", tie_word_embeddings=True)[1]),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path: Path, name: str) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    again = VilaLlamaForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    assert not again.training and again.config.layout == "vila"
    assert (again.config.text, again.config.vision, again.config.projector) == (
        model.config.text,
        model.config.vision,
        model.config.projector,
    )
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) and tensor.dtype == after[key].dtype, key
    assert (again.llm.lm_head.weight is again.llm.model.embed_tokens.weight) == ("tied" in name)
    given: dict[str, Any] = {"input_ids": ids(1, 9)}
    if model.vision_tower is not None:
        given = {"input_ids": PICTURE, "images": pixels(1)}
    assert torch.equal(again(**given).logits, model(**given).logits)


def test_a_saved_folder_has_its_parts(tmp_path: Path, eyes: VilaLlamaForCausalLM) -> None:
    eyes.save_pretrained(tmp_path)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    parts = [f"{part}/{name}" for part in ("llm", "mm_projector", "vision_tower") for name in FILES]
    assert found == sorted(["config.json", *parts])


FILES = ("config.json", "model.safetensors")


# Vocabulary


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_vocabulary_that_grows_and_shrinks(tmp_path: Path, tied: bool) -> None:
    _, ours = text_pair("llama", tie_word_embeddings=tied)
    before = ours(input_ids=ids(1, 5)).logits
    mean = ours.get_input_embeddings().weight.mean(0)
    table = ours.resize_token_embeddings(103)
    assert table is ours.get_input_embeddings() and table.weight.shape == (103, 64)
    assert_close(table.weight[99:], mean.expand(4, -1), 1e-6)
    assert (ours.llm.lm_head.weight is table.weight) == tied == ours.config.text.tie_word_embeddings
    after = ours(input_ids=ids(1, 5)).logits
    assert after.shape[-1] == 103 and torch.equal(after[..., :99], before)
    ours.save_pretrained(tmp_path)
    assert torch.equal(VilaLlamaForCausalLM.from_pretrained(tmp_path)(input_ids=ids(1, 5)).logits, after)
    ours.resize_token_embeddings(98)
    assert torch.equal(ours(input_ids=ids(1, 5)).logits, before[..., :98])


def test_resizing_takes_what_it_is_given(text: VilaLlamaForCausalLM) -> None:
    assert text.resize_token_embeddings() is text.get_input_embeddings()
    assert len(text.resize_token_embeddings(100, pad_to_multiple_of=64).weight) == 128
    text.llm.lm_head.requires_grad_(False)
    text.resize_token_embeddings(130)
    assert not text.llm.lm_head.weight.requires_grad and text.get_input_embeddings().weight.requires_grad
    with pytest.raises(UsageError, match="new embeddings are the mean of the old ones"):
        text.resize_token_embeddings(140, mean_resizing=False)


def test_embeddings_can_be_replaced() -> None:
    _, ours = text_pair("llama", tie_word_embeddings=True)
    table = nn.Embedding(VOCABULARY, 64)
    ours.set_input_embeddings(table)
    assert ours.get_input_embeddings() is table and ours.get_output_embeddings().weight is table.weight
