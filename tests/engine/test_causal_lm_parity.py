"""Batches of any model, in any company, answer as transformers' own generate answers each prompt alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny import ours_of, shake
from same import assert_close, assert_same
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from make_tiny_model import tokenizer as make_tokenizer
from tinychat.core import Failed, Finished, Request, SamplingParams, StoppingParams, Text
from tinychat.engine.causal_lm import CausalLM, CausalLMBatch
from tinychat.engine.foreign_cache import ForeignCache
from tinychat.engine.scheduler import Scheduler
from tinychat.errors import UsageError

TOKENIZER = make_tokenizer(image=False)
VOCABULARY = len(TOKENIZER)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, n_positions=128)),
}
OURS = ("llama", "qwen2")
PROMPTS = ("the quick brown fox", "a", "one two three four five six", "hm?", "12 + 30 =")
ANSWER = 6


@cache
def theirs(family: str) -> Any:
    torch.manual_seed(7)
    model = MODELS[family]().eval()
    shake(model)
    model.generation_config.eos_token_id = None
    return model


@cache
def engine(name: str) -> CausalLM:
    family, _, ours = name.partition(" ")
    model = theirs(family)
    return CausalLM.from_model(ours_of(model) if ours else model, TOKENIZER, context=128)


@cache
def solo(family: str, prompt: str, count: int = ANSWER) -> tuple[int, ...]:
    """transformers' own answer to one prompt."""
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    mask = torch.ones_like(ids)
    out = theirs(family).generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return tuple(out[0, ids.shape[1] :].tolist())


EVERY = [*MODELS, *(f"{family} ours" for family in OURS)]


def request(i: int, count: int = ANSWER, **sampling: Any) -> Request:
    return Request(
        str(i),
        parts=(Text(PROMPTS[i]),),
        sampling=SamplingParams(temperature=0.0, **sampling),
        stopping=StoppingParams(count, ignore_eos=True),
    )


def open_batch(lm: CausalLM, *requests: Request) -> CausalLMBatch:
    return CausalLMBatch.from_pb(requests, TOKENIZER, device=lm.device)


def finish(lm: CausalLM, batch: CausalLMBatch | None) -> dict[str, tuple[int, ...]]:
    """All answers, once every row has ended."""
    answers = {row.id: row for row in batch.rows} if batch else {}
    while batch is not None:
        batch.check()
        _, batch = lm.generate_token(batch)
    return {name: tuple(row.generated) for name, row in answers.items()}


def step(lm: CausalLM, batch: CausalLMBatch, count: int = 1) -> CausalLMBatch:
    for _ in range(count):
        _, following = lm.generate_token(batch)
        assert following is not None
        following.check()
        batch = following
    return batch


