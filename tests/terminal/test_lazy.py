from __future__ import annotations

import subprocess
import sys

import pytest

from tinychat import terminal


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import tinychat.terminal", ("prompt_toolkit", "rich", "torch")),
        ("from tinychat.terminal import print_answer", ("prompt_toolkit", "rich", "torch")),
        ("from tinychat.terminal import run_chat", ("torch", "transformers", "rich")),
    ],
)
def test_what_an_import_leaves_out(statement: str, absent: tuple[str, ...]) -> None:
    script = f"{statement}; import sys; print(sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(callable(getattr(terminal, name)) for name in terminal.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = terminal.nothing  # type: ignore[attr-defined]
