"""--tp and torchrun as a user runs them: real processes, a real terminal, and ranks that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from terminal.pseudo import ENTER, Terminal

from tinychat import load

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

PICTURE = str(Path(load.EMBEDDED).parent / "samples" / "word.png")
ASK = ("ask", "What is in the picture?", PICTURE, "--json")
PATIENCE = 60
NOTICED = 10  # seconds


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=2 * PATIENCE)


def test_two_ranks_answer_like_one() -> None:
    one, two = (run("-m", "tinychat", *ASK, "--tp", ranks) for ranks in ("1", "2"))
    assert (one.returncode, two.returncode, two.stderr) == (0, 0, "")
    assert json.loads(two.stdout)["text"] == json.loads(one.stdout)["text"] == "The word CAT in red."


def chat(tmp_path: Path) -> Terminal:
    """A chat of two ranks, after which the shell says whether keys are echoed."""
    script = (
        f"'{sys.executable}' -m tinychat chat --tp 2; echo \"code $?\"; stty -a | grep -wo -e '-echo' || echo echoes"
    )
    cache = f"TINYCHAT_CACHE={os.environ['TINYCHAT_CACHE']}"
    terminal = Terminal(tmp_path, "/usr/bin/env", cache, "/bin/sh", "-c", script)
    terminal.wait(lambda shown: shown.endswith("\n>"))
    return terminal


def others(process: psutil.Process) -> list[psutil.Process]:
    """The ranks that a process has started."""
    return [one for one in process.children(recursive=True) if "tinychat.ranks.follow" in one.cmdline()[-1]]


@pytest.mark.parametrize(
    ("victim", "number", "said"),
    [
        (1, signal.SIGKILL, "error: rank 1 was ended by SIGKILL, perhaps for lack of memory"),
        (0, signal.SIGTERM, "error: rank 0 was told to end"),
    ],
)
def test_a_rank_that_ends_takes_the_chat_with_it_and_nothing_is_lost(
    tmp_path: Path, victim: int, number: signal.Signals, said: str
) -> None:
    terminal = chat(tmp_path)
    terminal.type(f"hello{ENTER}")
    terminal.see("Hello!")
    terminal.ready()
    ranks = psutil.Process(terminal.child.pid).children(recursive=True)
    (first,) = [one for one in ranks if one.cmdline()[1:4] == ["-m", "tinychat", "chat"]]
    (other,) = others(first)
    (first, other)[victim].send_signal(number)
    shown = terminal.see("echo").replace("\n", " ")
    assert said in shown
    assert "the conversation is saved: /load lost-20" in shown
    assert "code 1 echoes" in shown
    assert terminal.ends_with() == 0
    assert psutil.wait_procs([other], NOTICED)[1] == []


def listening(*processes: psutil.Process) -> set[str]:
    """Addresses at which processes let others connect."""
    found = [one.laddr.ip for process in processes for one in process.net_connections("tcp") if one.status == "LISTEN"]
    assert found, "the ranks are connected somehow"
    return set(found)


def test_the_others_end_with_rank_0() -> None:
    command = [sys.executable, "-m", "tinychat", "chat", "--plain", "--tp", "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        started.stdin.write(b"hello\n")
        started.stdin.flush()
        assert started.stdout.readline() == b"Hello!\n"
        left = others(psutil.Process(started.pid))
        assert len(left) == 1
        assert listening(psutil.Process(started.pid), *left) <= {"127.0.0.1", "::1"}
        started.send_signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs(left, NOTICED)
        assert (len(gone), alive) == (1, [])


@pytest.mark.parametrize("seconds", [0.5, pytest.param(3.0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_early(seconds: float) -> None:
    command = [sys.executable, "-m", "tinychat", "chat", "--plain", "--tp", "2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as started:
        end = time.monotonic() + PATIENCE
        while not (found := others(psutil.Process(started.pid))) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(seconds)  # it imports torch, or loads
        found[0].kill()
        started.wait(NOTICED)
        _, said = started.communicate()
        assert started.returncode == 1
        assert said.count("error: rank 1 was ended by SIGKILL") == 1
        assert "Traceback" not in said


@pytest.mark.slow
def test_torchrun_starts_the_ranks() -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tinychat")
    answered = run(*torchrun, *ASK)
    assert answered.returncode == 0
    assert json.loads(answered.stdout)["text"] == "The word CAT in red."
    for verb in ("doctor", "--version", "--help"):  # which need no other rank
        assert run(*torchrun, verb).returncode == 0
    wrong = run(*torchrun, "ask", "hi", "--tp", "4")
    assert wrong.returncode == 1
    assert "error: --tp is 4, and torchrun has started 2 ranks; leave --tp out" in wrong.stderr
