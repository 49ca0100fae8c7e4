"""Log-probabilities of the model's own logits: likeliest tokens and prompts, against sorting and log_softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tinychat.core import SamplingParams, TopToken
from tinychat.engine.logprobs import PromptLogprobs, prompt_logprobs, top_tokens, with_texts
from tinychat.engine.sampler import make_sampler

V = 61
LEVELS = st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 3.0])


@given(st.lists(LEVELS, min_size=1, max_size=30), st.integers(0, 40))
def test_the_likeliest_come_in_order_equals_by_id_and_never_more_than_there_are(levels, count):
    scores = torch.tensor([*levels, 1.0])
    by_sorting = sorted(range(len(scores)), key=lambda token: (-float(scores[token]), token))[:count]
    top = top_tokens(scores, scores.log_softmax(-1), count)
    assert [token.id for token in top] == by_sorting
    assert [token.logprob for token in top] == pytest.approx(scores.log_softmax(-1)[by_sorting].tolist(), abs=1e-6)
    assert {token.text for token in top} <= {""}


def test_texts_are_given_to_the_likeliest():
    top = (TopToken(3, "", -0.1), TopToken(5, "", -2.0))
    assert with_texts(top, str) == (TopToken(3, "3", -0.1), TopToken(5, "5", -2.0))


@pytest.mark.parametrize("count", [0, 1, 3, V, V + 5])
def test_the_likeliest_are_those_of_the_model_whatever_is_drawn_from(count):
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 3
    params = SamplingParams(
        temperature=0.3, top_k=2, top_p=0.5, logit_bias={4: 100.0}, repetition_penalty=2.0, watermark=True,
        seed=1, top_n_tokens=count,
    )  # fmt: skip
    before = logits.clone()
    draw = make_sampler(params, [3, 7], "cpu")(logits, [8])
    expected = logits.log_softmax(-1).topk(min(count, V))
    assert [token.id for token in draw.top] == expected.indices.tolist()
    assert [token.logprob for token in draw.top] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert draw.token == 4
    assert draw.logprob == pytest.approx(float(logits.log_softmax(-1)[4]), abs=1e-5)
    assert draw.processed_logprob == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(logits, before)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 9))
def test_a_prompt_in_pieces_has_the_logprobs_of_the_whole(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    logits = torch.randn(total, V, generator=generator) * 4
    ids = torch.randint(V, (total,), generator=generator)
    expected = logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0].tolist()
    whole = prompt_logprobs(logits, ids.tolist())
    assert len(whole) == total and math.isnan(whole[0])
    assert whole[1:] == pytest.approx(expected, abs=1e-5)
    collected = PromptLogprobs()
    for piece, tokens in zip(logits.split(sizes), ids.split(sizes), strict=True):
        piece = piece.clone()
        collected.add(piece, tokens.tolist())
        piece.fill_(math.nan)  # the model may use its memory again
    assert collected.values[1:] == whole[1:] and math.isnan(collected.values[0])


def test_an_empty_piece_adds_nothing():
    collected = PromptLogprobs()
    collected.add(torch.zeros(0, V), [])
    collected.add(torch.zeros(1, V), [3])
    collected.add(torch.zeros(0, V), [])
    collected.add(torch.zeros(1, V), [3])
    assert collected.values[1:] == pytest.approx([-math.log(V)], abs=1e-5) and len(collected.values) == 2


def test_a_prompts_logprobs_are_transformers_loss():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(V, (1, 40))
    with torch.no_grad():
        output = model(ids, labels=ids)
    found = prompt_logprobs(output.logits[0], ids[0].tolist())
    assert -sum(found[1:]) / 39 == pytest.approx(float(output.loss), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits_are_summed_in_32(dtype):
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = list(range(20))
    assert prompt_logprobs(logits, ids)[1:] == prompt_logprobs(logits.float(), ids)[1:]
