"""A batch of rows with different parameters: each row as alone, and equal to transformers' processors row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from tinychat.core import SamplingParams
from tinychat.engine.draws import draw_rows
from tinychat.engine.sampler import Draw, Sampler, make_sampler
from tinychat.errors import ModelError, TinychatError, UsageError

V = 61
WATERMARK = hf.WatermarkLogitsProcessor(V, "cpu", 0.5, 2.0, 15485863, "lefthash", 1)
GREEDY, WARM = SamplingParams(), SamplingParams(temperature=0.7, seed=5)

ids = st.integers(0, V - 1)
every_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 0, 1, 3, 20, V, V + 7]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.4, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.8, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.4, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.6]),
    presence_penalty=st.sampled_from([0.0, 0.0, -0.4]),
    logit_bias=st.dictionaries(ids, st.sampled_from([-3.0, 2.0, float("-inf")]), max_size=3),
    watermark=st.booleans(),
    top_n_tokens=st.sampled_from([0, 0, 2, V + 1]),
    seed=st.integers(0, 2**64 - 1),
)
every_row = st.tuples(every_params, st.lists(ids, max_size=6), st.lists(ids, max_size=6))


def logits_of(seed: int, rows: int, width: int = V) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


def alone(sampler: Sampler, logits: torch.Tensor, generated: list[int]) -> Draw | tuple[type, str]:
    try:
        return sampler(logits, generated)
    except TinychatError as error:
        return type(error), str(error)


def told(drawn: Draw | TinychatError) -> Draw | tuple[type, str]:
    return (type(drawn), str(drawn)) if isinstance(drawn, TinychatError) else drawn


@given(st.lists(every_row, min_size=1, max_size=6), st.integers(0, 99), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=60)
def test_each_row_is_what_it_is_alone(rows, seed, dtype):
    together = [make_sampler(params, prompt, "cpu") for params, prompt, _ in rows]
    apart = [make_sampler(params, prompt, "cpu") for params, prompt, _ in rows]
    answers = [list(answer) for *_, answer in rows]
    for step in range(3):
        logits = logits_of(seed + step, len(rows)).to(getattr(torch, dtype))
        before = logits.clone()
        drawn = [told(draw) for draw in draw_rows(together, logits, answers)]
        assert drawn == [alone(*row) for row in zip(apart, logits, answers, strict=True)]
        assert torch.equal(logits, before)
        for answer, draw in zip(answers, drawn, strict=True):
            answer += [draw.token] if isinstance(draw, Draw) else []


def steps_of(params: SamplingParams) -> list[hf.LogitsProcessor]:
    """transformers' processors for these parameters, in the order of ours; it has no frequency or presence penalty."""
    bias = [[[token], value] for token, value in params.logit_bias.items()]
    first: list[tuple[bool, object]] = [
        (params.watermark, lambda: WATERMARK),
        (bool(bias), lambda: hf.SequenceBiasLogitsProcessor(bias)),
        (params.repetition_penalty != 1, lambda: hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)),
    ]
    warpers: list[tuple[bool, object]] = [
        (params.temperature != 1, lambda: hf.TemperatureLogitsWarper(params.temperature)),
        (params.top_k > 0, lambda: hf.TopKLogitsWarper(params.top_k)),
        (params.top_p < 1, lambda: hf.TopPLogitsWarper(params.top_p)),
        (params.min_p > 0, lambda: hf.MinPLogitsWarper(params.min_p)),
        (params.typical_p < 1, lambda: hf.TypicalLogitsWarper(params.typical_p)),
    ]
    return [make() for wanted, make in first + warpers * (params.temperature > 0) if wanted]  # type: ignore[operator]


@given(every_row, st.integers(0, 99))
@settings(max_examples=150)
def test_what_is_drawn_from_is_what_transformers_draws_from(row, seed):
    params, prompt, answer = row
    params = replace(params, frequency_penalty=0.0, presence_penalty=0.0)
    (logits,) = logits_of(seed, 1)
    scores, seen = logits[None].clone(), torch.tensor([prompt + answer], dtype=torch.long)
    for step in steps_of(params):
        if seen.numel() or step is not WATERMARK:
            scores = step(seen, scores)
    sampler = make_sampler(params, prompt, "cpu")
    assert torch.equal(sampler.process(logits, answer), scores[0])
    draw = sampler(logits, answer)
    assert scores[0, draw.token].isfinite()
    assert draw.processed_logprob == pytest.approx(float(scores[0].log_softmax(-1)[draw.token]), abs=1e-5)
    assert draw.logprob == pytest.approx(float(logits.log_softmax(-1)[draw.token]), abs=1e-5)
    assert params.temperature > 0 or draw.token == int(scores[0].argmax())


