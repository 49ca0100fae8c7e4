"""The sampler: the steps of transformers' generate, a private stream, and errors in sentences."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tinychat.core import SamplingParams
from tinychat.engine.sampler import Sampler, make_sampler
from tinychat.errors import ModelError, UsageError

V = 61


def rows(seed: int, count: int = 4) -> torch.Tensor:
    """[count, V], some peaked and some flat; the last with ties and tokens that are already out."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, V, generator=generator) * torch.tensor([[0.1], [1.0], [4.0], [2.0]])[:count]
    scores[-1] = scores[-1].round()
    scores[-1, ::7] = -math.inf
    return scores


def test_frequency_and_presence_count_generated_tokens_only():
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    scores = make_sampler(params, [2, 2, 0], "cpu").process(torch.zeros(4), [1, 1, 3])
    assert scores.tolist() == [0.0, -1.25, 0.0, -0.75]


def test_repetition_counts_prompt_and_generated_once():
    scores = make_sampler(SamplingParams(repetition_penalty=2.0), [2, 2], "cpu").process(torch.ones(4), [2, 3, 3])
    assert scores.tolist() == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8},
        {"temperature": 0.9, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8, "repetition_penalty": 1.4},
        {"temperature": 2.0, "repetition_penalty": 1.4, "bias": {3: 4.0, 7: -3.0}, "top_k": 12, "typical_p": 0.7},
    ],
    ids="+".join,
)
def test_all_steps_in_the_order_of_generate(asked):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 20
    bias = asked.get("bias", {})
    chosen = {name: value for name, value in asked.items() if name != "bias"}
    prompt = [5, 9, 3, 5]
    theirs = {"top_k": 0, **chosen, "sequence_bias": [[[k], v] for k, v in bias.items()] or None}
    output = model.generate(
        torch.tensor([prompt]),
        generation_config=GenerationConfig(
            **theirs, do_sample=True, max_new_tokens=6, eos_token_id=None, pad_token_id=0
        ),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    sampler = make_sampler(SamplingParams(**chosen, logit_bias=bias), prompt, "cpu")
    answer = output.sequences[0, len(prompt) :].tolist()
    for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        processed = sampler.process(logits[0].float(), answer[:step])
        assert torch.equal(processed, scores[0])


def test_greedy_takes_the_highest_and_no_random_number():
    logits = rows(0)[2]
    params = SamplingParams(top_k=3, top_p=0.5)
    sampler = make_sampler(params, [], "cpu")
    state, own = torch.get_rng_state(), sampler._generator.get_state()
    draw = sampler(logits, [])
    token, logprob = draw.token, draw.logprob
    assert token == int(logits.argmax())
    assert logprob == draw.processed_logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sampler._generator.get_state(), own)
    assert sampler.seed is None


def test_a_seed_that_nothing_was_drawn_with_is_not_told():
    assert make_sampler(SamplingParams(temperature=0, seed=7), [], "cpu").seed is None
    assert make_sampler(SamplingParams(temperature=0.5, seed=7), [], "cpu").seed == 7


def test_greedy_heeds_bias_and_penalties():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert make_sampler(SamplingParams(logit_bias={0: 5.0}), [], "cpu")(logits, []).token == 0
    assert make_sampler(SamplingParams(repetition_penalty=2.0), [1], "cpu")(logits, []).token == 2
    assert make_sampler(SamplingParams(presence_penalty=2.0), [1], "cpu")(logits, []).token == 1
    assert make_sampler(SamplingParams(presence_penalty=2.0), [], "cpu")(logits, [1]).token == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logprob_is_that_of_the_raw_logits(dtype):
    logits = rows(1)[1].to(dtype)
    before = logits.clone()
    sampler = make_sampler(SamplingParams(temperature=0.3, top_k=2, logit_bias={4: 100.0}, seed=1), [], "cpu")
    draw = sampler(logits, [])
    assert draw.token == 4
    assert draw.logprob == pytest.approx(float(logits.float().log_softmax(-1)[4]), abs=1e-5)
    assert torch.equal(logits, before)


