"""The end of a process from any of its threads: the terminal is given back as it was, and a sentence says why."""

from __future__ import annotations

import os
import sys
from typing import Any

from tinychat.terminal.clean import clean_line

_RESET = "\x1b[?2004l\x1b[?25h\x1b[0m\r\n"  # no bracketed paste, a visible cursor, no colours


class Ending:
    """Made where the terminal is as the shell left it; called when the process has to end, whatever it is doing."""

    def __init__(self) -> None:
        self._before = _attributes()

    def __call__(self, sentence: str) -> None:
        if self._before is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, self._before)
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), _RESET.encode())
        os.write(sys.stderr.fileno(), f"error: {clean_line(sentence)}\n".encode())
        os._exit(1)


def _attributes() -> list[Any] | None:
    """How the keyboard's terminal is set; None where there is none."""
    if sys.platform == "win32" or not sys.stdin or not sys.stdin.isatty():
        return None
    import termios

    return termios.tcgetattr(sys.stdin.fileno())