def wanted(name: str, *which: int, count: int = ANSWER) -> dict[str, tuple[int, ...]]:
    return {str(i): solo(name.partition(" ")[0], PROMPTS[i], count) for i in which}


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_answers_as_generate_does_alone(name: str) -> None:
    lm = engine(name)
    batch = open_batch(lm, *(request(i) for i in range(len(PROMPTS))))
    assert finish(lm, batch) == wanted(name, *range(len(PROMPTS)))


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_gives_the_tokens_of_generates_padded_batch(name: str) -> None:
    family = name.partition(" ")[0]
    prompts = [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]
    longest = max(map(len, prompts))
    ids = torch.tensor([[TOKENIZER.pad_token_id] * (longest - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    out = theirs(family).generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=ANSWER, pad_token_id=0)
    batch = open_batch(engine(name), *(request(i) for i in range(len(PROMPTS))))
    assert torch.equal(batch.input_ids, ids) and torch.equal(batch.attention_mask[:, :longest], mask)
    answers = finish(engine(name), batch)
    assert [list(answers[str(i)]) for i in range(len(PROMPTS))] == out[:, longest:].tolist()


@pytest.mark.parametrize("name", EVERY)
def test_a_row_joins_late_and_the_longest_leaves(name: str) -> None:
    lm = engine(name)
    batch = step(lm, open_batch(lm, request(1), request(3)), 4)
    late = step(lm, open_batch(lm, request(2)))
    batch = step(lm, CausalLMBatch.concatenate([batch, late]), 2)
    width = batch.attention_mask.shape[1]
    kept = batch.filter(["3", "1"])
    kept.check()
    assert kept.max_input_length < batch.max_input_length and kept.attention_mask.shape[1] < width
    assert kept.past_key_values is not None and max(kept.past_key_values.lengths) == kept.max_input_length - 1
    assert finish(lm, kept) == wanted(name, 3, 1)
    assert finish(lm, batch.filter(["2"])) == wanted(name, 2)


@pytest.mark.parametrize("name", ["llama", "llama ours", "bloom"])
def test_three_batches_of_different_lengths_join_unchanged(name: str) -> None:
    lm = engine(name)
    batches = [
        step(lm, open_batch(lm, request(0, 6)), 3),
        step(lm, open_batch(lm, request(1, 9), request(2, 4)), 2),
        step(lm, open_batch(lm, request(3, 7))),
    ]
    before = [
        (dict(batch.requests_idx_mapping), list(batch.past_key_values.lengths), batch.attention_mask.shape)
        for batch in batches
        if batch.past_key_values is not None
    ]
    joined = CausalLMBatch.concatenate(batches)
    joined.check()
    assert [
        (dict(batch.requests_idx_mapping), list(batch.past_key_values.lengths), batch.attention_mask.shape)
        for batch in batches
        if batch.past_key_values is not None
    ] == before
    counts = {0: 6, 1: 9, 2: 4, 3: 7}
    family = name.partition(" ")[0]
    assert finish(lm, joined) == {str(i): solo(family, PROMPTS[i], count) for i, count in counts.items()}


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=25)
@given(data=st.data())
def test_any_order_of_steps_gives_the_solo_answers(name: str, data: st.DataObject) -> None:
    """Rows are admitted, stepped, split and joined at random; each answers as it does alone."""
    lm = engine(name)
    waiting = list(data.draw(st.permutations(range(len(PROMPTS)))))
    batches, answers = list[CausalLMBatch](), dict[str, tuple[int, ...]]()
    while waiting or batches:
        actions = (["admit"] if waiting else []) + (["step", "split", "join"] if batches else [])
        action = data.draw(st.sampled_from(actions))
        if action == "admit":
            first = request(waiting.pop())
            batches.append(step(lm, open_batch(lm, first)))
        elif action == "join":
            batches = [CausalLMBatch.concatenate(data.draw(st.permutations(batches)))]
        elif action == "split":
            batch = batches.pop(data.draw(st.integers(0, len(batches) - 1)))
            names = data.draw(st.permutations([row.id for row in batch.rows]))
            cut = data.draw(st.integers(1, len(names)))
            batches += [batch.filter(part) for part in (names[:cut], names[cut:]) if part]
        else:
            at = data.draw(st.integers(0, len(batches) - 1))
            batch = batches.pop(at)
            _, going = lm.generate_token(batch)
            answers |= {row.id: tuple(row.generated) for row in batch.rows if row.ended}
            if going is not None:
                alive = [row.id for row in going.rows if not row.ended]
                batches.insert(at, going.filter(alive))
        for batch in batches:
            batch.check()
    assert answers == wanted(name, *range(len(PROMPTS)))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("room", [None, 60])
def test_the_scheduler_gives_the_solo_answers(name: str, room: int | None) -> None:
    """Prompts are read in pieces between the tokens of others; where memory is short, rows wait and are read anew."""
    scheduler = Scheduler(engine(name), rows=3, chunk=8, between=3, kv_tokens=room)
    for turn in range(2):
        for i in range(len(PROMPTS)):
            scheduler.submit(replace(request(i), id=f"{turn} {i}"))
    answers = dict[str, tuple[int, ...]]()
    while scheduler.busy:
        for event in scheduler.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                answers[event.request_id] = event.token_ids
    once = wanted(name, *range(len(PROMPTS)))
    assert answers == {f"{turn} {i}": answer for turn in range(2) for i, answer in once.items()}


@pytest.mark.parametrize("name", EVERY)
def test_prompts_have_the_log_probabilities_of_the_model_alone(name: str) -> None:
    """Exactly one a token, the first is nan, whatever the padding."""
    lm = engine(name)
    batch = open_batch(lm, *(request(i, prompt_logprobs=True) for i in range(3)))
    generations, _ = lm.generate_token(batch)
    for i, generation in enumerate(generations):
        ids = torch.tensor(TOKENIZER(PROMPTS[i])["input_ids"])
        assert generation.prefill_tokens is not None
        told = torch.tensor(generation.prefill_tokens.logprobs)
        assert generation.prefill_tokens.ids == tuple(ids.tolist())
        assert told[0].isnan() and len(told) == len(ids)
        with torch.no_grad():
            logprobs = theirs(name.partition(" ")[0])(ids[None]).logits[0].log_softmax(-1)
        if len(ids) > 1:
            assert_close(told[1:], logprobs[:-1].gather(1, ids[1:, None])[:, 0])


@pytest.mark.parametrize("name", EVERY)
def test_forward_gives_transformers_logits(name: str) -> None:
    """Padding on the left, then a newest token a row; logits at the padding are 0."""
    lm, model = engine(name), theirs(name.partition(" ")[0])
    batch = open_batch(lm, *(request(i) for i in range(4)))
    longest, lengths = batch.max_input_length, batch.input_lengths
    logits, past = lm.forward(batch.input_ids, batch.attention_mask[:, :longest], batch.position_ids)
    assert past.lengths == lengths and logits.shape == (4, longest, VOCABULARY)
    newest = torch.tensor([[3], [1], [4], [1]])
    following, past = lm.forward(newest, torch.ones(4, longest + 1), torch.tensor(lengths)[:, None], past)
    assert past.lengths == [length + 1 for length in lengths]
    for i, length in enumerate(lengths):
        ids = torch.cat((batch.input_ids[i, longest - length :], newest[i]))[None]
        with torch.no_grad():
            alone = model(ids).logits[0]
        assert not logits[i, : longest - length].any()
        assert_same(logits[i, longest - length :], alone[:-1])
        assert_same(following[i], alone[-1:])


def test_forward_goes_on_with_rows_of_different_counts() -> None:
    lm, model = engine("llama"), theirs("llama")
    _, past = lm.forward(torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]]), None)
    logits, past = lm.forward(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [1, 1]]), None, past)
    assert past.lengths == [4, 4] and not logits[0, 0].any()
    with torch.no_grad():
        assert_same(logits[0, 1:], model(torch.tensor([[5, 6, 7, 1]])).logits[0, -1:])
        assert_same(logits[1], model(torch.tensor([[8, 9, 2, 3]])).logits[0, -2:])


