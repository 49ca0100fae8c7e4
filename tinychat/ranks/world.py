"""Who is who among the ranks, and how they meet: what torchrun's variables say, a store, and a group of processes."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tinychat import __version__
from tinychat.errors import TinychatError, UsageError

if TYPE_CHECKING:
    from tinychat.placement import Placement

MEETING = timedelta(seconds=120)  # to start Python and torch on a slow machine
PATIENCE = timedelta(days=30)  # between two words: as long as a user may think
LOOK = timedelta(seconds=2)  # at most, between two looks at signals
PORTS = 2**16
VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")
WORD = "word"  # what rank 0 tells those who wait: whether there is something to do
COME, OVER = "come", "over"


@dataclass(frozen=True, slots=True)
class World:
    """This process's place: among all ranks, among those on this machine, and where rank 0 is met."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    def placed(self, placement: Placement, cores: int) -> Placement:
        """Where this rank puts its part: its own GPU, or its share of the cores. Raises UsageError: too few GPUs."""
        import torch

        if placement.main_device.type != "cuda":
            threads = placement.threads or max(1, cores // self.local_size)
            return replace(placement, threads=threads, sharers=self.local_size)
        if (count := torch.cuda.device_count()) < self.local_size:
            message = f"{self.local_size} ranks want a GPU each, torch finds {count}"
            raise UsageError(message, f"give --device cpu, or --tp {max(1, count)}")
        return replace(placement, device=torch.device("cuda", self.local_rank))


def world_of(variables: Mapping[str, str]) -> World | None:
    """The world that torchrun describes by environment variables; None where there is none, or one rank alone.

    Raises UsageError where some of them are missing or make no sense.
    """
    size = _number(variables, "WORLD_SIZE", "1")
    if size == 1:
        return None
    if size == 0:
        raise UsageError("WORLD_SIZE is 0", "unset it, or start by torchrun")
    for name in VARIABLES:
        if not variables.get(name):
            remedy = f"start it by torchrun, or without these variables and with --tp {size}"
            raise UsageError(f"WORLD_SIZE is {size}, and {name} is not set", remedy)
    rank = _number(variables, "RANK")
    if not 0 <= rank < size:
        raise UsageError(f"RANK is {rank} in a world of {size} ranks", f"give 0 to {size - 1}")
    local_rank = _number(variables, "LOCAL_RANK", str(rank))
    local_size = _number(variables, "LOCAL_WORLD_SIZE", str(size))
    port = _number(variables, "MASTER_PORT")
    if not 0 < port < PORTS:
        raise UsageError(f"MASTER_PORT is {port}", f"give 1 to {PORTS - 1}")
    return World(rank, size, local_rank, local_size, variables["MASTER_ADDR"], port)


def asked_ranks(tp: int | None) -> int:
    """How many ranks there are to be: those that torchrun has started, or those of --tp. Raises UsageError."""
    world = world_of(os.environ)
    if world is None:
        return tp or 1
    if tp not in (None, world.size):
        raise UsageError(f"--tp is {tp}, and torchrun has started {world.size} ranks", "leave --tp out")
    return world.size


def _number(variables: Mapping[str, str], name: str, default: str = "") -> int:
    text = variables.get(name) or default
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r}, not a number", "start it by torchrun, or unset it and give --tp")
    return int(text)


def open_store(world: World) -> Any:
    """The store by which the ranks find each other: torchrun's, or rank 0's own. Raises TinychatError."""
    import torch.distributed

    dist: Any = torch.distributed
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = world.rank == 0 and not by_agent
    try:
        socket.getaddrinfo(world.address, world.port)
    except OSError as error:
        message = f"MASTER_ADDR is {world.address!r}, which has no address ({error.strerror})"
        raise UsageError(message, "give rank 0's host name or address") from error
    end = time.monotonic() + MEETING.total_seconds()
    while True:
        try:
            store = dist.TCPStore(world.address, world.port, world.size, hosts, LOOK, wait_for_workers=False)
            return dist.PrefixStore(f"tinychat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        except (dist.DistError, RuntimeError, ValueError) as error:
            if not hosts and time.monotonic() < end:
                continue  # rank 0 may be on its way
            doing = "offer" if hosts else "reach"
            message = f"rank {world.rank} cannot {doing} {world.address}:{world.port} ({_first_line(error)})"
            raise TinychatError(message, "check MASTER_ADDR and MASTER_PORT, and that rank 0 is running") from error


def told(store: Any, name: str, patience: timedelta) -> str | None:
    """What another rank has written under a name, as soon as it has; None after so long. Raises RuntimeError."""
    end = time.monotonic() + patience.total_seconds()
    while not store.check([name]):  # waiting in the store itself would keep signals waiting too
        if time.monotonic() > end:
            return None
        time.sleep(0.05)
    return store.get(name).decode()


def meet(world: World, store: Any) -> Any:
    """The group of all ranks (gloo, and NCCL for what is on GPUs). Raises TinychatError: somebody is missing, or
    runs another version of torch or of ours."""
    import torch
    import torch.distributed as dist

    store.set(f"facts/{world.rank}", json.dumps(facts()))
    check_facts([_facts_of(store, world, rank) for rank in range(world.size)])
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    except RuntimeError as error:
        message = f"the {world.size} ranks cannot talk to each other ({_first_line(error)})"
        raise TinychatError(message, "check the network between their machines") from error
    return dist.group.WORLD


def facts() -> dict[str, str]:
    """What must be the same on all ranks."""
    import torch

    return {"torch": torch.__version__.partition("+")[0], "tinychat": __version__, "machine": platform.node()}


def check_facts(found: list[dict[str, str]]) -> None:
    """Raises TinychatError where a rank has another version than rank 0."""
    for rank, theirs in enumerate(found):
        for name in ("torch", "tinychat"):
            if theirs[name] != found[0][name]:
                message = (
                    f"rank {rank} (on {theirs['machine']}) runs {name} {theirs[name]}, "
                    f"rank 0 (on {found[0]['machine']}) {name} {found[0][name]}"
                )
                raise TinychatError(message, "install the same version for all ranks")


def _facts_of(store: Any, world: World, rank: int) -> dict[str, str]:
    try:
        found = told(store, f"facts/{rank}", MEETING)
    except RuntimeError as error:
        raise TinychatError(f"the other ranks are gone ({_first_line(error)})", "start again") from error
    if found is not None:
        return json.loads(found)
    came = sum(store.check([f"facts/{one}"]) for one in range(world.size))
    message = f"{came} of {world.size} ranks came within {MEETING.seconds} s, rank {rank} did not"
    raise TinychatError(message, "start all of them, with the same MASTER_ADDR and MASTER_PORT")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
