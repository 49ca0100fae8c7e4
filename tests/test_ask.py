"""Asking: which word is a file, what a pipe holds, one object, one line for each file, and going on where it ended."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import json_keys
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pillow
from scripted_engine import ScriptedEngine

from tinychat import ask
from tinychat.core import Failed, Image, Progress, SamplingParams, StoppingParams, Text
from tinychat.errors import CapacityError, MediaError, UsageError


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_picture(tmp_path / "red.png")


def save_picture(path: Path) -> Path:
    pillow.new("RGB", (8, 8), "red").save(path)
    return path


def asker(engine: ScriptedEngine, system: str | None = None, opened: list[str] | None = None) -> ask.Asker:
    def start() -> ScriptedEngine:
        if opened is not None:
            opened.append("model")
        return engine

    return ask.Asker("tiny", start, system, SamplingParams(), StoppingParams())


@pytest.fixture
def reader() -> Iterator[Callable[[bytes], IO[bytes]]]:
    """Makes pipes that hold the data and have ended."""
    with ExitStack() as stack:

        def pipe(data: bytes) -> IO[bytes]:
            out, into = os.pipe()
            with os.fdopen(into, "wb") as sink:
                sink.write(data)
            return stack.enter_context(os.fdopen(out, "rb"))

        yield pipe


Reader = Callable[[bytes], IO[bytes]]


def gather(words: list[str], images: list[str], stdin: IO[bytes] | None) -> tuple[ask.Query, list[str]]:
    """As ask.gather; a note fails the test."""
    return ask.gather(words, images, stdin, pytest.fail)


# Which word is what


def test_an_existing_file_is_a_file_wherever_it_stands(picture: Path):
    assert ask.sort_words([str(picture), "What is it?"]) == ("What is it?", [str(picture)])
    assert ask.sort_words(["What is it?", str(picture), "-"]) == ("What is it?", [str(picture), "-"])


def test_a_name_of_a_picture_is_a_file_even_where_there_is_none():
    assert ask.sort_words(["gone.PNG"]) == ("", ["gone.PNG"])
    assert ask.sort_words(["What is in photo.png"]) == ("What is in photo.png", [])


def test_a_second_question_is_a_missing_file():
    with pytest.raises(MediaError, match=r"there is no file 'fish'; check the path, and put the question in quotes"):
        ask.sort_words(["What", "fish"])


@given(st.text())
def test_any_single_word_is_a_question_or_a_file(word: str):
    question, files = ask.sort_words([word])
    assert [word] == (files or [question])


def test_a_question_may_be_longer_than_a_file_name():
    assert ask.sort_words(["why " * 5000]) == ("why " * 5000, [])


# What a pipe holds


@given(st.text().filter(lambda text: "\0" not in text and not text.startswith("\ufeff")))
def test_text_is_told_by_its_encoding(text: str):
    assert ask.sniff(text.encode()) == text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_picture_is_told_by_its_bytes(kind: str):
    out = io.BytesIO()
    pillow.new("RGB", (8, 8), "red").save(out, kind)
    assert ask.sniff(out.getvalue()) == Image(data=out.getvalue())


def test_text_of_a_pipe_follows_the_question(reader: Reader):
    query, files = gather(["Sum it up."], [], reader(b"First line.\nSecond line.\n"))
    assert (query.question, query.images, files) == ("Sum it up.\n\nFirst line.\nSecond line.", (), [])


def test_a_pipe_alone_is_the_question(reader: Reader):
    assert gather([], [], reader(b"What is two and two?\n"))[0].question == "What is two and two?"


def test_a_picture_of_a_pipe_goes_with_the_question(picture: Path):
    query, files = gather(["What?", "-"], [], io.BytesIO(picture.read_bytes()))
    assert (query.images, files) == ((Image(data=picture.read_bytes()),), [])


def test_no_question_is_a_wrong_call(picture: Path):
    with pytest.raises(UsageError, match="there is no question; write one"):
        gather([str(picture)], [], None)


def test_a_folder_is_no_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    with pytest.raises(UsageError, match="'docs' is taken for the folder of that name, and there is no question; ask"):
        gather(["docs"], [], None)
    assert gather(["What is in it?", "docs"], [], None)[1] == ["docs"]


def test_a_terminal_and_a_device_are_not_read():
    with Path(os.devnull).open("rb") as nothing:
        assert ask.piped(nothing, True, pytest.fail) == b""
    leader, follower = os.openpty()
    with os.fdopen(follower, "rb") as terminal:
        assert ask.piped(terminal, True, pytest.fail) == b""
    os.close(leader)


def test_a_redirected_file_is_read(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("some text")
    with (tmp_path / "notes.txt").open("rb") as file:
        assert gather(["Sum up:"], [], file)[0].question == "Sum up:\n\nsome text"


@pytest.fixture
def silent() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Both ends of a pipe in which nothing has been written yet."""
    out, into = os.pipe()
    with os.fdopen(out, "rb") as reader, os.fdopen(into, "wb") as writer:
        yield reader, writer


