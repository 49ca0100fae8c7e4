"""scripts/demo: what it runs on a terminal and elsewhere, with the embedded model and without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STREAMS = ("stdin", "stdout")
SHOW = '#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done\ncat\n'  # what it was given, then what is on stdin


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """scripts/demo beside a set-up that does nothing and a tinychat that shows its arguments."""
    root = tmp_path / "a checkout"
    programs = root / ".venv/bin"
    programs.mkdir(parents=True)
    (root / "scripts").mkdir()
    for name in ("demo", "make_tiny_model.py"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    for path, text in ((root / "scripts/setup", "#!/bin/sh\n"), (programs / "tinychat", SHOW)):
        path.write_text(text)
        path.chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    (root / "tinychat/assets/demo/model").mkdir(parents=True)
    return root


def demo(checkout: Path, *arguments: str, terminal: int | None = None) -> subprocess.CompletedProcess[str]:
    streams = {"input": "words\n", "stdout": subprocess.PIPE} if terminal is None else dict.fromkeys(STREAMS, terminal)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
    return subprocess.run(
        [checkout / "scripts/demo", *arguments], env={**os.environ, "PYTHONPATH": path}, timeout=60,
        stderr=subprocess.PIPE, text=True, **streams,  # type: ignore[call-overload]
    )  # fmt: skip


def asked(checkout: Path, folder: str, *more: str) -> str:
    words = ["ask", "--stats", *more, "How many shapes are there?", str(checkout / folder / "samples/shapes.png")]
    return "".join(f"[{word}]\n" for word in words)


@pytest.mark.parametrize("arguments", [(), ("--once",)])
def test_one_question_without_a_terminal_and_nothing_on_stdin(checkout: Path, arguments: tuple[str, ...]):
    done = demo(checkout, *arguments)
    assert (done.stdout, done.stderr, done.returncode) == (asked(checkout, "tinychat/assets/demo"), "", 0)


def test_flags_are_handed_on(checkout: Path):
    assert demo(checkout, "--once", "--threads", "1").stdout == asked(
        checkout, "tinychat/assets/demo", "--threads", "1"
    )


def test_a_chat_with_a_picture_on_a_terminal(checkout: Path):
    leader, follower = os.openpty()
    (checkout / ".venv/bin/tinychat").write_text(SHOW.replace("cat\n", ""))
    assert demo(checkout, terminal=follower).returncode == 0
    shown = os.read(leader, 4096).decode().split("\r\n")
    assert shown[:3] == ["[chat]", "[--image]", f"[{checkout}/tinychat/assets/demo/samples/shapes.png]"]
    os.close(leader)
    os.close(follower)


def test_a_checkout_without_the_model_says_so(checkout: Path):
    (checkout / "tinychat/assets/demo/model").rmdir()
    done = demo(checkout, "--once")
    assert done.returncode == 0, done.stderr
    model = ("--model", str(checkout / ".cache/demo/model"), "--max-new-tokens", "32")
    assert done.stdout == asked(checkout, ".cache/demo", *model)
    assert "no embedded model; a tiny one with random weights stands in: its answers mean nothing" in done.stderr
    assert (checkout / ".cache/demo/model/llm/model.safetensors").exists()
    assert (checkout / ".cache/demo/samples/shapes.png").exists()
