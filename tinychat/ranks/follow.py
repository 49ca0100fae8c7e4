"""Every rank but the first: it waits for what rank 0 says, and does that with its part of the model.

`main` is what rank 0 starts for --tp; torchrun starts the command itself on every rank.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from tinychat.errors import TinychatError
from tinychat.layers.local_ranks import gathered
from tinychat.ranks.lead import Order, check_loading, load_part
from tinychat.ranks.led import FollowedModel
from tinychat.ranks.words import leave, listen
from tinychat.ranks.world import COME, OVER, PATIENCE, WORD, World, meet, open_store, told, world_of

LOST = 1


def follow(world: World) -> int:
    """Wait until rank 0 calls, and follow it to the end of this process. Raises TinychatError.

    Comes back, with an exit code, only where rank 0 has no need of others.
    """
    store = open_store(world)
    try:
        word = told(store, WORD, PATIENCE)
    except RuntimeError as error:
        raise TinychatError(f"rank 0 ended, and rank {world.rank} with it", "start again") from error
    if word != COME:
        store.set(f"bye/{world.rank}", OVER)
        return 0
    code = serve(world, meet(world, store))
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may still hold a tensor, which they cannot let go while Python is shut down


def serve(world: World, group: Any) -> int:
    """Do what rank 0 says until it says that this is all."""
    model: FollowedModel | None = None
    while True:
        try:
            name, arguments = listen(group)
            if name == "end":
                leave()
                return 0
            if name == "load":
                model = _load(arguments[0], world, group)
            elif model is not None:
                model.do(name, arguments)
        except TinychatError:
            continue  # rank 0 has it too, and tells the user
        except RuntimeError as error:
            if "onnection" not in str(error):
                raise
            raise TinychatError(f"another rank ended, and rank {world.rank} with it", "start again") from error


def _load(order: Order, world: World, group: Any) -> FollowedModel | None:
    ready, loading = load_part(order, world, group)
    check_loading(gathered(group, loading))
    return None if ready is None else FollowedModel(ready.model)


def main() -> int:
    """A rank that was started for --tp: it ends with the one that started it. Whatever fails is one line."""
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    world = world_of(os.environ)
    assert world is not None
    try:
        return follow(world)
    except TinychatError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except Exception as error:  # noqa: BLE001  # the last resort of this process
        what = ": ".join(part for part in (type(error).__name__, next(iter(str(error).splitlines()), "")) if part)
        sys.stderr.write(f"error: rank {world.rank} failed ({what}); start again\n")
        sys.stderr.flush()
        os._exit(LOST)  # as above: gloo's threads


def _end_with_rank_0() -> None:
    """Rank 0 holds the other end of standard input: it is closed when rank 0 is gone, however that came."""
    while os.read(sys.stdin.fileno(), 1):  # nothing ever comes
        pass
    os._exit(LOST)
