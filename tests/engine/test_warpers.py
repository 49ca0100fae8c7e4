"""Penalties and warpers: transformers' own, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from tinychat.engine import warpers as ours

V = 61

WARPERS = [
    *[(ours.scale, hf.TemperatureLogitsWarper, value) for value in (0.1, 0.7, 1.0, 3.0)],
    *[(ours.keep_top_k, hf.TopKLogitsWarper, value) for value in (1, 5, V, V + 100)],
    *[(ours.keep_min_p, hf.MinPLogitsWarper, value) for value in (0.0, 0.05, 0.5, 1.0)],
    *[(ours.keep_typical, hf.TypicalLogitsWarper, value) for value in (1e-6, 0.3, 0.9, 0.999)],
]


def rows(seed: int, count: int = 4) -> torch.Tensor:
    """[count, V], some peaked and some flat; the last with ties and tokens that are already out."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, V, generator=generator) * torch.tensor([[0.1], [1.0], [4.0], [2.0]])[:count]
    scores[-1] = scores[-1].round()
    scores[-1, ::7] = -math.inf
    return scores


@pytest.mark.parametrize(("warp", "theirs", "value"), WARPERS, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("seed", range(3))
def test_warper_is_transformers_own(warp, theirs, value, seed):
    scores = rows(seed)
    before = scores.clone()
    expected = theirs(value)(None, scores.clone())
    assert torch.equal(warp(scores, value), expected)
    for row, expected_row in zip(scores, expected, strict=True):
        assert torch.equal(warp(row, value), expected_row)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("p", [1e-20, 1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("seed", range(3))
def test_top_p_is_transformers_own_but_for_the_choice_among_ties(p, seed):
    scores = rows(seed)
    expected, actual = hf.TopPLogitsWarper(p)(None, scores), ours.keep_top_p(scores, p)
    assert torch.equal(actual[:-1], expected[:-1])
    assert torch.equal(actual[-1].sort().values, expected[-1].sort().values)
    assert torch.equal(ours.keep_top_p(scores[0], p), expected[0])


@given(st.floats(0.01, 0.99), st.floats(0.1, 4), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_top_p_keeps_the_fewest_tokens_that_suffice(p, spread, seed):
    scores = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * spread
    probs, kept = scores.double().softmax(-1), ours.keep_top_p(scores, p).isfinite()
    assert probs[kept].sum() >= p - 1e-5
    assert probs[kept].sum() - probs[kept].min() <= p + 1e-5
    assert kept.all() or probs[~kept].max() <= probs[kept].min()


@given(st.lists(st.integers(0, V + 5), max_size=30), st.sampled_from([0.5, 1.3, 2.0]), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_repetition_penalty_is_transformers_own(ids, penalty, seed):
    scores = rows(seed)[1]
    seen = torch.tensor(ids, dtype=torch.long)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(seen[None], scores[None].clone())[0]
    assert torch.equal(ours.penalize_repetition(scores, seen, penalty), expected)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_smallest_top_p_keeps_one_of_equals(size):
    assert ours.keep_top_p(torch.zeros(size), 1e-20).isfinite().sum() == 1


def test_top_k_keeps_ties():
    kept = ours.keep_top_k(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2)
    assert kept.isfinite().tolist() == [False, True, True, True, False]
