"""Everything that touches the terminal. Names are imported when first used: prompt_toolkit and rich are slow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinychat.terminal.answers import print_answer
    from tinychat.terminal.interrupts import interruptible
    from tinychat.terminal.progress import make_indicator
    from tinychat.terminal.repl import run_chat

__all__ = ["interruptible", "make_indicator", "print_answer", "run_chat"]

_HOMES = {
    "interruptible": "interrupts",
    "make_indicator": "progress",
    "print_answer": "answers",
    "run_chat": "repl",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