def draw(sampler: Sampler, logits: torch.Tensor, count: int) -> list[int]:
    return [sampler(logits, []).token for _ in range(count)]


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw(make_sampler(SamplingParams(temperature=1.0, seed=3), [], "cpu"), probs.log(), 4000)
    counts = torch.bincount(torch.tensor(drawn), minlength=6) / 4000
    assert torch.allclose(counts, probs, atol=0.03)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_the_ends_of_the_distribution_are_tokens_that_can_be_drawn(monkeypatch, number, token):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(number, dtype=torch.float64))
    logits = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log()
    assert make_sampler(SamplingParams(temperature=1.0, seed=0), [], "cpu")(logits, []).token == token


@pytest.mark.parametrize("seed", [0, 17, 2**64 - 1])
def test_same_seed_same_tokens_whatever_the_neighbours_draw(seed):
    params, logits = SamplingParams(temperature=1.0, seed=seed), rows(0)[0]
    alone = draw(make_sampler(params, [], "cpu"), logits, 20)
    row, neighbour = make_sampler(params, [], "cpu"), make_sampler(SamplingParams(temperature=1.0), [], "cpu")
    together = []
    for _ in range(20):
        torch.rand(3)
        together += draw(row, logits, 1)
        draw(neighbour, logits, 2)
    assert together == alone
    assert draw(make_sampler(SamplingParams(temperature=1.0, seed=seed // 2 + 1), [], "cpu"), logits, 20) != alone


def test_a_seed_that_was_not_given_is_told_and_repeats_the_answer():
    logits = rows(0)[0]
    first = make_sampler(SamplingParams(temperature=1.0), [], "cpu")
    assert first.seed is not None
    again = make_sampler(SamplingParams(temperature=1.0, seed=first.seed), [], "cpu")
    assert draw(again, logits, 20) == draw(first, logits, 20)
    assert make_sampler(SamplingParams(temperature=1.0), [], "cpu").seed != first.seed


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.tensor([9.0, 1e4, -3e4, 9999.9])
    assert draw(make_sampler(SamplingParams(temperature=temperature, seed=0), [], "cpu"), logits, 5) == [1] * 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers(temperature, bad):
    logits = torch.zeros(8, dtype=torch.float16)
    logits[3] = bad
    with pytest.raises(ModelError) as caught:
        make_sampler(SamplingParams(temperature=temperature), [], "cpu")(logits, [])
    assert caught.value.message == "the model's logits are not numbers (7 of 8 are finite, dtype float16)"
    assert "--dtype float32 or --dtype bfloat16" in caught.value.remedy


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({V: 1.0}, f"logit_bias names token {V}, the vocabulary ends at {V - 1}"),
        ({-1: 1.0}, "logit_bias names token -1, the vocabulary begins at 0"),
        ({3: math.nan}, "logit_bias of token 3 is nan"),
        ({3: math.inf}, "logit_bias of token 3 is inf"),
        (dict.fromkeys(range(V), -math.inf), "the sampling settings leave no token to draw"),
    ],
)
def test_a_bias_that_cannot_work(bias, message):
    with pytest.raises(UsageError) as caught:
        make_sampler(SamplingParams(logit_bias=bias), [], "cpu")(torch.zeros(V), [])
    assert caught.value.message == message


def test_a_bias_of_minus_infinity_bans_a_token():
    sampler = make_sampler(SamplingParams(temperature=1.0, logit_bias={1: -math.inf}, seed=0), [], "cpu")
    assert 1 not in draw(sampler, torch.tensor([0.0, 9.0, 0.0]), 50)


def test_a_draw_leaves_torchs_other_threads_asleep() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []
    try:
        sampler = make_sampler(SamplingParams(temperature=0.7, seed=1), (), "cpu")
        sampler._warpers = (lambda scores: seen.append(torch.get_num_threads()) or scores,)
        sampler(torch.randn(100), ())
        with pytest.raises(ModelError):
            sampler(torch.full((100,), math.nan), ())
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
