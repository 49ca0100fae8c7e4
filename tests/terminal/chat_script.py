"""A chat on a real terminal with a scripted engine: `chat_script.py [--plain] DELAY ANSWER...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from scripted_engine import ScriptedEngine  # noqa: E402

from tinychat.session import Session  # noqa: E402
from tinychat.terminal.repl import run_chat  # noqa: E402


def main() -> int:
    plain = "--plain" in sys.argv
    delay, *answers = [word for word in sys.argv[1:] if word != "--plain"]
    engine = ScriptedEngine(list(answers), delay=float(delay))
    return run_chat(Session(engine, system="Be brief."), plain=plain, title="a test")


if __name__ == "__main__":
    sys.exit(main())
