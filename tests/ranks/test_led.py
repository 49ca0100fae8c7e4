"""The engine over a model that several ranks share: the answers are those of one rank, pictures and all."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool

from make_tiny_model import make_tiny_model
from tinychat import load
from tinychat.core import Event, Failed, Finished, Image, Message, Request, StoppingParams, Text
from tinychat.engine.engine import Engine
from tinychat.errors import CapacityError, ModelError, TinychatError
from tinychat.layers.kv_cache import KVPool
from tinychat.layers.parallel import Group
from tinychat.placement import Placement
from tinychat.ranks.follow import serve
from tinychat.ranks.lead import Leader, Loading, Order, RanksLost, check_loading, fingerprint
from tinychat.ranks.led import CacheRows, FollowedModel, LedModel
from tinychat.ranks.world import World
from tinychat.session import Session
from tinychat_kernels import cpu

SAMPLES = sorted(Path(load.EMBEDDED).parent.glob("samples/*.png"))
SETTINGS = {
    "16 bit": {"dtype": "float32", "dequantize": True},
    "4 bit": {"exact": True, "head": "float", "tower": "float"},
}


def requests() -> list[Request]:
    asked = [("What is in the picture?", SAMPLES[:1]), ("hello", []), ("Which differ?", SAMPLES[1:3])]
    return [
        Request(
            f"r{i}", (Message("user", (*(Image(path=str(path)) for path in pictures), Text(words))),),
            stopping=StoppingParams(max_new_tokens=12),
        )
        for i, (words, pictures) in enumerate(asked)
    ]  # fmt: skip


def answers(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Token ids of three requests that are answered together, and then of a conversation of two turns."""
    found = {event.request_id: event.token_ids for event in engine.run(requests()) if isinstance(event, Finished)}
    session = Session(engine, stopping=StoppingParams(max_new_tokens=8))
    for turn, words in enumerate(("What is this?", "And its colour?")):
        said: list[Event] = list(session.say(words, [Image(path=str(SAMPLES[0]))] if turn == 0 else []))
        assert isinstance(said[-1], Finished)
        assert turn == 0 or said[-1].usage.cached_tokens
        found[words] = said[-1].token_ids
    return found


def order(settings: dict[str, Any], model: str | None = None) -> Order:
    return Order(model, None, Placement(device="cpu", **settings), 512, 32, 3, None)


def engine_of(ready: load.Ready, model: Any) -> Engine:
    return Engine(model, ready.processor, context=ready.context, chunk=32, rows=3)


def play(group: Group, settings: dict[str, Any]) -> Any:
    """Rank 0 answers, the others serve; they come back with their exit codes."""
    world = World(group.rank(), group.size(), group.rank(), group.size(), "", 0)
    if group.rank() > 0:
        return serve(world, group)
    leader = Leader(world, group)
    ready = leader.load(order(settings))
    found = answers(engine_of(ready, leader.led(ready)))
    leader.end()
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bits", SETTINGS)
def test_answers_are_those_of_one_rank(ranks: RankPool, size: int, bits: str) -> None:
    ready = load.load_folder(load.EMBEDDED, Placement(device="cpu", **SETTINGS[bits]), context=512, chunk=32, rows=3)
    alone = answers(engine_of(ready, ready.model))
    assert len(alone) == 5
    first, *others = ranks.run(size, play, SETTINGS[bits])
    assert first == alone
    assert others == [0] * (size - 1)


def maps_while_loaded(group: Group) -> Any:
    """Whether rank 0 shares memory with others while it has a model."""
    world = World(group.rank(), group.size(), group.rank(), group.size(), "", 0)
    if group.rank() > 0:
        return serve(world, group)
    leader = Leader(world, group)
    ready = leader.load(order({}))
    shares = "/dev/shm/tinychat-" in Path("/proc/self/maps").read_text()
    del ready
    gc.collect()
    leader.end()
    return shares, "/dev/shm/tinychat-" in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux" or not cpu.available()[0], reason="no kernels")
def test_ranks_on_one_machine_share_memory_as_long_as_the_model_lives(ranks: RankPool) -> None:
    assert ranks.run(2, maps_while_loaded) == [(True, False), 0]


def fail_to_load(group: Group, folder: str) -> Any:
    world = World(group.rank(), group.size(), group.rank(), group.size(), "", 0)
    if group.rank() > 0:
        return serve(world, group)
    leader = Leader(world, group)
    try:
        leader.load(order({}, folder))
    except TinychatError as error:
        return str(error), error.exit_code
    finally:
        leader.end()


