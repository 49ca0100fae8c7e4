"""Who is answered when: each answer is its own in any company, nobody waits for long prompts, memory suffices."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

from make_tiny_model import make_tiny_model
from tinychat.core import (
    Event,
    Failed,
    Finished,
    Image,
    Progress,
    Request,
    SamplingParams,
    Started,
    StoppingParams,
    Text,
    Token,
)  # fmt: skip
from tinychat.engine.causal_lm import CausalLM
from tinychat.engine.engine import Engine
from tinychat.engine.scheduler import Scheduler
from tinychat.errors import CapacityError, MediaError, UsageError
from tinychat.load import load

CONTEXT = 160
WORDS = ("one", "a good deal longer than the others are " * 2, "x", "counting 1 2 3 4 5 6 7", "last of all")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), layout="vila", seed=3)
    return CausalLM.from_model(*load(folder, device="cpu"), context=CONTEXT)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    folder, made = tmp_path_factory.mktemp("pictures"), list[Image]()
    for i, colour in enumerate(("red", "green", "blue")):
        path = folder / f"{colour}.png"
        Pictures.new("RGB", (40 + 9 * i, 30), colour).save(path)
        made.append(Image(path=str(path)))
    return made


def request(name: str, *parts: str | Image, tokens: int = 6, **more: Any) -> Request:
    given = {key: more.pop(key) for key in ("priority", "deadline", "truncate") if key in more}
    return Request(
        name, parts=tuple(Text(part) if isinstance(part, str) else part for part in parts or ("some words",)),
        sampling=SamplingParams(**more), stopping=StoppingParams(tokens, ignore_eos=True), **given,
    )  # fmt: skip


def run(scheduler: Scheduler, *requests: Request, between: Callable[[int], None] = lambda step: None) -> list[Event]:
    """All events until there is nothing to do; `between` is called before each step."""
    for one in requests:
        scheduler.submit(one)
    events, step = list[Event](), 0
    while scheduler.busy:
        between(step)
        events += scheduler.step()
        step += 1
        assert step < 2000, "the scheduler does not end"
    return events


def ends(events: list[Event]) -> dict[str, Finished | Failed]:
    found = [event for event in events if isinstance(event, Finished | Failed)]
    assert len({end.request_id for end in found}) == len(found)
    return {end.request_id: end for end in found}


def said(events: list[Event]) -> dict[str, tuple[int, ...]]:
    answers = dict[str, tuple[int, ...]]()
    for name, end in ends(events).items():
        assert isinstance(end, Finished), end
        tokens = [event for event in events if isinstance(event, Token) and event.request_id == name]
        assert tuple(token.id for token in tokens) == end.token_ids
        assert "".join(token.text for token in tokens) + end.tail == end.text
        answers[name] = end.token_ids
    return answers


KNOWN: dict[str, tuple[int, ...]] = {}  # answers of requests alone, whatever their ids


def alone(lm: CausalLM, *requests: Request) -> dict[str, tuple[int, ...]]:
    found = dict[str, tuple[int, ...]]()
    for one in requests:
        asked = repr((one.parts, one.sampling, one.stopping))
        if asked not in KNOWN:
            KNOWN[asked] = said(run(Scheduler(lm), one))[one.id]
        found[one.id] = KNOWN[asked]
    return found


def mixed(pictures: list[Image]) -> list[Request]:
    draws: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.9, "seed": 4},
        {"temperature": 1.2, "seed": 8, "top_k": 9},
    )
    texts = [request(f"t{i}", text, tokens=4 + 3 * (i % 3), **draws[i % 3]) for i, text in enumerate(WORDS)]
    seen = [request(f"p{i}", "look at ", one, " and say", tokens=5, **draws[i % 3]) for i, one in enumerate(pictures)]
    return [*texts, *seen]


# The same answers in any company


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("between", [3, 64])
def test_answers_are_those_of_each_alone(lm: CausalLM, pictures: list[Image], rows: int, between: int) -> None:
    requests = mixed(pictures)
    scheduler = Scheduler(lm, rows=rows, chunk=32, between=between)
    assert said(run(scheduler, *requests)) == alone(lm, *requests)
    assert scheduler.held_tokens <= scheduler.kv_tokens and not scheduler.preempted


Move = tuple[str, int]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 4), kv_tokens=st.sampled_from([None, 170, 260]), between=st.sampled_from([2, 20]),
    moves=st.lists(st.tuples(st.sampled_from(["submit", "step", "cancel", "urgent"]), st.integers(0, 7)), max_size=30),
)  # fmt: skip
def test_any_history_ends_with_every_answer(
    lm: CausalLM, pictures: list[Image], rows: int, kv_tokens: int | None, between: int, moves: list[Move]
) -> None:
    """Submitted at any moment, urgent or not, cancelled or not, with little memory or enough."""
    todo, events, cancelled = mixed(pictures), list[Event](), set[str]()
    expected = alone(lm, *todo)
    scheduler = Scheduler(lm, rows=rows, chunk=24, between=between, kv_tokens=kv_tokens)
    known = list[str]()
    for move, n in moves:
        if move in ("submit", "urgent") and todo:
            one = todo.pop(n % len(todo))
            known.append(one.id)
            scheduler.submit(Request(one.id, (), one.parts, one.sampling, one.stopping, priority=int(move == "urgent")))
        elif move == "cancel" and known:
            cancelled.add(known[n % len(known)])
            scheduler.cancel(known[n % len(known)])
        elif move == "step":
            events += scheduler.step()
    events += run(scheduler, *todo)
    found = said(events)
    assert set(found) == set(expected)
    for name, tokens in expected.items():
        whole = found[name] == tokens
        assert whole or (name in cancelled and found[name] == tokens[: len(found[name])])
    assert scheduler.held_tokens <= scheduler.kv_tokens


# Nobody's stream stalls


def test_others_go_on_while_a_long_prompt_is_read(lm: CausalLM) -> None:
    scheduler = Scheduler(lm, rows=2, chunk=512, between=8)
    scheduler.submit(request("talks", "x", tokens=40))
    events = [*scheduler.step()]
    scheduler.submit(request("long", "word " * 18, tokens=2))
    pieces = list[list[Event]]()
    while not any(isinstance(event, Token) and event.request_id == "long" for event in events):
        pieces.append(list(scheduler.step()))
        events += pieces[-1]
    read = [e.done for e in events if isinstance(e, Progress) and e.stage == "prefill" and e.request_id == "long"]
    assert len(read) > 5 and max(b - a for a, b in zip(read, read[1:], strict=False)) == 8
    for step in pieces:
        assert sum(isinstance(e, Token) and e.request_id == "talks" for e in step) == 1


def test_prompts_take_turns(lm: CausalLM) -> None:
    """A short prompt is not kept waiting by a long one before it."""
    scheduler = Scheduler(lm, rows=2, chunk=8)
    events = run(scheduler, request("long", "word " * 18), request("short", "x"))
    first = [event.request_id for event in events if isinstance(event, Token)]
    assert first[0] == "short"


def test_the_urgent_go_first(lm: CausalLM) -> None:
    scheduler = Scheduler(lm)
    events = run(scheduler, *(request(f"r{i}", priority=priority) for i, priority in enumerate((0, 1, 5, 1))))
    assert [event.request_id for event in events if isinstance(event, Started)] == ["r2", "r1", "r3", "r0"]


def test_an_urgent_one_takes_the_row_of_another_that_goes_on_later(lm: CausalLM) -> None:
    calm = request("calm", "a calm question", tokens=12, temperature=1.0, seed=2)
    urgent = request("urgent", "quick", tokens=3, priority=1)
    scheduler = Scheduler(lm)
    expected = alone(lm, calm, urgent)

    def hurry(step: int) -> None:
        if step == 4:
            scheduler.submit(urgent)

    events = run(scheduler, calm, between=hurry)
    assert said(events) == expected and scheduler.preempted == 1
    order = [event.request_id for event in events if isinstance(event, Finished)]
    assert order == ["urgent", "calm"]
    assert sum(isinstance(event, Started) for event in events) == 2


# Memory


def test_little_memory_makes_some_wait_and_changes_nothing(lm: CausalLM, pictures: list[Image]) -> None:
    requests = [*mixed(pictures), request("grows", "x", tokens=90), request("grows too", "y", tokens=90)]
    scheduler = Scheduler(lm, rows=4, chunk=32, between=16, kv_tokens=170)
    most = list[int]()
    events = run(scheduler, *requests, between=lambda step: most.append(scheduler.held_tokens))
    assert said(events) == alone(lm, *requests)
    assert scheduler.preempted > 0 and max(most) <= 170


def test_a_conversations_turn_keeps_its_row_when_others_talk(lm: CausalLM) -> None:
    scheduler = Scheduler(lm, rows=2)
    first = ends(run(scheduler, request("a", "the first of two conversations")))["a"]
    assert isinstance(first, Finished)
    run(scheduler, request("b", "another one"))
    (started,) = [
        e for e in run(scheduler, request("c", "the first of two conversations, going on")) if isinstance(e, Started)
    ]
    assert started.cached_tokens > 20
    run(scheduler, request("d", "another one"), request("e", "a third one"))
    (started,) = [e for e in run(scheduler, request("f", "another one, going on")) if isinstance(e, Started)]
    assert started.cached_tokens > 5


def test_a_growing_conversation_is_never_read_anew(lm: CausalLM) -> None:
    """Also where it fills most of the memory."""
    scheduler, text = Scheduler(lm, chunk=32), "word"
    cached = list[int]()
    for turn in range(12):
        events = run(scheduler, request(f"r{turn}", text, tokens=2))
        (started,) = [event for event in events if isinstance(event, Started)]
        cached.append(started.prompt_tokens - started.cached_tokens)
        text += " and more"
    assert cached[0] > 1 and max(cached[1:]) <= 12 and started.prompt_tokens > CONTEXT / 2


def test_a_request_that_wants_its_prompts_logprobs_reads_all_of_it(lm: CausalLM) -> None:
    scheduler = Scheduler(lm)
    run(scheduler, request("a", "again"))
    (started,) = [e for e in run(scheduler, request("b", "again", prompt_logprobs=True)) if isinstance(e, Started)]
    assert started.cached_tokens == 0


# Ends


def test_a_deadline_cuts_off(lm: CausalLM) -> None:
    scheduler = Scheduler(lm)

    def slow(step: int) -> None:
        time.sleep(0.02)

    late, never = request("late", tokens=90, deadline=0.1), request("never", deadline=0.05)
    found = ends(run(scheduler, late, never, between=slow))
    cut, failed = found["late"], found["never"]
    assert isinstance(cut, Finished) and cut.finish_reason == "cancelled" and 0 < len(cut.token_ids) < 90
    assert isinstance(failed, Failed) and failed.exit_code == 5
    assert failed.message == "its deadline of 0.05 s passed before it was begun with"


def test_a_waiting_request_is_cancelled_without_a_word(lm: CausalLM) -> None:
    scheduler = Scheduler(lm)
    scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    scheduler.cancel("b")
    scheduler.cancel("nobody")
    events = run(scheduler)
    assert [(e.request_id, e.finish_reason) for e in events if isinstance(e, Finished)] == [
        ("b", "cancelled"),
        ("a", "length"),
    ]


def test_a_full_queue_and_a_known_id_are_refused(lm: CausalLM) -> None:
    scheduler = Scheduler(lm, queue=1)
    scheduler.submit(request("a", tokens=1))
    with pytest.raises(UsageError, match="request 'a' is being answered"):
        scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    with pytest.raises(CapacityError, match="0 requests are being answered and 2 wait already; try again later"):
        scheduler.submit(request("c"))
    events = list(scheduler.step())
    scheduler.submit(request("c"))
    assert set(said([*events, *run(scheduler)])) == {"a", "b", "c"}


def test_what_fails_fails_alone(lm: CausalLM, pictures: list[Image], tmp_path: Path) -> None:
    missing = Image(path=str(tmp_path / "missing.png"))
    bad = [
        request("picture", "x", missing),
        request("long", "word " * 400),
        request("bias", "x", logit_bias={10**6: 1.0}),
    ]
    good = mixed(pictures)
    found = ends(run(Scheduler(lm, rows=3), *good[:3], *bad, *good[3:]))
    codes = {name: end.exit_code for name, end in found.items() if isinstance(end, Failed)}
    assert codes == {"picture": MediaError.exit_code, "long": CapacityError.exit_code, "bias": UsageError.exit_code}
    assert {name: end.token_ids for name, end in found.items() if isinstance(end, Finished)} == alone(lm, *good)


def test_logits_that_are_no_numbers_fail_their_row_alone(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, expected = type(lm.model).decode, alone(lm, request("a"), request("c", "x"))

    def spoiled(self: Any, ids: Any, cache: Any) -> Any:
        logits = real(self, ids, cache)
        if len(ids) == 3:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(type(lm.model), "decode", spoiled)
    found = ends(run(Scheduler(lm, rows=3), request("a"), request("b", "y"), request("c", "x")))
    assert isinstance(found["b"], Failed) and "not numbers" in found["b"].message
    assert {name: end.token_ids for name, end in found.items() if isinstance(end, Finished)} == expected


def test_dropped_requests_leave_a_usable_scheduler(lm: CausalLM) -> None:
    scheduler = Scheduler(lm, rows=2)
    for name in "abc":
        scheduler.submit(request(name, tokens=50))
    for _ in range(4):
        list(scheduler.step())
    for name in "abc":
        scheduler.drop(name)
    assert not scheduler.busy
    assert said(run(scheduler, request("d"))) == alone(lm, request("d"))


# The engine's own way in


def test_an_engine_of_several_rows_mixes_events_and_takes_requests_as_they_fit(lm: CausalLM) -> None:
    engine = Engine(lm.model, lm.reader, context=CONTEXT, rows=2)
    taken = list[str]()

    def requests() -> Any:
        for name in "abcd":
            taken.append(name)
            yield request(name, name, tokens=4)

    events = list[Event]()
    for event in engine.run(requests()):
        assert len(taken) <= 2 + len([e for e in events if isinstance(e, Finished)]) + 1
        events.append(event)
    assert said(events) == alone(lm, *(request(name, name, tokens=4) for name in "abcd"))
    names = [event.request_id for event in events if isinstance(event, Token)]
    assert names != sorted(names)


def test_an_id_that_comes_twice_fails_alone(lm: CausalLM) -> None:
    engine = Engine(lm.model, lm.reader, context=CONTEXT, rows=2)
    found = list(engine.run([request("a"), request("a")]))
    assert [type(event) for event in found if isinstance(event, Finished | Failed)] == [Failed, Finished]


# Speculation, and what a token tells


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.3, "seed": 4}, {"repetition_penalty": 1.1}])
def test_guessing_ahead_changes_no_answer(
    lm: CausalLM, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(f"r{i}", "one two one two " * 4, str(i), tokens=40, **sampling) for i in range(4)]
    plain = alone(lm, *asked)
    steps = list[int]()
    real = type(lm.model).verify

    def counted(self: Any, ids: Any, cache: Any) -> Any:
        steps.append(ids.shape[1])
        return real(self, ids, cache)

    monkeypatch.setattr(type(lm.model), "verify", counted)
    monkeypatch.setattr(lm, "speculate", 4, raising=False)
    assert said(run(Scheduler(lm), *asked)) == plain
    assert max(steps) == 5 and len(steps) < 0.9 * sum(map(len, plain.values()))
    assert said(run(Scheduler(lm, rows=3), *asked)) == plain


def test_a_token_tells_its_rivals_and_what_it_was_drawn_from(lm: CausalLM) -> None:
    events = run(Scheduler(lm), request("a", temperature=0.5, top_k=3, seed=1, top_n_tokens=4))
    for token in (event for event in events if isinstance(event, Token)):
        assert len(token.top) == 4 and [one.logprob for one in token.top] == sorted(
            (t.logprob for t in token.top), reverse=True
        )
        assert token.processed_logprob is not None and token.processed_logprob != token.logprob
        assert all(one.text or one.id for one in token.top)


# Errors in the middle of a step


def test_an_error_in_the_first_draw_leaves_the_others_and_a_usable_engine(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinychat.engine import scheduler as module

    engine, real, count = Engine(lm.model, lm.reader, context=CONTEXT, rows=2), module.draw, [0]

    def broken(*given: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise RuntimeError("a bug")
        return real(*given)

    monkeypatch.setattr(module, "draw", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        list(engine.run([request("a"), request("b", "x")]))
    assert not engine.scheduler.busy and len(engine.scheduler._slots) == 2
    assert said(list(engine.run([request("a"), request("b", "x")]))) == alone(lm, request("a"), request("b", "x"))


def test_memory_that_runs_out_makes_some_wait(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows are too many for the device, two are not."""
    requests = [
        request("a", tokens=9),
        request("b", "x", tokens=9),
        request("c", "y", tokens=9, temperature=1.0, seed=3),
    ]
    expected, real = alone(lm, *requests), type(lm.model).decode

    def small(self: Any, ids: Any, cache: Any) -> Any:
        if len(ids) > 2:
            raise MemoryError
        return real(self, ids, cache)

    monkeypatch.setattr(type(lm.model), "decode", small)
    scheduler = Scheduler(lm, rows=3)
    assert said(run(scheduler, *requests)) == expected and scheduler.preempted > 0
    monkeypatch.setattr(type(lm.model), "decode", lambda *_: (_ for _ in ()).throw(MemoryError()))
    (end,) = ends(run(Scheduler(lm), request("a"))).values()
    assert isinstance(end, Failed) and "memory ran out" in end.message


