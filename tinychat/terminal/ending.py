"""The end of a process from any of its threads: the terminal is given back as it was, and a sentence says why."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from tinychat.errors import TinychatError
from tinychat.terminal.clean import clean_line

_RESET = "\x1b[?2004l\x1b[?25h\x1b[0m\r\n"  # no bracketed paste, a visible cursor, no colours


class Ending:
    """Made where the terminal is as the shell left it; called when the process has to end, whatever it is doing.

    `rescue` saves what would be lost, and says under which name.
    """

    def __init__(self) -> None:
        self.rescue: Callable[[], str | None] | None = None
        self._before = _attributes()

    def __call__(self, sentence: str) -> None:
        try:
            self._give_back()
            for line in (f"error: {sentence}", self._rescued()):
                if line:
                    os.write(sys.stderr.fileno(), f"{clean_line(line)}\n".encode())
        finally:
            os._exit(1)

    def _give_back(self) -> None:
        """The terminal, where it is this process's to set."""
        if self._before is None or os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
            return
        import termios

        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, self._before)
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), _RESET.encode())

    def _rescued(self) -> str:
        try:
            name = self.rescue() if self.rescue is not None else None
        except TinychatError as error:
            return f"the conversation could not be saved: {error}"
        return f"the conversation is saved: /load {name}" if name else ""


def _attributes() -> list[Any] | None:
    """How the keyboard's terminal is set; None where there is none."""
    if sys.platform == "win32" or not sys.stdin or not sys.stdin.isatty():
        return None
    import termios

    return termios.tcgetattr(sys.stdin.fileno())
