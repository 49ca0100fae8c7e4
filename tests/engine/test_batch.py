"""Batches of rows: what they say of themselves, who is in them; no answer depends on the other rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from make_tiny_model import make_tiny_model
from tinychat.core import Request, SamplingParams, StoppingParams, Text
from tinychat.engine.batch import CausalLMBatch
from tinychat.engine.causal_lm import CausalLM
from tinychat.errors import CapacityError, UsageError
from tinychat.load import load

CONTEXT = 96
WORDS = ("one", "a good deal longer than the others are", "x", "counting 1 2 3 4 5 6 7", "last of all")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), layout="vila", seed=3)
    return CausalLM.from_model(*load(folder, device="cpu"), context=CONTEXT)


def request(name: str, text: str = "some words", tokens: int = 6, **sampling: Any) -> Request:
    stopping = StoppingParams(tokens, ignore_eos=True)
    return Request(name, parts=(Text(text),), sampling=SamplingParams(**sampling), stopping=stopping)


def batch_of(lm: CausalLM, *requests: Request, number: int = 0) -> CausalLMBatch:
    return CausalLMBatch.from_requests(number, [(one, one) for one in requests], lm.reader, CONTEXT, lm.device)


def stepped(lm: CausalLM, batch: CausalLMBatch, said: dict[Any, list[int]]) -> CausalLMBatch | None:
    """One checked step; its tokens go to `said` by request."""
    batch.check()
    made, following = lm.generate_token(batch)
    for generation in made:
        said.setdefault(generation.request_id, []).extend(generation.next_tokens.ids)
    if following is not None:
        following.check()
    return following


def answers(lm: CausalLM, batch: CausalLMBatch | None) -> dict[Any, list[int]]:
    said = dict[Any, list[int]]()
    while batch is not None:
        batch = stepped(lm, batch, said)
    return said


def draws(index: int) -> dict[str, Any]:
    """Rows of all kinds: greedy, drawn, penalized."""
    kinds = (
        {},
        {"temperature": 0.9, "seed": 11},
        {"temperature": 1.3, "seed": 5, "top_p": 0.8, "repetition_penalty": 1.2},
    )
    return kinds[index % len(kinds)]


@pytest.fixture(scope="module")
def alone(lm: CausalLM) -> dict[str, list[int]]:
    return {one.id: answers(lm, batch_of(lm, one))[one.id] for one in asked()}


def asked() -> list[Request]:
    return [request(f"r{i}", text, 4 + 3 * (i % 3), **draws(i)) for i, text in enumerate(WORDS)]


# Rows of different lengths, joining late, leaving early


def test_rows_of_a_batch_say_what_they_say_alone(lm: CausalLM, alone: dict[str, list[int]]) -> None:
    assert [len(tokens) for tokens in alone.values()] == [4, 7, 10, 4, 7]
    assert answers(lm, batch_of(lm, *asked())) == alone


Move = tuple[str, int]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["admit", "step", "filter", "cancel", "concatenate", "reorder"]), st.integers(0, 4)),
        max_size=24,
    )
)
def test_any_company_gives_the_same_answers(lm: CausalLM, alone: dict[str, list[int]], moves: list[Move]) -> None:
    """Random admissions, steps, filters, cancels and concatenations against each request alone."""
    waiting, batches, said = asked(), list[CausalLMBatch](), dict[Any, list[int]]()
    gone = set[str]()
    for move, n in [*moves, *[("admit", 0)] * 5, *[("step", 0)] * 60]:
        if move == "admit" and waiting:
            batch = stepped(lm, batch_of(lm, waiting.pop(n % len(waiting)), number=n), said)
            batches += [] if batch is None else [batch]
        elif not batches:
            continue
        elif move == "concatenate":
            batches = [CausalLMBatch.concatenate(batches)]
        else:
            batch = batches.pop(n % len(batches))
            ids = [row.id for row in batch.rows]
            if move in ("filter", "cancel"):
                kept = [one for one in ids if not batch.rows[batch.requests_idx_mapping[one]].ended]
                if move == "cancel" and kept:
                    gone.add(kept.pop(n % len(kept)))
                batch = batch.filter(kept) if kept else None
            elif move == "reorder":
                batch = batch.filter(ids[::-1])
            else:
                batch = stepped(lm, batch, said)
            batches += [] if batch is None else [batch]
    assert not batches and not waiting
    for name, tokens in alone.items():
        assert said[name] == (tokens if name not in gone else tokens[: len(said[name])])


# Filter and concatenate


def test_filter_takes_the_order_that_is_given(lm: CausalLM) -> None:
    batch, said = batch_of(lm, *asked()), dict[Any, list[int]]()
    batch = stepped(lm, batch, said)
    assert batch is not None
    turned = batch.filter(["r4", "r3", "r2", "r1", "r0"])
    assert [row.id for row in turned.rows] == ["r4", "r3", "r2", "r1", "r0"]
    assert turned.requests_idx_mapping == {"r4": 0, "r3": 1, "r2": 2, "r1": 3, "r0": 4}
    assert batch.requests_idx_mapping == {"r0": 0, "r1": 1, "r2": 2, "r3": 3, "r4": 4}
    assert turned.input_ids.tolist() == batch.input_ids.flip(0).tolist()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "a batch without rows is asked for"),
        (["r9"], "the batch has no request r9; give some of r0, r1"),
        (["r0", "r0"], "a request is named twice"),
    ],
)
def test_filter_refuses_what_it_cannot_do(lm: CausalLM, ids: list[str], words: str) -> None:
    batch = batch_of(lm, *asked()[:2])
    with pytest.raises(UsageError, match=words):
        batch.filter(ids)
    assert [row.id for row in batch.rows] == ["r0", "r1"]


def test_filter_before_the_prefill_carries_everything(lm: CausalLM) -> None:
    alone = answers(lm, batch_of(lm, asked()[2]))
    assert answers(lm, batch_of(lm, *asked()).filter(["r2"])) == alone


def test_concatenate_takes_prefilled_batches_of_different_ids(lm: CausalLM) -> None:
    said = dict[Any, list[int]]()
    ready, fresh = stepped(lm, batch_of(lm, asked()[0]), said), batch_of(lm, asked()[1])
    assert ready is not None
    with pytest.raises(UsageError, match="only prefilled batches are concatenated"):
        CausalLMBatch.concatenate([ready, fresh])
    with pytest.raises(UsageError, match="two rows have the same request id"):
        CausalLMBatch.concatenate([ready, ready])
    with pytest.raises(UsageError, match="there are no batches"):
        CausalLMBatch.concatenate([])


def test_concatenate_leaves_its_batches_as_they_are(lm: CausalLM) -> None:
    said = dict[Any, list[int]]()
    batches = [
        stepped(lm, batch_of(lm, *some, number=n), said)
        for n, some in enumerate((asked()[:2], asked()[2:3], asked()[3:]))
    ]
    assert all(batch is not None for batch in batches)
    three = [batch for batch in batches if batch is not None]
    before = [(dict(batch.requests_idx_mapping), list(batch.past_key_values.lengths)) for batch in three]  # type: ignore[union-attr]
    whole = CausalLMBatch.concatenate(three)
    whole.check()
    assert whole.requests_idx_mapping == {f"r{i}": i for i in range(5)} and whole.batch_id == 0
    stepped(lm, whole, said)
    assert before == [(dict(batch.requests_idx_mapping), list(batch.past_key_values.lengths)) for batch in three]  # type: ignore[union-attr]


# What a model that pads sees


def test_ids_mask_and_positions_are_padded_on_the_left(lm: CausalLM) -> None:
    batch = batch_of(lm, request("a", "one two three", 5), request("b", "x", 9))
    lengths = batch.input_lengths
    longest, room = max(lengths), 9
    assert batch.padding_right_offset == room and batch.max_input_length == longest
    assert batch.attention_mask.tolist() == [[0] * (longest - n) + [1] * n + [0] * room for n in lengths]
    assert batch.position_ids.tolist() == [[1] * (longest - n) + list(range(n)) for n in lengths]
    assert batch.max_tokens == 2 * longest + 5 + 9
    assert [ids.shape for ids in batch.all_input_ids] == [(n, 1) for n in lengths]
    following = stepped(lm, batch, {})
    assert following is not None
    assert following.input_lengths == [n + 1 for n in lengths]
    assert following.position_ids.tolist() == [[n] for n in lengths] and following.input_ids.shape == (2, 1)
    assert following.attention_mask.shape == (2, longest + 1 + 8)


def test_a_batch_that_contradicts_itself_is_found(lm: CausalLM) -> None:
    following = stepped(lm, batch_of(lm, *asked()[:2]), {})
    assert following is not None and following.past_key_values is not None
    following.past_key_values.truncate([1, 1])
    with pytest.raises(AssertionError):
        following.check()


def test_forward_takes_padded_ids(lm: CausalLM) -> None:
    batch = batch_of(lm, request("a", "one two three"), request("b", "x"))
    mask = batch.attention_mask[:, : batch.max_input_length]
    logits, past = lm.forward(batch.input_ids, mask, batch.position_ids)
    assert past.lengths == batch.input_lengths and logits.shape[:2] == batch.input_ids.shape
    for row, n in enumerate(batch.input_lengths):
        ids = batch.input_ids[row : row + 1, -n:]
        alone, _ = lm.forward(ids, torch.ones_like(ids), None)
        assert torch.equal(alone[0], logits[row, -n:]) and not logits[row, :-n].any()
    newest = logits[:, -1].argmax(-1, keepdim=True)
    after, past = lm.forward(newest, torch.ones_like(newest), torch.tensor(batch.input_lengths)[:, None], past)
    assert after.shape[1] == 1 and past.lengths == [n + 1 for n in batch.input_lengths]
    with pytest.raises(UsageError, match=r"the last positions are \[0, 0\], the cache goes on to"):
        lm.forward(newest, torch.ones_like(newest), torch.zeros(2, 1, dtype=torch.long), past)
    with pytest.raises(UsageError, match="a row is padding alone"):
        lm.forward(batch.input_ids, torch.zeros_like(mask), None)
    with pytest.raises(UsageError, match="adapter data is given"):
        lm.forward(batch.input_ids, mask, None, None, object())
    with pytest.raises(UsageError, match="the mask has padding behind tokens; pad on the left"):
        lm.forward(batch.input_ids, mask.flip(1), None)


# What a step tells


def test_prompt_logprobs_are_those_of_the_prompt_alone(lm: CausalLM) -> None:
    wanted = [
        request(name, text, 2, prompt_logprobs=True) for name, text in (("a", "x"), ("b", "rather a long prompt"))
    ]
    made, _ = lm.generate_token(batch_of(lm, *wanted, request("c")))
    assert made[2].prefill_tokens is None
    for generation, one in zip(made, wanted, strict=False):
        told, ids = generation.prefill_tokens, list(lm.reader(one).ids)
        assert told is not None and list(told.ids) == ids and len(told.texts) == generation.prefill_tokens_length
        assert len(told.logprobs) == len(ids) and told.logprobs[0] != told.logprobs[0]  # nan
        logits, _ = lm.forward(torch.tensor([ids]), torch.ones(1, len(ids)), None)
        scores = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert list(told.logprobs[1:]) == pytest.approx(scores.tolist(), abs=1e-5)


def test_a_row_ends_with_its_whole_text_and_the_others_go_on(lm: CausalLM) -> None:
    batch: CausalLMBatch | None = batch_of(lm, request("a", tokens=2), request("b", tokens=4))
    ends = list[tuple[str, int]]()
    while batch is not None:
        made, batch = lm.generate_token(batch)
        ends += [(g.request_id, g.generated_text.generated_tokens) for g in made if g.generated_text is not None]
    assert ends == [("a", 2), ("b", 4)]
    assert lm.generate_token(batch_of(lm, request("a", tokens=1)))[1] is None


def test_a_rank_tells_of_its_own_rows(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLM, "world_size", 2)
    told = list[list[str]]()
    for rank in (0, 1):
        monkeypatch.setattr(CausalLM, "rank", rank)
        told.append([generation.request_id for generation in lm.generate_token(batch_of(lm, *asked()))[0]])
    assert told == [["r0", "r2", "r4"], ["r1", "r3"]]


# generate.proto


def message(number: int, text: str, **parameters: Any) -> SimpleNamespace:
    given = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 0.0,
        "typical_p": 0.0,
        "do_sample": False,
        "seed": 0,
        **parameters,
    }
    stopping = SimpleNamespace(max_new_tokens=3, stop_sequences=[], ignore_eos_token=True)
    return SimpleNamespace(
        id=number, inputs=text, truncate=0, parameters=SimpleNamespace(**given), stopping_parameters=stopping,
        prefill_logprobs=False, adapter_index=0,
    )  # fmt: skip


def test_a_batch_of_messages_is_one_of_requests(lm: CausalLM) -> None:
    sent = SimpleNamespace(
        id=7, requests=[message(3, "one"), message(5, "a longer one", do_sample=True, temperature=0.8, seed=9)]
    )
    batch = CausalLMBatch.from_pb(sent, lm.reader.tokenizer, None, lm.reader, lm.model.llm.config)  # type: ignore[attr-defined]
    assert batch.batch_id == 7 and batch.requests == sent.requests and batch.requests_idx_mapping == {3: 0, 5: 1}
    same = (request("3", "one", 3), request("5", "a longer one", 3, temperature=0.8, seed=9))
    assert list(answers(lm, batch).values()) == list(answers(lm, batch_of(lm, *same)).values())


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1.0}, 0.0),  # what is neither warped nor asked to be drawn is greedy
        ({"temperature": 1.0, "do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"temperature": 1.0, "top_k": 4}, 1.0),
        ({"temperature": 0.0, "do_sample": True}, 0.0),
    ],
)
def test_a_messages_draw_is_what_lorax_takes_it_for(
    lm: CausalLM, parameters: dict[str, Any], temperature: float
) -> None:
    batch = CausalLMBatch.from_pb(
        [message(1, "x", **parameters)], lm.reader.tokenizer, processor=lm.reader, config=lm.model.llm.config
    )  # type: ignore[attr-defined]
    assert batch.next_token_choosers[0].params.temperature == temperature


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter_index": 2}, "request 1 speaks through adapter 2"),
        ({"parameters": SimpleNamespace(schema="{}")}, "request 1 has the schema '{}'"),
    ],
)
def test_what_no_row_has_is_refused(lm: CausalLM, changes: dict[str, Any], words: str) -> None:
    sent = message(1, "x")
    sent.__dict__.update(changes)
    with pytest.raises(UsageError, match=words):
        CausalLMBatch.from_pb([sent], lm.reader.tokenizer)


# What is kept of a prompt


def test_truncate_is_a_rows_own(lm: CausalLM) -> None:
    whole = lm.reader(request("a", "one two three four five")).ids
    cut = Request("a", parts=(Text("one two three four five"),), truncate=3)
    batch = batch_of(lm, cut, request("b", "one two three four five"))
    assert [row.ids for row in batch.rows] == [list(whole[-3:]), list(whole)]


def test_a_prompt_without_room_is_refused(lm: CausalLM) -> None:
    with pytest.raises(CapacityError, match=rf"the context holds {CONTEXT} with an answer"):
        batch_of(lm, request("a", "word " * 200))
