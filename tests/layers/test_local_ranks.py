"""Sums through memory over processes: their bits, who may have them, and what becomes of those who lose another."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import Tensor

from tinychat.layers import local_ranks
from tinychat.layers.local_ranks import LocalRanks
from tinychat.layers.parallel import ALONE, joined, total
from tinychat_kernels import cpu, cpu_ranks

available, reason = cpu.available()
runs_here = pytest.mark.skipif(not available or sys.platform != "linux", reason=reason)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE = cpu_ranks.PIECE
SIZES = (1, 3, 2048, 4097, PIECE // 4, PIECE // 4 + 1, 3 * PIECE // 2 + 5)
ROOT = Path(__file__).parents[2]


def addend(seed: int, rank: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def in_order(seed: int, ranks: int, size: int, dtype: torch.dtype) -> Tensor:
    result = addend(seed, 0, size, dtype).float()
    for rank in range(1, ranks):
        result += addend(seed, rank, size, dtype).float()
    return result.to(dtype)


def sums(group: Any) -> list[str]:
    """What is wrong with sums of all sizes and dtypes, and with parts of unequal width."""
    members = LocalRanks.of(group)
    assert isinstance(members, LocalRanks)
    rank, ranks = members.rank(), members.size()
    assert (rank, ranks) == (group.rank(), group.size())
    wrong: list[str] = []
    for seed, (dtype, size) in enumerate((dtype, size) for dtype in DTYPES for size in SIZES):
        x = addend(seed, rank, size, dtype)
        found = total(x, members)
        if found.data_ptr() != x.data_ptr() or not torch.equal(found, in_order(seed, ranks, size, dtype)):
            wrong.append(f"sum of {size} {dtype}")
        widths = [max(1, size // 100 + 7 * one) for one in range(ranks)]
        parts = [addend(seed, one, 3 * width, dtype).view(3, width) for one, width in enumerate(widths)]
        if not torch.equal(joined(parts[rank], widths, members), torch.cat(parts, -1)):
            wrong.append(f"join of {widths} {dtype}")
    return wrong


@runs_here
@pytest.mark.parametrize("size", [2, 4])
def test_sums_have_the_same_bits_on_all_ranks(ranks: RankPool, size: int) -> None:
    assert ranks.run(size, sums) == [[]] * size


def many(group: Any, calls: int) -> int:
    members = LocalRanks.of(group)
    choose, wrong = random.Random(0), 0
    for seed in range(calls):
        size, dtype = choose.choice((choose.randrange(1, 100), choose.randrange(1, 20000))), choose.choice(DTYPES)
        x = total(addend(seed, members.rank(), size, dtype), members)
        wrong += not torch.equal(x, in_order(seed, members.size(), size, dtype))
        if choose.random() < 0.02:
            time.sleep(choose.random() * 0.003 * members.rank())
    return wrong


@runs_here
@pytest.mark.parametrize("size", [2, 4])
def test_thousands_of_calls_in_a_row(ranks: RankPool, size: int) -> None:
    assert ranks.run(size, many, 2000) == [0] * size


def of_other_kinds(group: Any) -> list[Any]:
    members = LocalRanks.of(group)
    whole = total(torch.full((5,), 2 + group.rank()), members)
    turned = total(torch.arange(6.0).view(2, 3).T, members)
    bits = joined(torch.full((2, 1 + group.rank()), bool(group.rank())), [1, 2], members)
    learned = total(torch.ones(2, requires_grad=True) * 1, members)
    return [whole.tolist(), turned.tolist(), bits.tolist(), learned.requires_grad]


@runs_here
def test_other_tensors_go_through_the_process_group_or_are_copied(ranks: RankPool) -> None:
    expected = [[5] * 5, [[0.0, 6.0], [2.0, 8.0], [4.0, 10.0]], [[False, True, True]] * 2, False]
    assert ranks.run(2, of_other_kinds) == [expected] * 2


def fails_on_one(group: Any, what: str) -> tuple[bool, list[float], list[str]]:
    """Rank 1 cannot do what is named; then all take the process group."""
    at = 0 if what == "_made" else 1
    patch = pytest.MonkeyPatch()
    if group.rank() == at:
        patch.setattr(*BROKEN[what])
    members = LocalRanks.of(group)
    patch.undo()
    sum_of_all = total(torch.ones(2), members).tolist()
    return members is group, sum_of_all, [path.name for path in local_ranks.SHARED.glob(f"tinychat-{os.getpid()}-*")]


def no_room(*_: Any) -> None:
    raise OSError(28, "No space left on device")


BROKEN: dict[str, tuple[Any, str, Any]] = {
    "kernels": (cpu, "available", lambda: (False, "no compiler")),
    "machine": (local_ranks.socket, "gethostname", lambda: "another"),
    "proc": (local_ranks, "BOOT", Path("/nowhere")),
    "opening": (local_ranks.os, "open", no_room),
    "process": (local_ranks, "_who_is_gone", lambda places: "rank 0 is not to be seen"),
    "mark": (local_ranks, "mark_of", lambda rank: slice(0, 16)),
    "_made": (local_ranks.os, "posix_fallocate", no_room),
}


@runs_here
@pytest.mark.parametrize("what", BROKEN)
def test_all_or_nobody(ranks: RankPool, what: str) -> None:
    assert ranks.run(2, fails_on_one, what) == [(True, [2.0, 2.0], [])] * 2


def unwanted_by_one(group: Any) -> bool:
    return LocalRanks.of(group, wanted=group.rank() == 0) is group


def test_one_that_does_not_want_to_is_heard(ranks: RankPool) -> None:
    assert ranks.run(2, unwanted_by_one) == [True, True]


def test_what_is_no_process_group_stays_as_it_is() -> None:
    assert LocalRanks.of(ALONE) is ALONE


def leaves_nothing(group: Any) -> list[str]:
    members = LocalRanks.of(group)
    assert total(torch.ones(1), members).tolist() == [2.0]
    mapped = "/dev/shm/tinychat-" in Path("/proc/self/maps").read_text()
    files = [path.name for path in local_ranks.SHARED.glob(f"tinychat-{os.getpid()}-*")]
    del members
    return [*files, f"mapped {mapped}", f"still {'/dev/shm/tinychat-' in Path('/proc/self/maps').read_text()}"]


@runs_here
def test_the_memory_has_no_name_and_goes_with_the_group(ranks: RankPool) -> None:
    assert ranks.run(2, leaves_nothing) == [["mapped True", "still False"]] * 2


def interrupted(group: Any) -> list[str]:
    """Rank 0 waits, and is sent a signal meanwhile."""
    members, heard = LocalRanks.of(group), []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(signal.Signals(number).name)
        if len(heard) == 2:
            raise KeyboardInterrupt

    if group.rank() == 1:
        time.sleep(1)
        total(torch.ones(1), members)
        time.sleep(1)
        return []
    before = signal.signal(signal.SIGALRM, hear)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        total(torch.ones(1), members)
        assert heard == ["SIGALRM"]
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            total(torch.ones(1), members)
        except KeyboardInterrupt:
            heard.append("ended")
        try:
            total(torch.ones(1), members)
        except RuntimeError as error:
            heard.append(str(error))
    finally:
        signal.signal(signal.SIGALRM, before)
    return heard


@runs_here
def test_signals_are_handled_while_others_are_waited_for(ranks: RankPool) -> None:
    said = "a call over the ranks was broken off before this one: they are out of step"
    assert ranks.run(2, interrupted)[0] == ["SIGALRM", "SIGALRM", "ended", said]


LOSES = """
import os, signal, sys, time
import torch, torch.distributed as dist
from tinychat.layers.local_ranks import LocalRanks
from tinychat.layers.parallel import total

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
members = LocalRanks.of(dist.group.WORLD)
assert isinstance(members, LocalRanks)
for turn in range(100):
    if (rank, turn) == (1, 50):
        os.kill(os.getpid(), signal.SIGKILL)
    total(torch.ones(2048), members)
"""


@runs_here
def test_a_rank_that_is_killed_in_the_midst_ends_the_other(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", LOSES, str(rank), str(tmp_path / "store")],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    )  # fmt: skip
    try:
        said = first.communicate(timeout=60)[1]
    finally:
        first.kill()
        second.communicate(timeout=60)  # a zombie until now
    assert first.returncode == 1
    assert said.rstrip().endswith("RuntimeError: the connection to rank 1 is gone: its process has ended")
    assert second.returncode == -signal.SIGKILL
