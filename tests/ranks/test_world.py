"""Who is who: torchrun's variables, versions that must agree, ranks that do not come, and where a rank's part goes."""

from __future__ import annotations

import signal
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed

from tinychat.errors import TinychatError, UsageError
from tinychat.placement import Placement
from tinychat.ranks import world as worlds
from tinychat.ranks.world import World, asked_ranks, check_facts, facts, meet, open_store, told, world_of

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here"}
FREE = {"MASTER_PORT": "29500"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_torchruns_variables_describe_a_world() -> None:
    assert world_of({**WHOLE, **FREE}) == World(1, 4, 1, 2, "here", 29500)
    assert world_of({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}) == World(
        1, 2, 1, 2, "a", 1
    )


@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_one_rank_is_no_world(variables: dict[str, str]) -> None:
    assert world_of(variables) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "WORLD_SIZE is 4, and MASTER_PORT is not set; start it by torchrun, or without these variables and with"),
        ({**FREE, "RANK": ""}, "WORLD_SIZE is 4, and RANK is not set"),
        ({**FREE, "MASTER_ADDR": ""}, "WORLD_SIZE is 4, and MASTER_ADDR is not set"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x', not a number; start it by torchrun, or unset it and give --tp"),
        ({**FREE, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({**FREE, "RANK": "4"}, "RANK is 4 in a world of 4 ranks; give 0 to 3"),
        ({**FREE, "WORLD_SIZE": "0"}, "WORLD_SIZE is 0; unset it, or start by torchrun"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536; give 1 to 65535"),
    ],
)
def test_a_world_that_makes_no_sense(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        world_of({**WHOLE, **changes})


def test_tp_and_torchrun_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (asked_ranks(None), asked_ranks(3)) == (1, 3)
    for name, value in {**WHOLE, **FREE}.items():
        monkeypatch.setenv(name, value)
    assert asked_ranks(4) == asked_ranks(None) == 4
    with pytest.raises(UsageError, match="--tp is 2, and torchrun has started 4 ranks; leave --tp out"):
        asked_ranks(2)


def test_every_rank_needs_the_same_versions() -> None:
    here = facts()
    assert here["torch"] == torch.__version__.partition("+")[0]
    check_facts([here, dict(here)])
    words = (
        rf"rank 1 \(on b\) runs torch 2.6.0, rank 0 \(on {here['machine']}\) torch {here['torch']}; install the same"
    )
    with pytest.raises(TinychatError, match=words):
        check_facts([here, {**here, "torch": "2.6.0", "machine": "b"}])
    with pytest.raises(TinychatError, match="rank 2 .* runs tinychat 9"):
        check_facts([here, here, {**here, "tinychat": "9"}])


def test_ranks_of_other_versions_are_told_so_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    store = vars(torch.distributed)["HashStore"]()
    other = {**facts(), "torch": "2.6.0"}
    store.set("facts/1", str(other).replace("'", '"'))
    with pytest.raises(TinychatError, match=r"rank 1 \(on .*\) runs torch 2.6.0"):
        meet(World(0, 2, 0, 2, "127.0.0.1", 0), store)


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "MEETING", timedelta(seconds=1))
    world = World(0, 3, 0, 3, "127.0.0.1", free_port())
    store = open_store(world)
    with pytest.raises(TinychatError, match="1 of 3 ranks came within 1 s, rank 1 did not; start all of them"):
        meet(world, store)


def test_nobody_answers_where_rank_0_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "MEETING", timedelta(seconds=1))
    monkeypatch.setattr(worlds, "LOOK", timedelta(seconds=1))
    port = free_port()
    with pytest.raises(TinychatError, match=rf"rank 1 cannot reach 127.0.0.1:{port} .*; check MASTER_ADDR and MASTER"):
        open_store(World(1, 2, 1, 2, "127.0.0.1", port))


def test_a_name_that_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    words = (
        r"MASTER_ADDR is 'no.such.host', which has no address \(Name or service not known\); give rank 0's host name"
    )
    with pytest.raises(UsageError, match=words):
        open_store(World(0, 2, 0, 2, "no.such.host", 1))


def test_whoever_waits_for_a_rank_hears_signals() -> None:
    class Interrupted:
        def check(self, names: list[str]) -> bool:
            signal.raise_signal(signal.SIGINT)
            return False

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            told(Interrupted(), "facts/1", timedelta(seconds=60))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(TinychatError, match=rf"rank 0 cannot offer 127.0.0.1:{port}"):
            open_store(World(0, 2, 0, 2, "127.0.0.1", port))


def placed(local_size: int, **options: Any) -> Placement:
    return World(1, 4, 1, local_size, "", 0).placed(Placement(**options), cores=8)


def test_ranks_of_a_machine_share_its_cores_and_memory() -> None:
    found = placed(2, device="cpu")
    assert (found.threads, found.sharers) == (4, 2)
    assert placed(16, device="cpu").threads == 1
    assert placed(2, device="cpu", threads=3).threads == 3


def test_ranks_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placed(2, device="cuda").device == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="4 ranks want a GPU each, torch finds 2; give --device cpu, or --tp 2"):
        placed(4, device="cuda")