def test_a_silent_pipe_is_left_out(silent: tuple[IO[bytes], IO[bytes]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ask, "PATIENCE", 0.01)
    notes: list[str] = []
    query, _ = ask.gather(["What?"], [], silent[0], notes.append)
    assert query.question == "What?"
    assert notes == ["nothing came from stdin within 0.01 s, so it is left out; write - to wait for it"]


@pytest.mark.parametrize(("words", "notes"), [([], ["waiting for a question on stdin"]), (["-"], [])])
def test_a_silent_pipe_is_waited_for_where_the_question_is_in_it(
    silent: tuple[IO[bytes], IO[bytes]], monkeypatch: pytest.MonkeyPatch, words: list[str], notes: list[str]
):
    monkeypatch.setattr(ask, "PATIENCE", 0.01)
    found: list[str] = []
    reader, writer = silent

    def speak() -> None:
        time.sleep(0.1)
        writer.write(b"What is it?")
        writer.close()

    late = threading.Thread(target=speak)
    late.start()
    assert ask.gather(words, [], reader, found.append)[0].question == "What is it?"
    late.join()
    assert found == notes


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "a.png does not exist"), (b"hello", "a.png is a text file, not a picture"), (b"", "is empty")],
)
def test_a_bad_picture_is_refused_before_a_model_is_loaded(tmp_path: Path, content: bytes | None, sentence: str):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(MediaError, match=sentence):
        gather(["What?"], [str(tmp_path / "a.png")], None)


def test_bytes_of_a_pipe_that_are_no_picture_are_refused(reader: Reader):
    with pytest.raises(MediaError, match="the image is of an unknown format"):
        gather(["What?"], [], reader(b"\xff\x00\x01" * 100))


# The request and its answer


def test_the_request_has_system_pictures_and_question_in_this_order(picture: Path):
    image = Image(path=str(picture))
    request = asker(ScriptedEngine(), "Be brief.").request("r", ask.Query("What?", (image,)))
    assert [message.role for message in request.messages] == ["system", "user"]
    assert request.messages[1].parts == (image, Text("What?"))


def test_the_object_is_the_document_s():
    found = ask.ask_json(asker(ScriptedEngine(["Red."])), ask.Query("What?", ()))
    json_keys.check(json.loads(json.dumps(found)), "tinychat.ask/1")
    assert (found["schema"], found["model"], found["text"]) == ("tinychat.ask/1", "tiny", "Red.")


def test_a_failure_is_raised_as_the_error_of_its_code():
    failed = Failed("ask", "9000 tokens do not fit", "shorten it", 5)
    with pytest.raises(CapacityError, match="9000 tokens do not fit; shorten it"):
        ask.ask_json(asker(ScriptedEngine([failed])), ask.Query("What?", ()))


def test_an_engine_that_does_not_end_is_a_bug():
    with pytest.raises(RuntimeError, match="last event is Progress"):
        ask.last([Progress("r", "prefill", 1, 2)])


# One line for each file


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [str(save_picture(tmp_path / f"{name}.png")) for name in "abc"]


