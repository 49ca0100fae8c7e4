from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import tinychat.terminal", ("prompt_toolkit", "rich", "torch")),
        ("from tinychat.terminal.answers import print_answer", ("prompt_toolkit", "rich", "torch")),
        ("from tinychat.terminal.repl import run_chat", ("torch", "transformers", "rich")),
    ],
)
def test_what_an_import_leaves_out(statement: str, absent: tuple[str, ...]) -> None:
    script = f"{statement}; import sys; print(sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
