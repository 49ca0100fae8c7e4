"""How rank 0 comes to lead: the others are started by torchrun, or by itself for --tp."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from tinychat.ranks.launch import HERE, Launched, Lost
from tinychat.ranks.lead import Leader
from tinychat.ranks.world import COME, MEETING, OVER, WORD, World, meet, open_store, world_of

GLOO = "GLOO_SOCKET_IFNAME"
PARTING = timedelta(seconds=10)


def leader(tp: int | None, lost: Lost) -> Leader:
    """The leader of the ranks that torchrun has started, else of `tp` that are started here.

    `lost` is told, from another thread, when one of these ends before its time. Raises TinychatError where the ranks
    do not come together.
    """
    world = world_of(os.environ)
    if world is None:
        assert tp is not None
        return _launched(tp, lost)
    store = open_store(world)
    store.set(WORD, COME)
    return Leader(world, meet(world, store))


def dismiss(world: World) -> None:
    """Tell ranks that torchrun has started, where nobody has led them, that there is nothing to do."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    store = open_store(world)
    store.set(WORD, OVER)
    store.wait([f"bye/{rank}" for rank in range(1, world.size)], PARTING)


def _launched(size: int, lost: Lost) -> Leader:
    import torch.distributed

    dist: Any = torch.distributed
    listening = socket.create_server((HERE, 0))  # torch by itself would listen on every interface
    port = listening.getsockname()[1]
    with on_loopback():
        served = dist.TCPStore(
            HERE, port, size, True, MEETING, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        world, started = World(0, size, 0, size, HERE, port), Launched(size, port, lost)
        store = dist.PrefixStore("tinychat/0", served)
        store.set(WORD, COME)
        try:
            return Leader(world, meet(world, store), started)
        except BaseException:
            started.end(at_once=True)
            raise


@contextmanager
def on_loopback() -> Iterator[None]:
    """Within it gloo, here and in processes that are started, talks by the loopback interface alone."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    chosen = GLOO not in os.environ and bool(names)
    if chosen:
        os.environ[GLOO] = names[0]
    try:
        yield
    finally:
        if chosen:
            del os.environ[GLOO]
