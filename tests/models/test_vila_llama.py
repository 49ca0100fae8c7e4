"""VilaLlamaForCausalLM: documented usage, construction, caches, copies, vocabulary."""

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
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinychat.config import VilaConfig
from tinychat.errors import CapacityError, ModelError, UsageError
from tinychat.models import vila_llama
from tinychat.models.vila_fusion import IMAGE_TOKEN_INDEX
from tinychat.models.vila_llama import VilaLlamaForCausalLM

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
    assert not text(input_ids=ids(1, 4), start_pos=0).logits.requires_grad
    assert text(input_ids=ids(1, 4)).logits.requires_grad
    assert not text.prefill(text.embed(ids(4)), text.make_cache(1), 0).requires_grad


def test_a_cache_made_in_inference_mode_goes_on_outside(text: VilaLlamaForCausalLM) -> None:
    with torch.inference_mode():
        text(input_ids=ids(1, 4), start_pos=0)
    with torch.no_grad():
        assert_same(text(input_ids=ids(1, 5)[:, 4:], start_pos=4).logits, text(input_ids=ids(1, 5)).logits[:, 4:])


# The engine's entrance


@torch.no_grad()
def test_embeddings_with_slots_equal_the_wide_entrance(eyes: VilaLlamaForCausalLM) -> None:
    tokens = torch.cat([PICTURE[0, :2], torch.ones(PATCHES, dtype=torch.long), PICTURE[0, 3:]])
    embeds = eyes.embed(tokens, [(2, 2 + PATCHES)], list(eyes.encode_images(pixels(1))))
    expected = eyes(input_ids=PICTURE, images=pixels(1)).logits
    assert embeds.shape == (1, WIDE, 64)
    assert_same(eyes.prefill(embeds, eyes.make_cache(1), 0), expected[:, -1:])


# Copies


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
    assert after.shape[-1] == 103
    assert_same(after[..., :99], before)
    ours.save_pretrained(tmp_path)
    assert_same(VilaLlamaForCausalLM.from_pretrained(tmp_path)(input_ids=ids(1, 5)).logits, after)
    ours.resize_token_embeddings(98)
    assert_same(ours(input_ids=ids(1, 5)).logits, before[..., :98])


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
