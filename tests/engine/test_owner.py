"""Requests from many threads and from an event loop, one thread that answers them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from make_tiny_model import make_tiny_model
from tinychat.core import Event, Failed, Finished, Request, SamplingParams, StoppingParams, Text, Token
from tinychat.engine.causal_lm import CausalLM
from tinychat.engine.owner import Owner
from tinychat.engine.scheduler import Scheduler
from tinychat.errors import UsageError
from tinychat.load import load


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), layout="text", seed=3)
    return CausalLM.from_model(*load(folder, device="cpu"), context=160)


def request(name: str, text: str = "some words", tokens: int = 6, **sampling: Any) -> Request:
    stopping = StoppingParams(tokens, ignore_eos=True)
    return Request(name, parts=(Text(text),), sampling=SamplingParams(**sampling), stopping=stopping)


def asked(count: int) -> list[Request]:
    return [request(f"r{i}", f"{i} words", 3 + i % 5, temperature=i % 2, seed=i) for i in range(count)]


def ids(events: list[Event]) -> tuple[int, ...]:
    end = events[-1]
    assert isinstance(end, Finished), end
    assert tuple(event.id for event in events if isinstance(event, Token)) == end.token_ids
    return end.token_ids


@pytest.fixture(scope="module")
def alone(lm: CausalLM) -> dict[str, tuple[int, ...]]:
    with Owner(Scheduler(lm)) as owner:
        return {one.id: ids(list(owner.submit(one))) for one in asked(12)}


def test_many_threads_get_their_own_answers(lm: CausalLM, alone: dict[str, tuple[int, ...]]) -> None:
    found = dict[str, tuple[int, ...]]()
    with Owner(Scheduler(lm, rows=3)) as owner:

        def client(mine: list[Request]) -> None:
            for one in mine:
                found[one.id] = ids(list(owner.submit(one)))

        threads = [threading.Thread(target=client, args=(asked(12)[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == alone


def test_an_event_loop_reads_streams_side_by_side(lm: CausalLM, alone: dict[str, tuple[int, ...]]) -> None:
    async def one(owner: Owner, each: Request) -> tuple[str, tuple[int, ...]]:
        return each.id, ids([event async for event in owner.submit(each)])

    async def every() -> dict[str, tuple[int, ...]]:
        with Owner(Scheduler(lm, rows=4)) as owner:
            return dict(await asyncio.gather(*(one(owner, each) for each in asked(12))))

    assert asyncio.run(every()) == alone


def test_a_stream_is_cancelled_from_another_thread(lm: CausalLM) -> None:
    with Owner(Scheduler(lm, rows=2)) as owner:
        stream, other = owner.submit(request("long", tokens=140)), owner.submit(request("other"))
        events = list[Event]()
        for event in stream:
            events.append(event)
            if isinstance(event, Token) and len(events) > 4:
                stream.cancel()
        end = events[-1]
        assert isinstance(end, Finished) and end.finish_reason == "cancelled" and 0 < len(end.token_ids) < 140
        assert len(ids(list(other))) == 6


def test_closing_ends_every_answer(lm: CausalLM) -> None:
    owner = Owner(Scheduler(lm))
    streams = [owner.submit(request(name, tokens=140)) for name in "ab"]
    reader = iter(streams[0])
    next(reader)
    owner.close()
    ends = [[*reader][-1], [*streams[1]][-1]]
    assert all(isinstance(end, Finished) and end.finish_reason == "cancelled" for end in ends)
    (failed,) = owner.submit(request("late"))
    assert isinstance(failed, Failed) and failed.message == "the engine has stopped"


def test_an_error_of_ours_reaches_every_reader_and_who_closes(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(lm.model, "decode", broken)
    owner = Owner(Scheduler(lm, rows=2))
    streams = [owner.submit(request(name)) for name in "ab"]
    assert [list(stream)[-1].message for stream in streams] == ["the engine has stopped"] * 2  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="a bug"):
        owner.close()


def test_what_cannot_be_taken_in_is_told(lm: CausalLM) -> None:
    with Owner(Scheduler(lm, queue=0)) as owner:
        first = owner.submit(request("a", tokens=140))
        reader = iter(first)
        next(reader)
        (failed,) = owner.submit(request("b"))
        assert isinstance(failed, Failed) and failed.message == "1 requests are being answered and 0 wait already"
        first.cancel()
    with Owner(Scheduler(lm)) as owner:
        stream = owner.submit(request("a", tokens=100))
        with pytest.raises(UsageError, match="request 'a' is being answered"):
            owner.submit(request("a"))
        stream.cancel()
        assert isinstance(list(stream)[-1], Finished)


def test_a_cancel_counts_before_the_request_is_taken_in(lm: CausalLM) -> None:
    with Owner(Scheduler(lm, chunk=1)) as owner:
        owner.submit(request("long", "word " * 20, tokens=60))
        stream = owner.submit(request("a", tokens=60))
        stream.cancel()
        end = list(stream)[-1]
        assert isinstance(end, Finished) and end.finish_reason == "cancelled" and len(end.token_ids) < 60


def test_a_cancel_after_the_end_is_not_the_next_ones(lm: CausalLM) -> None:
    with Owner(Scheduler(lm)) as owner:
        for _ in range(3):
            stream = owner.submit(request("again"))
            assert len(ids(list(stream))) == 6
            stream.cancel()
            assert list(stream) == []


def test_a_reader_that_leaves_cancels(lm: CausalLM) -> None:
    with Owner(Scheduler(lm)) as owner:
        for event in owner.submit(request("a", tokens=140)):
            if isinstance(event, Token):
                break
        assert len(ids(list(owner.submit(request("b"))))) == 6
    assert owner.scheduler.held_tokens < 140


def test_an_event_loop_that_closes_harms_nobody(lm: CausalLM) -> None:
    """A reader's loop ends in the middle of its answer; another reader gets its own to the end."""

    async def first(owner: Owner) -> None:
        async for event in owner.submit(request("gone", tokens=140)):
            if isinstance(event, Token):
                return

    with Owner(Scheduler(lm, rows=2)) as owner:
        other = owner.submit(request("other", tokens=100))
        asyncio.run(first(owner))
        assert len(ids(list(other))) == 100
        assert len(ids(list(owner.submit(request("next"))))) == 6
