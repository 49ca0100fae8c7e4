from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from scripted_engine import ScriptedEngine
from terminal.emulator import Emulator

from tinychat.core import Event, Failed, Finished, Image, Message, Progress, Request, Text, Timings, Token, Usage
from tinychat.terminal.answers import is_plain, print_answer, stats_line


def ask(script: str | Failed, pictures: int = 0) -> Iterator[Event]:
    parts = (*[Image(data=b"x")] * pictures, Text("what?"))
    return ScriptedEngine([script]).run([Request("ask", (Message("user", parts),))])


@pytest.mark.parametrize("stream", [True, False])
def test_a_pipe_gets_the_raw_words_and_nothing_else(stream: bool) -> None:
    out, err = io.StringIO(), io.StringIO()
    end = print_answer(ask("It is **red**."), out=out, err=err, plain=False, stream=stream)
    assert isinstance(end, Finished)
    assert (out.getvalue(), err.getvalue()) == ("It is **red**.\n", "")


def test_a_terminal_gets_markdown_and_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Emulator()
    print_answer(ask("It is **red**.", pictures=2), out=terminal, err=terminal)
    assert terminal.lines() == ["It is red."]
    shown = terminal.getvalue()
    assert shown.index("reading 138 tokens") < shown.index("looking at 2 pictures") < shown.rindex("reading 138 tokens")


def test_plain_on_a_terminal_is_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Emulator()
    print_answer(ask("It is **red**."), out=terminal, err=io.StringIO(), plain=True)
    assert terminal.getvalue() == "It is **red**.\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "")])
def test_the_environment_can_ask_for_plain(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not is_plain(Emulator())
    monkeypatch.setenv(name, value)
    assert is_plain(Emulator())


def test_a_failure_is_a_sentence_on_err() -> None:
    out, err = io.StringIO(), io.StringIO()
    failed = Failed("ask", "cat\x1b[2J.png is a text file", "give a picture", 4)
    assert print_answer(ask(failed), out=out, err=err) is failed
    assert (out.getvalue(), err.getvalue()) == ("", "error: cat[2J.png is a text file; give a picture\n")


def test_a_failure_takes_the_progress_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Emulator()
    failed = Failed("ask", "the memory ran out", "use less", 5)
    print_answer([Progress("ask", "prefill", 1, 2), failed], out=terminal, err=terminal)
    assert terminal.lines() == ["error: the memory ran out; use less"]
    assert not terminal.screen.cursor.hidden


def test_the_tail_is_printed_too() -> None:
    usage, out = Usage(1, 0, 0, 1), io.StringIO()
    events = [Token("a", 1, "ab", 0.0), Finished("a", "abc", "c", (1,), "eos", usage, Timings(), None)]
    print_answer(events, out=out, err=io.StringIO())
    assert out.getvalue() == "abc\n"


def test_an_interrupted_answer_ends_its_line() -> None:
    def events() -> Iterator[Event]:
        yield Token("a", 1, "half", 0.0)
        raise KeyboardInterrupt

    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        print_answer(events(), out=out, err=io.StringIO())
    assert out.getvalue() == "half\n"


def test_events_without_an_end_are_a_defect() -> None:
    with pytest.raises(RuntimeError, match="without Finished or Failed"):
        print_answer([], out=io.StringIO(), err=io.StringIO())


def test_one_token_is_one_token() -> None:
    finished = Finished("r", "x", "", (1,), "eos", Usage(9, 0, 0, 1), Timings(), None)
    assert stats_line(finished, 99).startswith("1 token · ")


def test_the_statistics() -> None:
    timings = Timings(image_s=0.02, vision_s=0.2, prefill_s=0.1, ttft_s=0.32, prefill_tps=1200, decode_tps=21.25)
    finished = Finished("r", "x", "", (1,), "eos", Usage(1300, 576, 1180, 45), timings, None)
    assert stats_line(finished, 2048) == (
        "45 tokens at 21.2/s · prompt 1,300 (pictures 576, cached 1,180) at 1,200.0/s · "
        "first token 0.32 s (pictures 0.02 + vision 0.20 + prefill 0.10) · context 1,345 of 2,048"
    )
