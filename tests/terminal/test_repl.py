from __future__ import annotations

import hashlib
import io
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine

from tinychat.core import Failed, Image, StoppingParams
from tinychat.errors import MediaError
from tinychat.session import Session
from tinychat.store import Store
from tinychat.terminal.commands import COMMANDS
from tinychat.terminal.repl import Chat, run_chat
from tinychat.terminal.screen import Screen

FULL = Failed("chat", "the prompt has 2,100 tokens, the context 2,048", "shorten it", 5)


class Lines:
    """A reader that gives lines, or raises what stands between them; then the input ends."""

    def __init__(self, lines: Sequence[str | type[BaseException]]) -> None:
        self.lines = list(lines)
        self.prompts: list[str] = []

    def read(self, prompt: Callable[[], str]) -> str:
        self.prompts.append(prompt())
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line


def inspect(image: Image) -> tuple[Image, int, int]:
    """A picture is what begins with PIC; bytes that are there already are one."""
    if image.data is not None:
        return image, 640, 480
    path = Path(image.path or "")
    if not path.exists():
        raise MediaError(f"{path} does not exist", "check the path")
    data = path.read_bytes()
    if not data.startswith(b"PIC"):
        raise MediaError(f"{path} is a text file, not a picture", "give a picture")
    return replace(image, data=data, digest=hashlib.sha256(data).hexdigest()), 640, 480


class Talk:
    """A chat without a terminal, and what it wrote."""

    def __init__(self, folder: Path, *scripts: str | Failed, context: int = 2048) -> None:
        self.engine = ScriptedEngine(list(scripts) or ["It is a circle."], context=context)
        self.session = Session(self.engine, store=Store(folder / "home"))
        self.out = io.StringIO()
        self.chat = Chat(self.session, Screen(self.out), inspect=inspect)
        self.reader = Lines([])

    def run(self, *lines: str | type[BaseException]) -> int:
        self.reader = Lines(lines)
        return self.chat.run(self.reader)

    def written(self) -> str:
        text = self.out.getvalue()
        self.out.seek(0)
        self.out.truncate()
        return text


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    return Talk(tmp_path)


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "my cat.png"
    path.write_bytes(b"PIC cat")
    return path


def test_a_question_is_answered_and_the_end_of_input_leaves_with_0(talk: Talk) -> None:
    assert talk.run("hello", "", "  ") == 0
    assert talk.written() == "It is a circle.\n"
    assert len(talk.engine.requests) == 1


def test_two_interrupts_at_an_empty_prompt_leave_with_130(talk: Talk) -> None:
    assert talk.run(KeyboardInterrupt, KeyboardInterrupt, "never read") == 130
    assert talk.written() == "Ctrl-C once more leaves; so does Ctrl-D\n"


def test_a_line_between_two_interrupts_makes_the_second_a_first(talk: Talk) -> None:
    assert talk.run(KeyboardInterrupt, "hello", KeyboardInterrupt) == 0


def test_throwing_a_line_away_makes_the_next_interrupt_a_first(talk: Talk) -> None:
    talk.run(KeyboardInterrupt)
    talk.chat.disarm()
    assert talk.run(KeyboardInterrupt) == 0


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(tmp_path: Path) -> None:
    talk = Talk(tmp_path, "abcdef")
    run = talk.engine.run

    def pressed(requests):  # type: ignore[no-untyped-def]
        for number, event in enumerate(run(requests)):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield event

    talk.engine.run = pressed  # type: ignore[method-assign]
    assert talk.run("go", KeyboardInterrupt) == 130
    assert talk.written() == "abc\nstopped; what was said is kept. Ctrl-C once more leaves\n"
    assert talk.session.messages[-1].text == "abc"


def test_two_interrupts_during_an_answer_leave_with_130(tmp_path: Path) -> None:
    talk = Talk(tmp_path, "abcdef")

    def stuck(requests):  # type: ignore[no-untyped-def]
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield FULL

    talk.engine.run = stuck  # type: ignore[method-assign]
    assert talk.run("go", "never read") == 130


