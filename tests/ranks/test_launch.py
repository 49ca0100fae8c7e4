"""The other ranks' processes: started with their place in the world, watched, and not left behind."""

from __future__ import annotations

import queue
import signal
import sys

import pytest

from tinychat.ranks.launch import Launched, how_it_ended

WAITS = "import sys; sys.stdin.read()"
PATIENCE = 20


def command(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_rank_that_ends_early_takes_the_others_with_it() -> None:
    told: queue.Queue[str] = queue.Queue()
    code = f"import os, sys\nif os.environ['RANK'] == '2': sys.exit(3)\n{WAITS}"
    launched = Launched(4, 1, told.put, command(code))
    assert told.get(timeout=PATIENCE) == "rank 2 ended with code 3, and the others with it"
    assert [process.wait(PATIENCE) for process in launched.processes] == [-signal.SIGKILL, 3, -signal.SIGKILL]
    launched.end()
    assert told.empty()


def test_a_rank_that_is_killed() -> None:
    told: queue.Queue[str] = queue.Queue()
    launched = Launched(2, 1, told.put, command(WAITS))
    launched.processes[0].kill()
    assert (
        told.get(timeout=PATIENCE) == "rank 1 was ended by SIGKILL, perhaps for lack of memory, and the others with it"
    )
    launched.end()


def test_ranks_know_their_place() -> None:
    told: queue.Queue[str] = queue.Queue()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = (
        f"import os, sys\nsys.exit([os.environ[name] for name in {names}] != ['1', '2', '1', '2', '127.0.0.1', '77'])"
    )
    launched = Launched(2, 77, told.put, command(code))
    assert launched.processes[0].wait(PATIENCE) == 0
    launched.end()


@pytest.mark.parametrize("at_once", [False, True])
def test_nobody_is_left_at_the_end(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinychat.ranks.launch.GRACE", 0.1)
    told: queue.Queue[str] = queue.Queue()
    launched = Launched(3, 1, told.put, command("import time; time.sleep(600)"))
    launched.end(at_once)
    assert [process.poll() for process in launched.processes] == [-signal.SIGKILL] * 2
    assert told.empty()


def test_how_a_process_ended_in_words() -> None:
    assert how_it_ended(3) == "ended with code 3"
    assert how_it_ended(-signal.SIGTERM) == "was ended by SIGTERM"
    assert how_it_ended(-99) == "was ended by signal 99"
