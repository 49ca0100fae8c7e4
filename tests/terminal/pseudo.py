"""A real terminal for tests: a pseudo-terminal whose screen pyte keeps, with keys pressed as a user presses them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte

PATIENCE = 30
ENTER, CTRL_C, CTRL_D, TAB = "\r", "\x03", "\x04", "\t"


class Terminal:
    """A command in a pseudo-terminal of 70 x 24, its screen, and answers to what it asks of the terminal."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.screen = pyte.Screen(70, 24)
        self._stream = pyte.Stream(self.screen)
        environment = {"TERM": "xterm-256color", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(folder)}
        self.child = pexpect.spawn(
            command[0],
            list(command[1:]),
            env={**environment, "TINYCHAT_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"},
            cwd=str(folder),
            dimensions=(24, 70),
            encoding="utf-8",
        )
        self.screen.write_process_input = self.child.send  # the reply to a question for the cursor's position

    def type(self, keys: str) -> None:
        self.child.send(keys)

    def wait(self, condition: Callable[[str], bool]) -> str:
        """The screen as text, as soon as the condition holds."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if condition(self.text()):
                return self.text()
            self._read()
        raise AssertionError(f"not in time; the screen is:\n{self.text()}")

    def see(self, text: str) -> str:
        return self.wait(lambda shown: text in shown)

    def ready(self) -> str:
        """Wait for an empty prompt under the last output."""
        return self.wait(lambda shown: shown.endswith(">"))

    def ends_with(self) -> int | None:
        """The exit code, once the chat has ended."""
        end = time.monotonic() + PATIENCE
        while self.child.isalive() and time.monotonic() < end:
            self._read()
        self.child.close()
        return self.child.exitstatus

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).strip()

    def _read(self) -> None:
        try:
            self._stream.feed(self.child.read_nonblocking(4096, timeout=0.1))
        except pexpect.TIMEOUT:
            pass
        except pexpect.EOF:
            time.sleep(0.01)
