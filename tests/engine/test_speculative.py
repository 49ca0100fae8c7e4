"""Speculation: prompt lookup against trying everything, and answers that are those of plain decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from make_tiny_model import make_tiny_model
from tinychat.core import SamplingParams
from tinychat.engine.sampler import Draw, make_sampler
from tinychat.engine.speculative import accept, propose
from tinychat.load import load
from tinychat.models.vila_llama import VilaLlamaForCausalLM

V = 61


def by_trying(ids: list[int], count: int, longest: int) -> list[int]:
    """What followed the last earlier occurrence of the longest suffix, over and over."""
    for size in range(min(longest, len(ids)), 0, -1):
        ends = [end for end in range(size, len(ids)) if ids[end - size : end] == ids[-size:]]
        if ends:
            return (ids[ends[-1] :] * count)[:count]
    return []


@given(st.lists(st.integers(0, 3), max_size=25), st.integers(0, 6), st.integers(1, 4))
@example([7, 1, 2, 7, 5, 6, 7], 2, 3)
def test_proposals_are_those_of_trying_everything(ids, count, longest):
    assert propose(ids, count, longest) == by_trying(ids, count, longest)


def test_the_last_occurrence_counts_and_the_longest_before_it():
    assert propose([7, 1, 2, 7, 5, 6, 7], 2) == [5, 6]
    assert propose([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2) == [9, 2]
    assert propose([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2, longest=2) == [8, 1]


def test_a_repetition_goes_on():
    assert propose([5, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert propose([4, 4], 3) == [4, 4, 4]


@pytest.mark.parametrize("ids", [[], [3], [1, 2, 3]])
def test_nothing_is_proposed_where_nothing_occurred_before(ids):
    assert propose(ids, 4) == []


def peaks(*tokens: int) -> Tensor:
    """Logits whose likeliest tokens are these."""
    logits = torch.zeros(len(tokens), V)
    logits[range(len(tokens)), tokens] = 9.0
    return logits


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_as_many_are_accepted_as_were_right_and_one_more_with_the_likeliest_of_each_place(right):
    drawn, proposed = [11, 12, 13, 14], [11, 12, 13]
    proposed[right:] = [0] * (3 - right)
    logits = peaks(*drawn)
    logits[range(4), [21, 22, 23, 24]] = 5.0
    draws = accept(make_sampler(SamplingParams(top_n_tokens=2), [], "cpu"), logits, proposed, [])
    assert [draw.token for draw in draws] == drawn[: right + 1]
    for place, draw in enumerate(draws):
        assert [token.id for token in draw.top] == [11 + place, 21 + place]
        assert draw.logprob == draw.top[0].logprob == pytest.approx(float(logits[place].log_softmax(-1).max()))


def test_nothing_proposed_is_a_plain_draw():
    sampler = make_sampler(SamplingParams(), [], "cpu")
    assert accept(sampler, peaks(3), [], [1]) == [sampler(peaks(3)[0], [1])]


def test_penalties_see_the_tokens_accepted_so_far():
    sampler = make_sampler(SamplingParams(presence_penalty=2.0), [], "cpu")
    logits = torch.zeros(3, V)
    logits[:, 5], logits[:, 6], logits[:, 7] = 3.0, 2.0, 1.5
    assert [draw.token for draw in accept(sampler, logits, [5, 6], [])] == [5, 6, 7]
    assert [draw.token for draw in accept(sampler, logits, [5, 6], [5])] == [6]


every_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.4, 1.0]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    watermark=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)


@given(every_params, st.integers(0, 4), st.integers(0, 9), st.data())
def test_an_answer_is_the_same_by_any_guesses(params, count, seed, data):
    """A model whose logits depend on the newest two tokens; guesses are right, wrong or none."""
    table = torch.randn(7, 7, 7, generator=torch.Generator().manual_seed(seed)) * 2

    def after(ids: list[int]) -> Tensor:
        return table[ids[-2], ids[-1]]

    plain, answer = make_sampler(params, [0, 0], "cpu"), list[int]()
    alone: list[Draw] = []
    while len(answer) < 12:
        alone.append(plain(after([0, 0, *answer]), answer))
        answer.append(alone[-1].token)
    guessing, found = make_sampler(params, [0, 0], "cpu"), list[Draw]()
    while len(found) < 12:
        said = [draw.token for draw in found]
        wrong = st.lists(st.integers(0, 6), min_size=count, max_size=count)
        guess = data.draw(st.just((answer[len(said) :] + [0] * count)[:count]) | wrong)
        ids = [0, 0, *said, *guess]
        logits = torch.stack([after(ids[: 2 + len(said) + i]) for i in range(count + 1)])
        found += accept(guessing, logits, guess, said)
    assert found[:12] == alone


def numbers_taken(sampler_state: Tensor, seed: int) -> int:
    generator = torch.Generator().manual_seed(seed)
    for taken in range(50):
        if torch.equal(generator.get_state(), sampler_state):
            return taken
        torch.rand((), dtype=torch.float64, generator=generator)
    raise AssertionError("more numbers were taken than tokens could be")


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_one_random_number_is_taken_for_each_token_that_comes(right):
    sampler = make_sampler(SamplingParams(temperature=0.1, seed=8), [], "cpu")
    proposed = ([11, 12, 13][:right] + [0] * 3)[:3]
    assert len(accept(sampler, peaks(11, 12, 13, 14), proposed, [])) == right + 1
    assert numbers_taken(sampler._generator.get_state(), 8) == right + 1


class Transformers:
    """Reads everything again each time: no cache that could be wrong."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model, self.ids = model, list[int]()

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> Tensor:
        self.ids += ids
        return self.model(torch.tensor([self.ids])).logits[0]

    def forget(self, count: int) -> None:
        del self.ids[len(self.ids) - count :]


class Ours:
    """The prompt through prefill, the rest through verify, over one cache."""

    def __init__(self, model: VilaLlamaForCausalLM) -> None:
        self.model, self.cache = model, model.make_cache(1, 256)

    def __call__(self, ids: list[int]) -> Tensor:
        if self.cache.lengths == [0]:
            return self.model.prefill(self.model.embed(torch.tensor(ids), [], []), self.cache, 0)[0]
        return self.model.verify(torch.tensor([ids]), self.cache)[0]

    def forget(self, count: int) -> None:
        self.cache.truncate([self.cache.lengths[0] - count])


def speak(logits_after: Transformers | Ours, params: SamplingParams, prompt: list[int], length: int):
    """(tokens, forwards) of an answer by prompt lookup; logits_after(ids) reads them after all that was accepted."""
    sampler, answer, forwards, pending = make_sampler(params, prompt, "cpu"), list[int](), 0, list(prompt)
    while len(answer) < length:
        guess = propose([*prompt, *answer], 4) if answer else []
        logits = logits_after(pending + guess)[-len(guess) - 1 :]
        draws = accept(sampler, logits, guess, answer)
        answer += [draw.token for draw in draws]
        pending = [draws[-1].token]
        forwards += 1
        logits_after.forget(len(guess) + 1 - len(draws))
    return answer[:length], forwards


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 20
    return model


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> VilaLlamaForCausalLM:
    return load(make_tiny_model(tmp_path_factory.mktemp("model"), layout="text", seed=3), device="cpu")[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_greedy_answer_is_that_of_transformers_generate_in_fewer_forwards(theirs, seed):
    prompt = torch.randint(V, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, 9:].tolist()
    answer, forwards = speak(Transformers(theirs), SamplingParams(), prompt, 60)
    assert answer == expected
    assert forwards < 60


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.6, top_p=0.9, repetition_penalty=1.1, seed=4)], ids=str
)
def test_an_answer_of_ours_through_verify_is_that_of_plain_decoding(ours, params):
    prompt = [5, 9, 3, 5, 9]
    plain, sampler, answer = Ours(ours), make_sampler(params, prompt, "cpu"), list[int]()
    logits = plain(prompt)[-1]
    while len(answer) < 40:
        answer.append(sampler(logits, answer).token)
        logits = ours.decode(torch.tensor([[answer[-1]]]), plain.cache)[0, -1]
    found, forwards = speak(Ours(ours), params, prompt, 40)
    assert found == answer
    assert params.temperature > 0 or forwards < 40