def test_forward_refuses_what_does_not_fit() -> None:
    lm = engine("llama")
    ids = torch.tensor([[5, 6]])
    with pytest.raises(UsageError, match="a row is padding alone"):
        lm.forward(ids, torch.tensor([[0, 0]]), None)
    with pytest.raises(UsageError, match=r"the last positions are \[5\], the cache goes on to \[1\]"):
        lm.forward(ids, torch.ones(1, 2), torch.tensor([[4, 5]]))
    with pytest.raises(UsageError, match="adapter data is given"):
        lm.forward(ids, torch.ones(1, 2), None, adapter_data={})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_in_a_batch_as_alone(dtype: torch.dtype) -> None:
    """Logits of a row in a padded batch, and alone: equal up to the rounding of the dtype."""
    torch.manual_seed(7)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    lm = CausalLM.from_model(model.to(dtype), TOKENIZER)
    together, past = lm.forward(torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1], [1] * 4]), None)
    following, _ = lm.forward(torch.tensor([[7], [8]]), torch.ones(2, 5), None, past)
    alone, past = lm.forward(torch.tensor([[5, 6]]), torch.ones(1, 2), None)
    after, _ = lm.forward(torch.tensor([[7]]), torch.ones(1, 3), None, past)
    assert isinstance(past, ForeignCache) and past.layers()[0][0].dtype == dtype and together.dtype == torch.float32
    assert_close(together[:1, 2:], alone, 0.02)
    assert_close(following[:1], after, 0.02)


def test_the_cache_of_a_batch_has_the_seeds_shape() -> None:
    """A list over layers of keys and values `[B, H, M - 1, D]`, padded on the left."""
    lm = engine("llama")
    batch = step(lm, open_batch(lm, request(0), request(1)), 2)
    past = batch.past_key_values
    assert isinstance(past, ForeignCache)
    layers = past.layers()
    assert len(layers) == 2 and layers[0][0].shape == (2, 2, batch.max_input_length - 1, 16)
    assert not layers[0][0][1, :, : batch.max_input_length - batch.input_lengths[1]].any()