def test_a_path_and_a_question_in_one_line(talk: Talk, cat: Path) -> None:
    talk.run(f"'{cat}' what is this?")
    assert talk.written() == "[image 1: my cat.png, 640x480]\nIt is a circle.\n"
    question = talk.engine.requests[0].messages[0]
    assert question.text == "what is this?"
    assert question.images == (Image(b"PIC cat", str(cat), hashlib.sha256(b"PIC cat").hexdigest()),)


def test_pictures_wait_for_the_question_and_are_numbered_through_the_conversation(talk: Talk, cat: Path) -> None:
    talk.run(str(cat), f"/image {cat}", "which?", f"/i '{cat}'")
    shown = "[image {}: my cat.png, 640x480]\n"
    assert talk.written() == shown.format(1) + shown.format(2) + "It is a circle.\n" + shown.format(3)
    assert talk.reader.prompts == ["> ", "[1 picture] > ", "[2 pictures] > ", "> ", "[1 picture] > "]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/no/such.png what is this?", "there is no picture /no/such.png; check the path"),
        ("https://example.org/a.png ?", "https://example.org/a.png was not fetched; download the picture"),
        ("/image", "/image needs a picture; type /image and its path"),
        ("/imgae x.png", "there is no command /imgae; did you mean /image?"),
        ("/xyzzy", "there is no command /xyzzy; /help lists them"),
        ("/undo now", "/undo takes nothing after it; type /undo alone"),
        ("/undo", "there is nothing to take back"),
        ("/drop", "there is nothing to take back"),
        ("/regen", "there is no question yet"),
        ("/edit x", "there is no question yet"),
        ("/images foo", "/images does not know 'foo'"),
        ("/stats maybe", "/stats does not know 'maybe'"),
        ("/set tmp 1", "there is no setting 'tmp'"),
        ("/set top_p 7", "top_p is 7.0, it must be above 0 and at most 1"),
        ("/save", "/save needs a name or a file"),
        ("/load nothing", "no conversation is saved as 'nothing'"),
        ("/load none.json", "there is no file none.json"),
        ("/delete nothing", "no conversation is saved as 'nothing'"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_is_sent(talk: Talk, line: str, sentence: str) -> None:
    talk.run(line)
    assert sentence in talk.written()
    assert talk.engine.requests == []


def test_a_file_that_is_no_picture_is_told_and_nothing_is_sent(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("words")
    talk.run(f"{tmp_path}/notes.png what is this?")
    assert "notes.png is a text file, not a picture" in talk.written()
    assert talk.engine.requests == []
    assert talk.chat.staged == ()


def test_a_name_without_a_file_is_sent_as_words_and_told(talk: Talk) -> None:
    talk.run("shall I call it cat.png?")
    assert talk.written() == "there is no file cat.png here; sent as words\nIt is a circle.\n"


def test_a_block_of_three_quotes_is_sent_as_it_stands(talk: Talk) -> None:
    talk.run('"""\n/clear\n/no/such.png\n"""')
    assert talk.engine.requests[0].messages[0].text == "/clear\n/no/such.png"


def test_a_paste_of_pictures_is_taken_and_of_words_is_not(talk: Talk, cat: Path) -> None:
    assert talk.chat.taker("some words") is None
    assert talk.chat.taker(f"'{cat}' and words") is None
    assert talk.chat.taker("/no/such.png") is None
    take = talk.chat.taker(f"'{cat}' ")
    assert take is not None
    take()
    assert talk.written() == "[image 1: my cat.png, 640x480]\n"


def test_undo_takes_back_and_lets_its_pictures_wait_again(talk: Talk, cat: Path) -> None:
    talk.run("first", f"'{cat}' second", "/undo", "/u")
    assert talk.written().splitlines()[3:] == [
        "took back: second",
        "[image 1: my cat.png, 640x480] waiting again; /images clear drops it",
        "took back: first",
    ]
    assert talk.session.turns == ()
    assert len(talk.chat.staged) == 1


def test_undo_keeps_a_picture_whose_file_has_gone(talk: Talk, cat: Path) -> None:
    talk.run(f"'{cat}' what?")
    cat.unlink()
    talk.written()
    talk.run("/undo")
    assert "[image 1: my cat.png, 640x480] waiting again" in talk.written()
    assert [staged.image.data for staged in talk.chat.staged] == [b"PIC cat"]


def test_regenerate_and_edit_answer_again(tmp_path: Path) -> None:
    talk = Talk(tmp_path, "one", "two", "three")
    talk.run("what?", "/r", "/edit which?")
    written = talk.written()
    assert "temperature is 0, so the answer will be the same" in written
    assert [message.text for message in talk.session.messages] == ["which?", "three"]


def test_images_lists_and_clears(talk: Talk, cat: Path) -> None:
    talk.run("/images", f"'{cat}' what?", str(cat), "/images", "/images clear", "/images")
    assert talk.written().splitlines() == [
        "no pictures yet; type or drag a path, or use /image",
        "[image 1: my cat.png, 640x480]",
        "It is a circle.",
        "[image 2: my cat.png, 640x480]",
        "[image 1: my cat.png] in the conversation",
        "[image 2: my cat.png, 640x480] waiting for the next question",
        "no picture is waiting now",
        "[image 1: my cat.png] in the conversation",
    ]


def test_clear_and_drop_forget(tmp_path: Path) -> None:
    talk = Talk(tmp_path, "a", "b")
    talk.run("1", "2", "/drop", "/system be brief", "/clear", "/system", "/system off")
    assert talk.written().splitlines() == [
        "a",
        "b",
        "forgot the oldest question and its answer: 1",
        "system message: be brief",
        "the conversation begins anew, with the same /system",
        "system message: be brief",
        "no system message",
    ]
    assert talk.session.messages == ()


def test_a_full_context_tells_what_to_do_and_the_chat_goes_on(tmp_path: Path) -> None:
    talk = Talk(tmp_path, "a", FULL, "b")
    talk.run("1", "2")
    assert talk.written().splitlines() == [
        "a",
        "the prompt has 2,100 tokens, the context 2,048; shorten it",
        "nothing of it was kept, Up brings it back; "
        "make room: /drop forgets the oldest question, /undo the last one, /clear all",
    ]
    talk.run("/drop", "2")
    assert talk.written().splitlines()[-1] == "b"


def test_pictures_wait_on_when_the_question_failed(tmp_path: Path, cat: Path) -> None:
    talk = Talk(tmp_path, FULL, "b")
    talk.run(f"'{cat}' what?")
    assert len(talk.chat.staged) == 1
    talk.run("what?")
    assert talk.chat.staged == ()
    assert len(talk.session.images) == 1


def test_an_answer_that_fills_the_context_says_so(tmp_path: Path) -> None:
    talk = Talk(tmp_path, "abcdef", context=12)
    talk.engine.finish_reason = "length"
    talk.run("go")
    assert "the context is full: 12 of 12 tokens; make room: /drop" in talk.written()


def test_an_answer_cut_at_its_limit_says_how_to_allow_more(tmp_path: Path) -> None:
    talk = Talk(tmp_path, "abcdef")
    talk.session.stopping = StoppingParams(max_new_tokens=2)
    talk.engine.finish_reason = "length"
    talk.run("go")
    assert "cut after 2 tokens; /set max_new_tokens 4 allows more" in talk.written()
    talk.engine.scripts = ["abc"]
    talk.run("go")
    assert "cut after 1 token; /set max_new_tokens 2 allows more" in talk.written()


def test_set_and_stats(talk: Talk) -> None:
    talk.run("/stats", "/set temperature 0.5", "/set temperature", "/stats on", "hi", "/stats off", "hi", "/stats")
    written = talk.written().splitlines()
    assert written[:4] == [
        "no answer yet",
        "temperature is 0.5",
        "temperature is 0.5",
        "statistics after each answer: on",
    ]
    assert [line.startswith("5 tokens at 20.0/s") for line in written[4:]] == [False, True, False, False, True]
    talk.run("/set")
    assert "  temperature         0.5\n" in talk.written()


def test_save_load_list_and_delete(talk: Talk, tmp_path: Path, cat: Path) -> None:
    file = tmp_path / "my talk.json"
    talk.run(f"'{cat}' what?", "/load", "/save pets", "/save pets", f"/save '{file}'", "/clear", "/load pets")
    assert talk.written().splitlines()[2:] == [
        "nothing is saved yet; /save NAME does it",
        "saved as pets",
        "saved as pets, in place of the one before",
        f"saved as {file}",
        "the conversation begins anew",
        "loaded: 1 question, 1 picture",
        "> what?",
        "It is a circle.",
    ]
    cat.unlink()
    talk.run(f"/load {str(file).replace(' ', chr(92) + ' ')}", "/load", "/delete pets", "/load")
    written = talk.written()
    assert "my cat.png is no longer there; the conversation goes on without it" in written
    assert "  pets  20" in written
    assert written.endswith("deleted pets\nnothing is saved yet; /save NAME does it\n")


def test_a_loaded_conversation_cannot_obey_the_terminal(talk: Talk, tmp_path: Path) -> None:
    evil = Session(ScriptedEngine(["\x1b[2Jboo\x9d0;x\x07"]), system="\x1b]0;owned\x07")
    list(evil.say("\x1b[31mred\u202e"))
    evil.save(tmp_path / "evil.json")
    talk.run(f"/load {tmp_path}/evil.json", "/system", "/undo", "/save \x1b[2J", "/xx\x1b[2J")
    assert not set(talk.written()) & set("\x1b\x9d\x07\u202e")


def test_help_has_every_command_and_short_form(talk: Talk) -> None:
    talk.run("/help", "/?")
    written = talk.written()
    for command in COMMANDS:
        assert f"/{command.name}" in written
        assert command.help in written
        assert all(f"(/{short})" in written for short in command.short)


@pytest.mark.parametrize("line", ["/quit", "/q", " /exit "])
def test_quit_leaves_with_0(talk: Talk, line: str) -> None:
    assert talk.run(line, "never read") == 0
    assert len(talk.reader.lines) == 1


def test_names_of_commands_are_unique() -> None:
    names = [name for command in COMMANDS for name in (command.name, *command.short)]
    assert len(names) == len(set(names))


def test_a_pipe_is_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\\\ntwo\n/stats\nthree"))
    engine = ScriptedEngine(["A **b**.\x1b[0m"])
    assert run_chat(Session(engine, store=Store(tmp_path)), title="x") == 0
    out = capsys.readouterr().out.splitlines()
    assert (out[0], out[2]) == ("A **b**.[0m", "A **b**.[0m")
    assert [request.messages[-1].text for request in engine.requests] == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("lines", "code"),
    [("one\n/no/such.png what?\n", 2), ("one\ntwo\n/xyzzy\n", 5), ("one\ntwo\n/quit\n", 5), ("one\n", 0)],
)
def test_failures_in_a_pipe_go_to_stderr_and_the_first_is_the_exit_code(
    lines: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    failing = replace(FULL, message="it broke", remedy="mend it")
    assert run_chat(Session(ScriptedEngine(["A.", failing]), store=Store(tmp_path))) == code
    written = capsys.readouterr()
    assert written.out.startswith("A.\n")
    assert [word in written.out for word in ("it broke", "no picture", "no command")] == [False] * 3
    assert ("it broke; mend it" in written.err, "no picture /no/such.png" in written.err) == (code == 5, code == 2)
