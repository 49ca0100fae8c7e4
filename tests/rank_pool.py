"""Processes that play the ranks of a tensor-parallel group in tests: started once, used by every test that needs some.

`run(size, function, *arguments)` calls `function(group, *arguments)` on each of so many ranks (gloo) and gives what
they returned, rank 0's first. The function lies in a test module, and everything is pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

MOST = 4
Task = tuple[list[str], bytes, int, int, str]


class Rank:
    """A member of a group that talks to nobody."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class RankPool:
    """Up to four processes, each started when a test first needs so many."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._ends: list[Any] = []
        self._processes: list[Any] = []

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned. Raises AssertionError with the trace of the first rank that failed."""
        self._start(size)
        call = pickle.dumps((function, arguments))
        with tempfile.TemporaryDirectory() as folder:
            for rank, end in enumerate(self._ends[:size]):
                end.send((sys.path, call, rank, size, str(Path(folder, "store"))))
            answers = [end.recv() for end in self._ends[:size]]
        failed = [f"rank {rank}:\n{trace}" for rank, (right, trace) in enumerate(answers) if not right]
        assert not failed, "\n".join(failed)
        return [pickle.loads(value) for _, value in answers]  # noqa: S301

    def _start(self, size: int) -> None:
        while len(self._processes) < size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def pool() -> Iterator[RankPool]:
    ranks = RankPool()
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(end: Any) -> None:
    """One rank: tasks in, results or traces out, until the pipe is closed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            task: Task = end.recv()
        except EOFError:
            return
        end.send(_answer(*task))


def _answer(path: Sequence[str], call: bytes, rank: int, size: int, store: str) -> tuple[bool, Any]:
    import torch.distributed as dist

    sys.path[:] = path
    try:
        function, arguments = pickle.loads(call)  # noqa: S301  # our own test sent it
        shared = vars(dist)["FileStore"](store, size)
        dist.init_process_group("gloo", store=shared, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        try:
            return True, pickle.dumps(function(dist.group.WORLD, *arguments))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  # told to the test
        return False, traceback.format_exc()