def test_what_no_rank_can_load_is_said_once(ranks: RankPool, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", heads=3, kv_heads=3, hidden_size=96)
    (said, code), other = ranks.run(2, fail_to_load, str(folder))
    assert said == "2 ranks cannot share this model: its 3 attention heads do not divide by 2; take 1 or 3"
    assert (code, other) == (3, 0)


def test_an_error_names_the_rank_that_has_it() -> None:
    fine, wrong = Loading(None, "a"), Loading(("there is no folder x", "give another", 3))
    check_loading([fine, fine])
    with pytest.raises(TinychatError, match="^rank 1: there is no folder x; give another$") as caught:
        check_loading([fine, wrong])
    assert caught.value.exit_code == 3
    with pytest.raises(ModelError, match="rank 2 has loaded other weights than rank 0; put the same model folder"):
        check_loading([fine, fine, Loading(None, "b")])


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    one, same = (make_tiny_model(tmp_path / name) for name in ("one", "same"))
    other = make_tiny_model(tmp_path / "other", layers=3)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def led(tell: Any = None) -> tuple[LedModel, list[tuple[Any, ...]]]:
    ready = load.load_folder(load.EMBEDDED, Placement(device="cpu", dequantize=True), context=64)
    told: list[tuple[Any, ...]] = []
    return LedModel(ready.model, tell or (lambda *word: told.append(word)), nullcontext), told


def test_followers_forget_the_pools_that_are_gone() -> None:
    model, told = led()
    follower = FollowedModel(model.model)
    cache = model.make_cache(2, 16)
    assert told == [("make_cache", 0, 2, 16)]
    follower.do(*_word(told[0]))
    follower.do("verify", (torch.tensor([[3], [4]]), CacheRows(0, [0, 1], [0, 0])))
    del cache
    gc.collect()
    model.make_cache(1, 8)
    assert told[1:] == [("forget", [0]), ("make_cache", 1, 1, 8)]
    for word in told[1:]:
        follower.do(*_word(word))
    with pytest.raises(KeyError):
        follower.do("verify", (torch.tensor([[3]]), CacheRows(0, [0], [0])))


def _word(told: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    return told[0], told[1:]


def test_what_has_no_room_is_not_told() -> None:
    model, told = led()
    cache = model.make_cache(1, 4)
    with pytest.raises(CapacityError, match="5 tokens of context are needed, the cache holds 4"):
        model.prefill(torch.zeros(1, 5, 256), cache, 0)
    with pytest.raises(CapacityError, match="5 tokens of context are needed"):
        model.verify(torch.ones(1, 5, dtype=torch.long), cache)
    assert len(told) == 1


def test_rows_of_a_pool_that_the_others_do_not_have() -> None:
    model, _ = led()
    cache = KVPool(model.llm.config, 1, 8, torch.float32).take(1)
    with pytest.raises(CapacityError, match="rows of several KV pools were joined"):
        model.verify(torch.ones(1, 1, dtype=torch.long), cache)


class NoGroup:
    """A group that nobody else is in any more."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


def test_a_step_that_breaks_ends_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("tinychat.ranks.lead.speak", lambda group, name, *_: said.append(name))
    leader = Leader(World(0, 2, 0, 2, "", 0), NoGroup())
    model = leader.led(load.load_folder(load.EMBEDDED, Placement(device="cpu"), context=64))
    monkeypatch.setattr(type(model.model), "verify", _breaks)
    cache = model.make_cache(1, 8)
    with pytest.raises(RanksLost) as caught:
        model.verify(torch.ones(1, 1, dtype=torch.long), cache)
    assert caught.value.args == ("the 2 ranks are out of step (no more memory)", "start again")
    leader.end()
    assert said == ["make_cache", "verify"]  # nobody is told to end: nobody would hear it


def _breaks(*_: Any) -> None:
    raise MemoryError("no more memory")


def test_failures_in_the_engine_end_the_run_and_not_the_request() -> None:
    def gone(*_: Any) -> None:
        raise RanksLost("gone", "start again")

    model, _ = led(gone)
    ready = load.load_folder(load.EMBEDDED, Placement(device="cpu"), context=64)
    with pytest.raises(RanksLost):
        assert not any(isinstance(event, Failed) for event in engine_of(ready, model).run(requests()[1:2]))
