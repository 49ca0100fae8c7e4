"""`tinychat ask`: one question, one answer; with --jsonl one question for each file, resumable."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from tinychat.core import Event, Failed, Finished, Image, Message, Request, SamplingParams, StoppingParams, Text
from tinychat.errors import CapacityError, MediaError, ModelError, TinychatError, UsageError

PATIENCE = 1.0  # seconds that a pipe may stay silent where the question is known without it
SCHEMA = "tinychat.ask/1"
LINE_START = b'{"schema": "tinychat.ask/1", "input": '
PICTURES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
BY_CODE = {kind.exit_code: kind for kind in (UsageError, ModelError, MediaError, CapacityError)}


class Engine(Protocol):
    """The part of the engine that asking needs."""

    context: int

    def run(self, requests: Iterable[Request]) -> Iterable[Event]: ...


@dataclass(frozen=True, slots=True)
class Query:
    """What to ask: the question, and the pictures that go with it, in order."""

    question: str
    images: tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class Asker:
    """How to ask. `open` loads the model, and is called once there is something to ask."""

    model: str
    open: Callable[[], Engine]
    system: str | None
    sampling: SamplingParams
    stopping: StoppingParams

    def request(self, name: str, query: Query) -> Request:
        system = (Message("system", (Text(self.system),)),) if self.system else ()
        user = Message("user", (*query.images, Text(query.question)))
        return Request(name, messages=(*system, user), sampling=self.sampling, stopping=self.stopping)


def sort_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Arguments -> (question or "", files). A file is `-`, what exists, or what is named like a picture."""
    files = [word for word in words if _means_file(word)]
    questions = [word for word in words if not _means_file(word)]
    if len(questions) > 1:
        raise MediaError(f"there is no file {questions[1]!r}", "check the path, and put the question in quotes")
    return "".join(questions), files


def _means_file(word: str) -> bool:
    try:
        exists = Path(word).exists()
    except (OSError, ValueError):  # a question may be longer than a file name can be
        exists = False
    return word == "-" or exists or (not any(map(str.isspace, word)) and word.lower().endswith(PICTURES))


def read_picture(path: str) -> Image:
    """The picture at `path`, checked by its header; raises MediaError where it is missing, too large or no picture."""
    return _checked(Image(path=path))


def _checked(image: Image) -> Image:
    from tinychat.inputs.images import image_size

    image_size(image)
    return image