def answer_of(draws: list[Draw | TinychatError]) -> list[int]:
    assert all(isinstance(draw, Draw) for draw in draws)
    return [draw.token for draw in draws if isinstance(draw, Draw)]


@pytest.mark.parametrize("temperature", [0.7, 1e-30, 2.0])
def test_temperature_0_beside_a_row_that_samples(temperature):
    logits = logits_of(3, 3)
    samplers = [make_sampler(SamplingParams(temperature=t, seed=1), [], "cpu") for t in (0.0, temperature, 0.0)]
    tokens = answer_of(draw_rows(samplers, logits, [[], [], []]))
    assert [tokens[0], tokens[2]] == logits[[0, 2]].argmax(-1).tolist()


def test_temperature_0_with_warpers_is_greedy_and_draws_no_number():
    sampler = make_sampler(SamplingParams(temperature=0, top_k=3, top_p=0.1, typical_p=0.5, seed=3), [], "cpu")
    state = sampler._generator.get_state()
    assert sampler.greedy
    logits = logits_of(0, 1)
    assert answer_of(draw_rows([sampler], logits, [[]])) == [int(logits.argmax())]
    assert torch.equal(sampler._generator.get_state(), state)


@pytest.mark.parametrize(
    "odd",
    [{"top_k": V}, {"top_k": V + 9}, {"top_k": 1}, {"top_p": 1e-12}, {"typical_p": 0.5}, {"min_p": 1.0}, {}],
    ids=str,
)
def test_top_k_beyond_the_vocabulary_a_tiny_top_p_and_their_like_leave_the_other_rows_alone(odd):
    logits = logits_of(4, 3)
    samplers = [make_sampler(params, [], "cpu") for params in (WARM, replace(WARM, **odd), WARM)]
    tokens = answer_of(draw_rows(samplers, logits, [[], [], []]))
    plain = [make_sampler(WARM, [], "cpu") for _ in range(3)]
    expected = answer_of(draw_rows(plain, logits, [[], [], []]))
    assert (tokens[0], tokens[2]) == (expected[0], expected[2])
    kept = {"top_k": [1], "top_p": [1e-12], "min_p": [1.0]}
    if any(odd.get(name) in values for name, values in kept.items()):
        assert tokens[1] == int(logits[1].argmax())
    elif "typical_p" not in odd:
        assert tokens[1] == expected[1]


def test_top_k_1_with_ties_draws_any_of_them():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    sampler = make_sampler(SamplingParams(temperature=1.0, top_k=1, seed=0), [], "cpu")
    assert {answer_of(draw_rows([sampler], logits, [[]]))[0] for _ in range(50)} == {1, 2}


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_a_seed_draws_the_same_alone_in_a_batch_after_a_filter_and_after_a_concatenation(seed):
    steps = logits_of(9, 12)
    mine = SamplingParams(temperature=1.2, top_k=30, repetition_penalty=1.2, seed=seed)
    others = [WARM, GREEDY, replace(WARM, seed=None), replace(WARM, top_p=0.5)]

    def run(neighbours: list[list[SamplingParams]]) -> list[int]:
        row, answer = make_sampler(mine, [1], "cpu"), list[int]()
        batch = {0: row}
        for step, params in enumerate(neighbours):
            batch = {i: sampler for i, sampler in batch.items() if i <= len(params)}
            batch |= {i: make_sampler(p, [], "cpu") for i, p in enumerate(params, 1) if i not in batch}
            order = sorted(batch, key=lambda i: (i + step) % len(batch))
            drawn = answer_of(draw_rows([batch[i] for i in order], steps[[step] * len(order)], [answer] * len(order)))
            answer = [*answer, drawn[order.index(0)]]
        return answer

    solo = run([[]] * 12)
    assert run([others] * 12) == solo
    assert run([others] * 4 + [others[:1]] * 4 + [others[:3]] * 4) == solo
    assert len(set(solo)) > 3


