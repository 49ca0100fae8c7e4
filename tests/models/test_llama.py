"""Our decoder against transformers' LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM in fp32."""

from __future__ import annotations

import pytest
import torch
from models.tiny import TEXT, ids, text_pair
from same import assert_close, assert_same

ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
}


def scaled(name: str) -> dict[str, object]:
    """Config fields of a RoPE type whose original length is 32."""
    rope = {"rope_theta": 10000.0, **ROPES[name]}
    return {"rope_parameters": rope, "max_position_embeddings": 32 if name == "dynamic" else 128}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 8, "num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
        ("mistral", {"sliding_window": 7}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ],
)
def test_logits_equal_transformers(family: str, changes: dict[str, object]) -> None:
    theirs, ours = text_pair(family, **changes)
    tokens = ids(2, 24)
    with torch.no_grad():
        assert_close(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


@pytest.mark.parametrize("name", ROPES)
def test_rope_types_past_the_original_length(name: str) -> None:
    theirs, ours = text_pair("llama", **scaled(name))
    tokens = ids(2, 60)
    with torch.no_grad():
        assert_close(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


@pytest.mark.parametrize("name", ROPES)
def test_rope_types_with_the_same_chunks(name: str) -> None:
    """`dynamic` depends on the length seen so far, so the chunks must be transformers' own."""
    theirs, ours = text_pair("llama", **scaled(name))
    tokens, cache, past = ids(1, 60), ours.make_cache(1, 64), None
    with torch.no_grad():
        for piece in tokens.split([20, 30, 9, 1], dim=1):
            expected = theirs(input_ids=piece, past_key_values=past, use_cache=True)
            past = expected.past_key_values
            assert_close(ours(input_ids=piece, past_key_values=cache).logits, expected.logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_padded_rows_equal_transformers(family: str, side: str) -> None:
    theirs, ours = text_pair(family)
    tokens, mask = ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, length in enumerate((12, 7, 1)):
        mask[row, slice(0, 12 - length) if side == "left" else slice(length, 12)] = 0
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=mask).logits
        logits = ours(input_ids=tokens, attention_mask=mask).logits
    assert_close(logits[mask.bool()], expected[mask.bool()])
    assert not logits[~mask.bool()].any()


def test_states_and_attentions_equal_transformers() -> None:
    theirs, ours = text_pair("llama")
    theirs.set_attn_implementation("eager")
    tokens = ids(2, 9)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, output_hidden_states=True, output_attentions=True)
        got = ours(input_ids=tokens, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(getattr(got, name)) == len(getattr(expected, name))
        for mine, other in zip(getattr(got, name), getattr(expected, name), strict=True):
            assert_close(mine, other)


def test_given_positions_are_used() -> None:
    theirs, ours = text_pair("llama")
    tokens, positions = ids(1, 6), torch.tensor([[0, 1, 5, 6, 20, 21]])
    with torch.no_grad():
        got = ours(input_ids=tokens, position_ids=positions).logits
        assert_close(got, theirs(input_ids=tokens, position_ids=positions).logits)
        assert float((got - ours(input_ids=tokens).logits).abs().max()) > 1e-2


@pytest.mark.parametrize("window", [None, 6])
def test_chunks_one_shot_and_single_tokens_agree(window: int | None) -> None:
    _, ours = text_pair("mistral", sliding_window=window)
    tokens = ids(1, 40)
    with torch.no_grad():
        whole = ours(input_ids=tokens).logits[:, -1:]
        embeds = ours.embed(tokens[0])
        for chunk in (1, 7, 40):
            assert_same(ours.prefill(embeds, ours.make_cache(1), 0, chunk), whole)


def test_rows_of_unequal_length_decode_as_they_do_alone() -> None:
    _, ours = text_pair("llama")
    prompts = [ids(1, n, seed=n) for n in (5, 11, 3)]
    after = ids(3, 4, seed=9)
    with torch.no_grad():
        alone = [ours(input_ids=torch.cat([p, after[i : i + 1]], 1)).logits[0, -1] for i, p in enumerate(prompts)]
        cache = ours.make_cache(3)
        for i, prompt in enumerate(prompts):
            row = cache.select([i])
            ours.prefill(ours.embed(prompt[0]), row, 0)
            cache.lengths[i] = row.lengths[0]
        order = [2, 0, 1]
        picked = cache.select(order)
        for column in after[order].split(1, dim=1):
            logits = ours.decode(column, picked)
        assert_same(logits[:, 0], torch.stack([alone[i] for i in order]))
        assert picked.lengths == [7, 9, 15]


def test_several_tokens_verified_at_once_equal_decoding() -> None:
    _, ours = text_pair("llama")
    tokens, cache = ids(1, 14), ours.make_cache(1)
    with torch.no_grad():
        ours.prefill(ours.embed(tokens[0, :9]), cache, 0)
        assert_same(ours.verify(tokens[:, 9:], cache), ours(input_ids=tokens).logits[:, 9:])


def test_sizes_are_the_configs() -> None:
    _, ours = text_pair("llama")
    assert ours.make_cache(2).capacity == TEXT["max_position_embeddings"]
    assert ours.vision_tower is None and ours.get_vision_tower() is None
