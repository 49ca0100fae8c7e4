"""How rank 0 comes to lead: the others are started by torchrun, or by itself for --tp."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from tinychat.ranks.launch import HERE, Launched, Lost
from tinychat.ranks.lead import Leader
from tinychat.ranks.world import COME, MEETING, OVER, WORD, World, meet, open_store, world_of

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
    served = dist.TCPStore(HERE, 0, size, True, MEETING, wait_for_workers=False)
    world = World(0, size, 0, size, HERE, served.port)
    started = Launched(size, served.port, lost)
    store = dist.PrefixStore("tinychat/0", served)
    store.set(WORD, COME)
    try:
        return Leader(world, meet(world, store), started)
    except BaseException:
        started.end(at_once=True)
        raise
