from __future__ import annotations

from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from tinychat.terminal.commands import COMMANDS
from tinychat.terminal.completion import ChatCompleter


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("cat.png", "my cat.png", ".hidden.png", "evil\x1b[2J.png"):
        (tmp_path / name).touch()
    (tmp_path / "camp").mkdir()
    (tmp_path / "camp" / "dog.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def complete(text: str) -> list[str]:
    """What the text becomes with each completion."""
    completer = ChatCompleter(lambda: ["pets", "camping"])
    found = completer.get_completions(Document(text), CompleteEvent(completion_requested=True))
    return [text[: len(text) + each.start_position] + each.text for each in found]


def test_commands() -> None:
    assert complete("/im") == ["/image", "/images"]
    assert complete("/xyz") == []
    assert complete("hello") == []
    assert complete("/") == [f"/{command.name}" for command in COMMANDS]


@pytest.mark.parametrize(
    ("text", "completed"),
    [
        ("/image ca", ["/image camp/", "/image cat.png"]),
        ("/i m", ["/i my\\ cat.png"]),
        ("/image my\\ c", ["/image my\\ cat.png"]),
        ("/image a.png camp/", ["/image a.png camp/dog.png"]),
        ("/image .", ["/image .hidden.png"]),
        ("/image nowhere/x", []),
        ("/load ca", ["/load camping", "/load camp/", "/load cat.png"]),
        ("/save p", ["/save pets"]),
        ("/delete ", ["/delete pets", "/delete camping"]),
        ("/set to", ["/set top_k", "/set top_p"]),
        ("/stats o", ["/stats on", "/stats off"]),
        ("/images c", ["/images clear"]),
        ("look at ./ca", ["look at ./camp/", "look at ./cat.png"]),
        ("~/camp/d", ["~/camp/dog.png"]),
        ("say ca", []),
        ("/undo ", []),
    ],
)
def test_what_follows_a_command_and_paths_anywhere(folder: Path, text: str, completed: list[str]) -> None:
    assert complete(text) == completed


def test_a_rooted_path_completes_at_the_start_of_a_line(folder: Path) -> None:
    assert complete(f"{folder}/camp/d") == [f"{folder}/camp/dog.png"]


def test_names_that_a_terminal_would_obey_are_left_out(folder: Path) -> None:
    assert not any("evil" in each for each in complete("/image "))
