"""Five hundred mixed requests on the embedded model: every answer is its own, nothing is stuck, memory stays flat."""

from __future__ import annotations

import random
import threading

import psutil
import pytest

from tinychat.core import Event, Failed, Finished, Image, Message, Request, SamplingParams, StoppingParams, Text, Token
from tinychat.engine.causal_lm import CausalLM
from tinychat.engine.owner import Owner
from tinychat.engine.scheduler import Scheduler
from tinychat.load import EMBEDDED, load

REQUESTS, CLIENTS, CONTEXT = 500, 5, 400
PICTURES = sorted((EMBEDDED.parent / "samples").glob("*.png"))[:6]
QUESTIONS = ("What is in the picture?", "How many are there?", "Which colour is it?", "Read the text.")


def asked(number: int) -> Request:
    """One of forty: with a picture or two, greedy or drawn, short or long, some too large to be answered."""
    draw = random.Random(number)
    pictures = [Image(path=str(path)) for path in draw.sample(PICTURES, draw.choice([0, 1, 1, 2]))]
    words = draw.choice(QUESTIONS) if number % 20 else "too many words " * 400
    sampling = SamplingParams(temperature=draw.choice([0, 0, 0.8]), seed=number, top_p=draw.choice([1.0, 0.9]))
    stopping = StoppingParams(draw.choice([4, 12, 30]), ignore_eos=draw.random() < 0.5)
    return Request(f"{number}", (Message("user", (*pictures, Text(words))),), sampling=sampling, stopping=stopping)


def end(events: list[Event]) -> Finished | Failed:
    last = events[-1]
    assert isinstance(last, Finished | Failed)
    if isinstance(last, Finished):
        assert tuple(event.id for event in events if isinstance(event, Token)) == last.token_ids
    return last


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_soak() -> None:
    lm = CausalLM.from_model(*load(device="cpu"), context=CONTEXT)
    alone = dict[int, Finished | Failed]()
    with Owner(Scheduler(lm)) as owner:
        for number in range(40):
            alone[number] = end(list(owner.submit(asked(number))))
    assert 0 < sum(isinstance(one, Failed) for one in alone.values()) < 5
    scheduler = Scheduler(lm, rows=6, kv_tokens=3 * CONTEXT)
    wrong, memory, kinds = list[str](), list[int](), list[str]()

    def client(owner: Owner, mine: int) -> None:
        for turn in range(mine, REQUESTS, CLIENTS):
            draw = random.Random(-turn)
            number, way = draw.randrange(40), draw.choice(["wait", "wait", "wait", "cancel", "deadline"])
            one = asked(number)
            deadline = draw.choice([0.002, 0.3]) if way == "deadline" else None
            request = Request(
                f"{turn}", one.messages, (), one.sampling, one.stopping, None, draw.choice([0, 0, 1]), deadline
            )
            stream, events, stop = owner.submit(request), list[Event](), draw.randrange(12)
            for event in stream:
                events.append(event)
                if way == "cancel" and len(events) > stop:
                    stream.cancel()
            found, expected = end(events), alone[number]
            kinds.append(type(found).__name__ + (found.finish_reason if isinstance(found, Finished) else ""))
            if not same(found, expected, cut=way != "wait"):
                wrong.append(f"{turn} ({way}): {found} where {expected} was expected")
            memory.append(psutil.Process().memory_info().rss)

    with Owner(scheduler) as owner:
        threads = [threading.Thread(target=client, args=(owner, mine)) for mine in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and len(kinds) == REQUESTS
    assert not scheduler.busy and scheduler.held_tokens <= scheduler.kv_tokens
    assert {"Failed", "Finishedcancelled", "Finishedlength"} <= set(kinds)
    assert max(memory[-50:]) < max(memory[50:150]) + 48 * 2**20


def same(found: Finished | Failed, expected: Finished | Failed, cut: bool) -> bool:
    """The answer of its own, the beginning of it where it was cut off, or the same refusal."""
    if isinstance(found, Failed):
        refused = isinstance(expected, Failed) and found.message == expected.message
        return refused or (cut and "deadline" in found.message)
    if isinstance(expected, Failed):
        return cut and found.finish_reason == "cancelled" and not found.token_ids
    if found.finish_reason == "cancelled":
        return cut and expected.token_ids[: len(found.token_ids)] == found.token_ids
    return (found.token_ids, found.text, found.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )
