"""A program in a process of its own, from the benchmark's side: opened, asked, stopped while others are measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peers.protocol import Facts, Json, Setup

SCRIPTS = Path(__file__).parents[1]
OURS = (SCRIPTS.parent, SCRIPTS.parent / "kernels")  # of this very tree, whatever tree is installed


@dataclass(frozen=True)
class Peer:
    """A program that can be opened: its name, its module here, the environment it lives in, its options.

    `files` are the names that must lie in the benchmark's folder.
    """

    name: str
    module: str
    environment: str
    options: Json = field(default_factory=dict)
    files: tuple[str, ...] = ()


class PeerError(Exception):
    """A program that is not there, or that failed; the message is its own."""


class Process:
    """An open program. While nobody asks it anything it is stopped, whatever its threads would like to do."""

    def __init__(self, peer: Peer, python: Path, setup: Setup) -> None:
        if not python.exists():
            raise PeerError(f"there is no {python}: scripts/setup_peers makes it")
        log = Path(setup.folder) / f"{peer.name.replace('/', ' ')}.log"
        threads = str(setup.threads)
        path = os.pathsep.join(map(str, (SCRIPTS, *(OURS if peer.environment == "own" else ()))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        self.peer = peer
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", f"peers.{peer.module}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                cwd=setup.folder,
            )  # fmt: skip
        self.stopped = False
        try:
            answer = self._ask(asdict(setup))
        except PeerError:
            self.close()
            raise
        self.facts = Facts(**{**answer, "kinds": tuple(answer["kinds"])})

    def run(self, kind: str, tokens: int, depth: int) -> float:
        """Tokens a second. Raises PeerError."""
        answer = self._ask({"kind": kind, "tokens": tokens, "depth": depth})
        return answer["tokens"] / answer["seconds"]

    def peak_memory(self) -> int:
        """The most bytes that the process has held."""
        status = Path(f"/proc/{self.process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._wake()
        self.process.kill()
        with suppress(BrokenPipeError):  # a question that it never read
            self.process.communicate()

    def _wake(self) -> None:
        if self.stopped:
            self.process.send_signal(signal.SIGCONT)
            self.stopped = False

    def _ask(self, question: Json) -> Json:
        """The answer, after which the process is stopped. Raises PeerError with what it says is wrong."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        self._wake()
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            raise PeerError(f"it ended with code {self.process.wait()}; its log says why")
        self.process.send_signal(signal.SIGSTOP)
        self.stopped = True
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer
