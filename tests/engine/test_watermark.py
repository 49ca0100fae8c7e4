"""The watermark: transformers' own processor, bit for bit, and found by its detector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig
from transformers.generation import logits_process as hf

from tinychat.core import SamplingParams
from tinychat.engine.sampler import make_sampler
from tinychat.engine.watermark import BIAS, GREEN_SHARE, HASH_KEY, green_ids, mark

V = 61
CONFIG = WatermarkingConfig(
    greenlist_ratio=GREEN_SHARE, bias=BIAS, hashing_key=HASH_KEY, seeding_scheme="lefthash", context_width=1
)


@pytest.fixture(scope="module")
def theirs() -> dict[int, hf.WatermarkLogitsProcessor]:
    """A processor makes a table of a million numbers: one a vocabulary."""
    return {size: CONFIG.construct_processor(size, "cpu") for size in (2, 7, V, 1000)}


@given(size=st.sampled_from([2, 7, V, 1000]), previous=st.integers(0, 200_000), seed=st.integers(0, 9))
def test_scores_are_those_of_transformers(theirs, size, previous, seed):
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 5
    scores[:: 3 + seed] = -torch.inf
    before = scores.clone()
    assert torch.equal(mark(scores, previous), theirs[size](torch.tensor([[1, previous]]), scores[None])[0])
    assert torch.equal(scores, before)


def test_half_of_the_words_is_green_and_another_half_after_another_token():
    assert len(set(green_ids(3, V).tolist())) == 30
    assert set(green_ids(3, V).tolist()) != set(green_ids(4, V).tolist())


def test_it_comes_first_then_the_steps_of_generate(theirs):
    prompt, answer = [5, 9, 3], [7, 3]
    params = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.7, watermark=True)
    steps = (
        theirs[V],
        hf.RepetitionPenaltyLogitsProcessor(1.7),
        hf.TemperatureLogitsWarper(0.6),
        hf.TopKLogitsWarper(20),
        hf.TopPLogitsWarper(0.9),
    )
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 3
    logits[prompt + answer] = torch.tensor([8.0, 7.0, 6.0, 5.0, 6.0])
    for length in range(len(answer) + 1):
        ids, scores = torch.tensor([prompt + answer[:length]]), logits[None].clone()
        for step in steps:
            scores = step(ids, scores)
        assert torch.equal(make_sampler(params, prompt, "cpu").process(logits, answer[:length]), scores[0])


def test_nothing_is_marked_where_no_text_came_before():
    logits = torch.zeros(V)
    assert torch.equal(make_sampler(SamplingParams(watermark=True), [], "cpu").process(logits, []), logits)


@pytest.mark.parametrize(("watermark", "found"), [(True, True), (False, False)])
def test_transformers_detector_finds_it(watermark, found):
    """Drawn from nothing but chance, so that the watermark is all there is to be found."""
    sampler = make_sampler(SamplingParams(temperature=1.0, seed=2, watermark=watermark), [4], "cpu")
    answer = [4]
    while len(answer) < 80:
        answer.append(sampler(torch.zeros(V), answer[1:]).token)
    detector = WatermarkDetector(LlamaConfig(vocab_size=V, bos_token_id=0), "cpu", CONFIG)
    assert detector(torch.tensor([answer])).tolist() == [found]
