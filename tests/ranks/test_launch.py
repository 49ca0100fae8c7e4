"""The other ranks' processes: started with their place in the world, watched, and not left behind."""

from __future__ import annotations

import os
import queue
import signal
from pathlib import Path

import pytest

from tinychat.ranks.launch import Launched, how_it_ended

WAITS = "import sys; sys.stdin.read()"
PATIENCE = 20


def test_a_rank_that_ends_early_takes_the_others_with_it() -> None:
    told: queue.Queue[str] = queue.Queue()
    code = f"import os, sys\nif os.environ['RANK'] == '2': sys.exit(3)\n{WAITS}"
    launched = Launched(4, 1, told.put, code)
    assert told.get(timeout=PATIENCE) == "rank 2 ended with code 3, and the others with it; start again"
    assert [process.wait(PATIENCE) for process in launched.processes] == [-signal.SIGKILL, 3, -signal.SIGKILL]
    launched.end()
    assert told.empty()


def test_a_rank_that_is_killed() -> None:
    told: queue.Queue[str] = queue.Queue()
    launched = Launched(2, 1, told.put, WAITS)
    launched.processes[0].kill()
    said = (
        "rank 1 was ended by SIGKILL, perhaps for lack of memory, and the others with it; free memory or give a smaller"
    )
    assert told.get(timeout=PATIENCE) == f"{said} --context, and start again"
    launched.end()


def test_ranks_know_their_place() -> None:
    told: queue.Queue[str] = queue.Queue()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = (
        f"import os, sys\nsys.exit([os.environ[name] for name in {names}] != ['1', '2', '1', '2', '127.0.0.1', '77'])"
    )
    launched = Launched(2, 77, told.put, code)
    assert launched.processes[0].wait(PATIENCE) == 0
    launched.end()


@pytest.mark.parametrize("at_once", [False, True])
def test_nobody_is_left_at_the_end(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinychat.ranks.launch.GRACE", 0.1)
    told: queue.Queue[str] = queue.Queue()
    launched = Launched(3, 1, told.put, "import time; time.sleep(600)")
    launched.end(at_once)
    assert [process.poll() for process in launched.processes] == [-signal.SIGKILL] * 2
    assert told.empty()


def test_how_a_process_ended_in_words() -> None:
    assert how_it_ended(3) == "ended with code 3"
    assert how_it_ended(-signal.SIGTERM) == "was ended by SIGTERM"
    assert how_it_ended(-99) == "was ended by signal 99"


def test_a_rank_looks_for_modules_where_rank_0_does_and_not_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenize.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    told: queue.Queue[str] = queue.Queue()
    launched = Launched(2, 1, told.put, "import tokenize, tinychat")
    assert launched.processes[0].wait(PATIENCE) == 0
    launched.end()


def test_ctrl_c_is_not_for_the_other_ranks() -> None:
    told: queue.Queue[str] = queue.Queue()
    launched = Launched(2, 1, told.put, WAITS)
    assert os.getpgid(launched.processes[0].pid) != os.getpgrp()
    launched.end(at_once=True)