def test_memory_that_runs_out_at_a_picture_fails_it_alone(
    lm: CausalLM, pictures: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(type(lm.reader), "pixels", full)
    found = ends(run(Scheduler(lm, rows=2), request("p", pictures[0]), request("t")))
    assert (
        isinstance(found["p"], Failed) and "memory ran out" in found["p"].message and isinstance(found["t"], Finished)
    )


def test_a_head_of_the_queue_that_must_wait_empties_no_free_row(lm: CausalLM) -> None:
    scheduler = Scheduler(lm, rows=3, kv_tokens=150, between=8)
    run(scheduler, request("idle", "a conversation that goes on later"))
    scheduler.submit(request("speaks", "word " * 12, tokens=20))
    list(scheduler.step())
    scheduler.submit(request("large", "other " * 16))
    before = scheduler._slots.tokens
    for _ in range(4):
        list(scheduler.step())
    assert scheduler._slots.tokens == before > 0
    large = ends(run(scheduler))["large"]
    assert isinstance(large, Finished) and len(large.token_ids) == 6


def test_only_as_many_make_way_as_must(lm: CausalLM) -> None:
    calm = [request(f"c{i}", f"{i}", tokens=30) for i in range(3)]
    urgent = request("urgent", "quick", tokens=3, priority=1)
    scheduler = Scheduler(lm, rows=3)

    def hurry(step: int) -> None:
        if step == 5:
            scheduler.submit(urgent)

    assert said(run(scheduler, *calm, between=hurry)) == alone(lm, *calm, urgent)
    assert scheduler.preempted == 1


def test_a_text_does_not_wait_for_all_pictures_of_another(lm: CausalLM, pictures: list[Image]) -> None:
    events = run(Scheduler(lm, rows=2), request("album", *pictures, "what?"), request("text", "x"))
    looks = [i for i, e in enumerate(events) if isinstance(e, Progress) and e.stage == "vision"]
    first = next(i for i, e in enumerate(events) if isinstance(e, Token) and e.request_id == "text")
    assert looks[0] < first < looks[-1]


def test_prompt_logprobs_come_with_the_end(lm: CausalLM) -> None:
    (end,) = ends(run(Scheduler(lm, chunk=3), request("a", "one two three four", prompt_logprobs=True))).values()
    assert isinstance(end, Finished) and len(end.prompt_logprobs) == end.usage.prompt_tokens
    assert all(value < 0 for value in end.prompt_logprobs[1:])


def test_a_second_run_beside_the_first_is_refused(lm: CausalLM) -> None:
    engine = Engine(lm.model, lm.reader, context=CONTEXT)
    first = engine.run([request("a")])
    next(first)
    with pytest.raises(UsageError, match="the engine is answering already"):
        next(engine.run([request("b")]))
    assert isinstance([*first][-1], Finished)


def test_no_rows_and_no_chunks_are_refused(lm: CausalLM) -> None:
    with pytest.raises(UsageError, match="0 rows, chunks of 512 and 64 tokens are asked for"):
        Scheduler(lm, rows=0)


def test_a_prompt_beyond_all_memory_names_it(lm: CausalLM) -> None:
    (end,) = ends(run(Scheduler(lm, kv_tokens=8), request("a", "many words in a row"))).values()
    assert isinstance(end, Failed) and "all rows together hold 8" in end.message and "KV memory" in end.remedy