Each = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def each(tmp_path: Path) -> Each:
    """Asks about the files; returns (exit code, lines of OUT, reports)."""
    out = tmp_path / "out.jsonl"

    def run(
        files: list[str], engine: ScriptedEngine | None = None, question: str = "What?", opened: list[str] | None = None
    ) -> tuple[int, list[str], list[str]]:
        reports: list[str] = []
        with_engine = asker(engine or ScriptedEngine(), opened=opened)
        code = ask.ask_each(with_engine, ask.Query(question, ()), files, out, reports.append)
        return code, out.read_text().splitlines() if out.exists() else [], reports

    return run


def test_a_line_is_the_document_s(each: Each, files: list[str]):
    code, lines, _ = each(files)
    assert code == 0
    assert [json.loads(line)["input"] for line in lines] == files
    json_keys.check(json.loads(lines[0]), "tinychat.ask/1", "tinychat.ask/1, a line of --jsonl")


def test_a_bad_file_is_reported_and_tried_again(each: Each, files: list[str]):
    Path(files[1]).rename(files[1] + "~")
    code, lines, reports = each(files)
    assert (code, len(lines)) == (4, 2)
    assert "b.png does not exist" in reports[0]
    assert reports[-1].startswith("2 answered, 0 skipped") and reports[-1].endswith("1 failed")
    Path(files[1] + "~").rename(files[1])
    code, lines, reports = each(files)
    assert (code, len(lines)) == (0, 3)
    assert reports[-1].startswith("1 answered, 2 skipped")


def test_a_file_that_the_engine_refuses_does_not_end_the_others(each: Each, files: list[str]):
    code, lines, _ = each(files, ScriptedEngine(["One.", Failed("b", "too long", "cut it", 5), "Three."]))
    assert (code, [json.loads(line)["text"] for line in lines]) == (5, ["One.", "Three."])


def test_what_is_done_is_not_done_again_and_loads_nothing(each: Each, files: list[str]):
    each(files)
    opened: list[str] = []
    code, lines, reports = each(files, opened=opened)
    assert (code, len(lines), opened) == (0, 3, [])
    assert reports[-1].startswith("0 answered, 3 skipped")


def test_another_question_is_asked_anew(each: Each, files: list[str]):
    each(files)
    assert len(each(files, question="Which colour?")[1]) == 6


def test_a_file_named_twice_is_asked_once(each: Each, files: list[str]):
    assert len(each([files[0], files[0]])[1]) == 1


@given(st.integers(0, 3000))
def test_a_run_that_was_cut_off_anywhere_is_finished_by_the_next(tmp_path_factory: pytest.TempPathFactory, kept: int):
    folder = tmp_path_factory.mktemp("cut")
    files = [str(save_picture(folder / f"{name}.png")) for name in "abc"]
    out = folder / "out.jsonl"
    ask.ask_each(asker(ScriptedEngine()), ask.Query("What?", ()), files, out, print)
    whole = out.read_bytes()
    os.truncate(out, min(kept, len(whole)))
    ask.ask_each(asker(ScriptedEngine()), ask.Query("What?", ()), files, out, print)
    assert out.read_bytes() == whole


@pytest.mark.parametrize("text", ["notes of mine", "notes\n", '{"a": 1}\n', '{"a": 1}', "[]\n"])
def test_a_file_of_another_kind_is_left_alone(each: Each, files: list[str], tmp_path: Path, text: str):
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(UsageError, match=r"line 1 of .*out.jsonl is not an answer of tinychat ask --jsonl"):
        each(files)
    assert (tmp_path / "out.jsonl").read_text() == text


def test_a_last_line_without_its_end_is_kept_where_it_is_whole(each: Each, files: list[str], tmp_path: Path):
    _, [line], _ = each(files[:1])
    (tmp_path / "out.jsonl").write_text(json.dumps(json.loads(line), indent=None, separators=(",", ":")))
    assert len(each(files[:2])[1]) == 2


def test_an_out_that_cannot_be_written_is_a_wrong_call(files: list[str], tmp_path: Path):
    with pytest.raises(UsageError, match="Is a directory"):
        ask.ask_each(asker(ScriptedEngine()), ask.Query("What?", ()), files, tmp_path, print)