def sniff(data: bytes) -> Image | str:
    """What a pipe delivered: text where it is UTF-8, else a picture's bytes."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Image(data=data)
    return Image(data=data) if "\0" in text else text


def piped(stdin: IO[bytes] | None, needed: bool, report: Callable[[str], None]) -> bytes:
    """What is piped or redirected into `stdin`; nothing from a terminal or /dev/null.

    A pipe that is silent for PATIENCE seconds, as cron and ssh leave one open, is left alone unless it is `needed`.
    """
    try:
        mode = os.fstat(stdin.fileno()).st_mode if stdin else 0
    except (OSError, ValueError):
        return b""
    if stdin is None or not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return b""
    if stat.S_ISREG(mode) or select.select([stdin], [], [], PATIENCE)[0]:
        return stdin.read()
    if needed:
        report("waiting for a question on stdin")
        return stdin.read()
    report(f"nothing came from stdin within {PATIENCE:g} s, so it is left out; write - to wait for it")
    return b""


def compose(question: str, pictures: Sequence[Image], data: bytes, files: Sequence[str] = ()) -> Query:
    """The query of a question, pictures and the bytes of stdin; raises UsageError where no question is left.

    `files` are the words that were taken for files: one of them may have been meant as the question.
    """
    content = sniff(data)
    text = content.strip() if isinstance(content, str) else ""
    found = (_checked(content),) if isinstance(content, Image) else ()
    whole = "\n\n".join(part for part in (question.strip(), text) if part)
    if not whole:
        raise _no_question(files)
    return Query(whole, (*pictures, *found))


def _no_question(files: Sequence[str]) -> UsageError:
    folder = next((file for file in files if file != "-" and Path(file).is_dir()), None)
    if folder is not None:
        what = f"{folder!r} is taken for the folder of that name, and there is no question"
        return UsageError(
            what, f'ask in more words, or about its pictures: tinychat ask "What is this?" {folder}/*.png'
        )
    return UsageError("there is no question", 'write one, as in tinychat ask "What is this?" photo.png, or pipe it in')


def gather(
    words: Sequence[str], images: Sequence[str], stdin: IO[bytes] | None, report: Callable[[str], None]
) -> tuple[Query, list[str]]:
    """Arguments, --image and stdin -> the query without the FILES, and the FILES. `-` reads stdin to its end."""
    question, files = sort_words(words)
    asked = "-" in files and stdin is not None
    data = stdin.read() if asked and stdin else piped(stdin, not question.strip(), report)
    query = compose(question, [read_picture(path) for path in images], data, files)
    return query, [file for file in files if file != "-"]


def last(events: Iterable[Event]) -> Finished | Failed:
    """The event that ends an answer."""
    *_, end = events
    if not isinstance(end, Finished | Failed):
        raise RuntimeError(f"the engine's last event is {type(end).__name__}")
    return end


def why_cut(end: Finished, context: int, limited: bool) -> str:
    """Why an answer ended before its end, and what to do; "" where it did not, or where the user limited its length."""
    usage = end.usage
    if end.finish_reason != "length":
        return ""
    if usage.prompt_tokens + usage.completion_tokens >= context:
        return f"the answer is cut: the context of {context:,} tokens is full; give more by --context, or ask for less"
    tokens = usage.completion_tokens
    return "" if limited else f"the answer is cut after {tokens:,} tokens; --max-new-tokens {2 * tokens} allows more"


def as_error(failed: Failed) -> TinychatError:
    """A Failed event as the exception of its exit code."""
    return BY_CODE.get(failed.exit_code, TinychatError)(failed.message, failed.remedy)


def to_json(model: str, finished: Finished) -> dict[str, Any]:
    """The object of `ask --json`, as docs/json.md has it."""
    return {
        "schema": SCHEMA,
        "model": model,
        "text": finished.text,
        "token_ids": list(finished.token_ids),
        "finish_reason": finished.finish_reason,
        "usage": asdict(finished.usage),
        "timings": asdict(finished.timings),
        "seed": finished.seed,
    }


def ask_json(asker: Asker, query: Query) -> dict[str, Any]:
    """The answer as one object; raises what the engine failed with."""
    end = last(asker.open().run([asker.request("ask", query)]))
    if isinstance(end, Failed):
        raise as_error(end)
    return to_json(asker.model, end)


def ask_each(asker: Asker, query: Query, files: Sequence[str], out: Path, report: Callable[[str], None]) -> int:
    """One question for each file, one line each at the end of `out`; files that `out` has are skipped.

    A file that cannot be answered is reported and left for the next call. Returns the exit code of the first of them.
    """
    if not files:
        raise UsageError("--jsonl has no FILES to ask about", "name one or more")
    done = answered(out, query.question, asker.model)
    inputs = list(dict.fromkeys(files))
    todo = [file for file in inputs if file not in done]
    codes = list[int]()
    if todo:
        engine = asker.open()
        with _appending(out) as sink:
            for file, found in _answers(engine, asker, query, todo):
                if isinstance(found, TinychatError):
                    codes.append(found.exit_code)
                    report(str(found) if str(found).startswith(file) else f"{file}: {found}")
                else:
                    sink.write(json.dumps(_line(asker, query, file, found)) + "\n")
                    sink.flush()
    skipped = len(inputs) - len(todo)
    report(f"{len(todo) - len(codes)} answered, {skipped} skipped (already in {out}), {len(codes)} failed")
    return codes[0] if codes else 0


def _answers(
    engine: Engine, asker: Asker, query: Query, files: Sequence[str]
) -> Iterator[tuple[str, Finished | TinychatError]]:
    """What comes of each file, as it comes: the engine takes as many at once as it has rows."""
    unread = deque[tuple[str, TinychatError]]()

    def requests() -> Iterator[Request]:
        for file in files:
            try:
                each = Query(query.question, (*query.images, read_picture(file)))
            except TinychatError as error:
                unread.append((file, error))
            else:
                yield asker.request(file, each)

    for event in engine.run(requests()):
        while unread:
            yield unread.popleft()
        if isinstance(event, Finished | Failed):
            yield event.request_id, event if isinstance(event, Finished) else as_error(event)
    yield from unread


def _line(asker: Asker, query: Query, file: str, end: Finished) -> dict[str, Any]:
    head, *rest = to_json(asker.model, end).items()
    return dict([head, ("input", file), ("question", query.question), *rest])


def answered(out: Path, question: str, model: str) -> set[str]:
    """The inputs that `out` has an answer of this model to this question for; a half-written last line is cut off."""
    *whole, tail = _read(out).split(b"\n")
    lines = [_parse(line, number, out) for number, line in enumerate(whole, 1)]
    if tail:
        lines += _mend(tail, len(whole) + 1, out)
    return {line["input"] for line in lines if (line["question"], line["model"]) == (question, model)}


def _mend(tail: bytes, number: int, out: Path) -> list[dict[str, Any]]:
    """A last line that lacks its end: given it where it is whole, cut off where an interrupted call left a piece."""
    if tail[: len(LINE_START)] == LINE_START[: len(tail)] and not _is_json(tail):
        os.truncate(out, out.stat().st_size - len(tail))
        return []
    line = _parse(tail, number, out)
    with out.open("ab") as file:
        file.write(b"\n")
    return [line]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _read(out: Path) -> bytes:
    try:
        return out.read_bytes() if out.exists() else b""
    except OSError as error:
        raise UsageError(f"--jsonl {out}: {error.strerror}", "give a file that can be read and written") from error


def _parse(line: bytes, number: int, out: Path) -> dict[str, Any]:
    found = json.loads(line) if _is_json(line) else None
    if not (isinstance(found, dict) and {"input", "question", "model"} <= found.keys()):
        raise UsageError(f"line {number} of {out} is not an answer of tinychat ask --jsonl", "give another file")
    return found


def _appending(out: Path) -> IO[str]:
    try:
        return out.open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--jsonl {out}: {error.strerror}", "give a file that can be written") from error


def stdin_bytes() -> IO[bytes] | None:
    """The process's standard input, or None where it has none."""
    return getattr(sys.stdin, "buffer", None)