def test_penalties_know_no_neighbour_and_no_padding():
    """Token 0 is a token like another; a longer neighbour does not change what is counted."""
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    samplers = [make_sampler(params, [4, 4], "cpu"), make_sampler(params, [1] * 50, "cpu")]
    scores = samplers[0].process(torch.ones(6), [2, 2])
    assert scores.tolist() == [1.0, 1.0, 0.5 - 1.25, 1.0, 0.5, 1.0]
    logits = torch.tensor([[2.0, 0, 0, 0, 0, 0]] * 2)
    assert answer_of(draw_rows(samplers, logits, [[2, 2], [3] * 40])) == [0, 0]


def test_a_row_that_cannot_be_drawn_stops_no_other():
    bans_all = SamplingParams(logit_bias=dict.fromkeys(range(V), float("-inf")))
    logits = logits_of(1, 5)
    logits[1, 3] = torch.nan
    logits[4] = -torch.inf
    samplers = [make_sampler(params, [], "cpu") for params in (WARM, GREEDY, bans_all, GREEDY, WARM)]
    first, nan, banned, greedy, nothing = draw_rows(samplers, logits, [[]] * 5)
    assert first == make_sampler(WARM, [], "cpu")(logits[0], [])
    assert greedy == make_sampler(GREEDY, [], "cpu")(logits[3], [])
    assert isinstance(nan, ModelError) and "60 of 61 are finite" in nan.message
    assert isinstance(banned, UsageError) and banned.message == "the sampling settings leave no token to draw"
    assert isinstance(nothing, ModelError) and "0 of 61 are finite" in nothing.message


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_greedy_rows_that_are_no_numbers_say_what_they_say_alone(bad):
    logits = torch.full((2, V), bad, dtype=torch.float16)
    logits[1] = 0
    (error, fine) = draw_rows([make_sampler(GREEDY, [], "cpu")] * 2, logits, [[], []])
    with pytest.raises(ModelError) as caught:
        make_sampler(GREEDY, [], "cpu")(logits[0], [])
    assert isinstance(error, ModelError) and error.message == caught.value.message
    assert isinstance(fine, Draw) and fine.token == 0


def test_rows_of_minus_infinity_but_for_one_token_draw_it():
    logits = torch.full((2, V), -torch.inf)
    logits[:, 7] = 1.0
    samplers = [make_sampler(params, [], "cpu") for params in (replace(WARM, top_k=5, typical_p=0.5), GREEDY)]
    for draw in draw_rows(samplers, logits, [[], []]):
        assert isinstance(draw, Draw) and (draw.token, draw.logprob, draw.processed_logprob) == (7, 0.0, 0.0)


def test_greedy_rows_are_taken_at_once(monkeypatch):
    def alone(*_: object) -> Draw:
        raise AssertionError("a greedy row was drawn by itself")

    logits = logits_of(2, 8)
    logits[5] = logits[5].round()  # with ties: the first of them
    monkeypatch.setattr(Sampler, "__call__", alone)
    samplers = [make_sampler(replace(GREEDY, top_k=3, top_n_tokens=2), [], "cpu") for _ in range(8)]
    assert answer_of(draw_rows(samplers, logits, [[]] * 8)) == [int(row.argmax()) for row in logits]


@pytest.mark.parametrize("width", [1, 2, 7, 97, 32000, 32003])
def test_a_greedy_rows_logprob_has_the_bits_of_the_row_alone(width):
    logits = logits_of(width, 8, width)
    drawn = draw_rows([make_sampler(GREEDY, [], "cpu")] * 8, logits, [[]] * 8)
    assert drawn == [make_sampler(GREEDY, [], "cpu")(row, []) for row in logits]


def test_no_rows_no_tokens():
    assert draw_rows([], torch.zeros(0, V), []) == []


@pytest.mark.parametrize("count", [-1, -(2**70)])
def test_a_negative_number_of_likeliest_tokens_is_refused(count):
    with pytest.raises(UsageError) as caught:
        SamplingParams(top_n_tokens=count)
    assert caught.value.message == f"top_n_tokens is {count}, it must be 0 (off) or more"
