"""The ranks of --tp: rank 0 starts the others on this machine, watches them, and leaves none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from tinychat.ranks.world import World

HERE = "127.0.0.1"
GRACE = 5.0  # seconds for a rank to end by itself
FOLLOW = "from tinychat.ranks.follow import main; raise SystemExit(main())"
Lost = Callable[[str], None]


class Launched:
    """The processes of ranks 1 to size - 1. `lost` is told, from another thread, when one ends before its time."""

    def __init__(self, size: int, port: int, lost: Lost, code: str = FOLLOW) -> None:
        self._lost = lost
        self._ending = threading.Event()
        self._once = threading.Lock()
        self.processes = [_start(World(rank, size, rank, size, HERE, port), code) for rank in range(1, size)]
        for rank, process in enumerate(self.processes, 1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def expect_end(self) -> None:
        """From now on a rank may end."""
        self._ending.set()

    def end(self, at_once: bool = False) -> None:
        """Wait for all to end, for a moment; then they are made to."""
        self.expect_end()
        for process in self.processes:
            if at_once:
                process.kill()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self._ending.is_set() or not self._once.acquire(blocking=False):
            return
        for other in self.processes:
            other.kill()
        self._lost(f"rank {rank} {how_it_ended(code)}, and the others with it; {what_to_do(code)}")


def how_it_ended(code: int) -> str:
    """A process's end in words, from its code as subprocess gives it."""
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    perhaps = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
    return f"was ended by {name}{perhaps}"


def what_to_do(code: int) -> str:
    return "free memory or give a smaller --context, and start again" if code == -signal.SIGKILL else "start again"


def _start(world: World, code: str) -> subprocess.Popen[bytes]:
    described = {
        "RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size, "MASTER_ADDR": world.address, "MASTER_PORT": world.port,
    }  # fmt: skip
    variables = {**os.environ, **{name: str(value) for name, value in described.items()}}
    paths = f"import sys; sys.path[:] = {sys.path!r}; "  # those of this process, and no folder that it happens to be in
    command = [sys.executable, "-c", paths + code]
    return subprocess.Popen(  # its session is its own: Ctrl-C is for rank 0
        command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
