"""A conversation: its turns, one answer at a time, taking back and asking again, saving and loading.

The engine keeps the KV cache and finds by itself what a request shares with the one before; a session only keeps words.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tinychat.core import Event, Failed, Finished, Image, Message, Part, Request, SamplingParams, StoppingParams, Text
from tinychat.errors import FormatError, MediaError, TinychatError, UsageError
from tinychat.store import Store

SCHEMA = "tinychat.session/1"
LARGEST_FILE = 256 * 2**20


class Answering(Protocol):
    """What a session needs of an engine."""

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        ...

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Answer the requests in order."""
        ...

    def cancel(self) -> None:
        """End the running answer after its current token."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer."""

    user: Message
    assistant: Message


class Session:
    """A conversation with an engine. A turn is kept when its answer ends, cut short or not; a failed one is not."""

    def __init__(
        self,
        engine: Answering,
        *,
        system: str | None = None,
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
        store: Store | None = None,
    ) -> None:
        self.engine = engine
        self.system = system
        self.sampling = sampling or SamplingParams()
        self.stopping = stopping or StoppingParams()
        self.store = Store() if store is None else store
        self.turns: tuple[Turn, ...] = ()
        self.last: Finished | None = None
        self._asked = 0
        self._answering = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """The system message, if any, then question and answer in turn."""
        system = () if self.system is None else (Message("system", (Text(self.system),)),)
        return (*system, *(message for turn in self.turns for message in (turn.user, turn.assistant)))

    @property
    def images(self) -> tuple[Image, ...]:
        """All pictures of the conversation, in order."""
        return tuple(image for turn in self.turns for image in turn.user.images)

    @property
    def context(self) -> int:
        """How many tokens fit into the engine's context."""
        return self.engine.context

    def say(self, text: str, images: Sequence[Image] = ()) -> Iterator[Event]:
        """Ask, with pictures before the words; they are kept as bytes, so their files may change or go.

        Closing the iterator early cancels, and keeps what was said so far. Raises MediaError for an unreadable file.
        """
        return self._answer(_question(text, images), self.sampling)

    def regenerate(self) -> Iterator[Event]:
        """Ask the last question again, with the next seed where one is set; a failure keeps the old answer."""
        return self._answer(self._last_turn().user, replace(self.sampling, seed=self._next_seed()), again=True)

    def edit(self, text: str) -> Iterator[Event]:
        """Ask the last question in other words, with its pictures; a failure keeps the old turn."""
        return self._answer(_question(text, self._last_turn().user.images), self.sampling, again=True)

    def cancel(self) -> None:
        """End the running answer after its current token; safe in a signal handler."""
        self.engine.cancel()

    def undo(self) -> Turn | None:
        """Take back the last question and its answer; None where there is none."""
        if not self.turns:
            return None
        *kept, removed = self.turns
        self.turns, self.last = tuple(kept), None
        return removed

    def drop_oldest(self) -> Turn | None:
        """Forget the first question and its answer, to make room; the system message stays."""
        if not self.turns:
            return None
        dropped, *kept = self.turns
        self.turns = tuple(kept)
        return dropped

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns, self.last = (), None

    def set_system(self, text: str | None) -> None:
        """Set the system message for what comes, None or nothing to have none."""
        self.system = text or None

    def save(self, target: str | Path) -> bool:
        """Save under a name in the store, or into a file (`*.json`, or with a folder); True where one was replaced."""
        conversation = self.to_dict()
        if is_file(target):
            return write_conversation(Path(target).expanduser(), conversation)
        return self.store.save(str(target), conversation)

    def rescue(self) -> str | None:
        """Save under a name of the moment, which is given; None where nothing was said yet."""
        if not self.turns:
            return None
        name = time.strftime("lost-%Y%m%d-%H%M%S")
        self.save(name)
        return name

    def load(self, source: str | Path) -> tuple[str, ...]:
        """Replace this conversation by a saved one; gives a sentence for each picture that vanished or changed.

        Raises FormatError and leaves the conversation as it is where the saved one is damaged.
        """
        if is_file(source):
            return self.restore(read_conversation(Path(source).expanduser()))
        return self.restore(self.store.load(str(source)))

    def to_dict(self) -> dict[str, Any]:
        """The conversation as JSON data. Token ids are left out: another model would read them as other words."""
        return {
            "schema": SCHEMA,
            "system": self.system,
            "sampling": _sampling_data(self.sampling),
            "stopping": asdict(self.stopping),
            "messages": [_message_data(message) for turn in self.turns for message in (turn.user, turn.assistant)],
        }

    def restore(self, data: Mapping[str, Any]) -> tuple[str, ...]:
        """Take over what to_dict gave, after checking all of it; gives the warnings of load."""
        warnings: list[str] = []
        try:
            schema = data["schema"]
            if schema != SCHEMA:
                raise FormatError(f"its schema is {schema!r}, not {SCHEMA!r}", "update tinychat, or load another one")
            system = _optional_text(data["system"])
            sampling = _read_sampling(data["sampling"])
            stopping = _read_stopping(data["stopping"])
            turns = _read_turns(data["messages"], warnings)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise FormatError(f"the saved conversation is damaged: {reason}", "load another one") from error
        self.system, self.sampling, self.stopping, self.turns, self.last = system, sampling, stopping, turns, None
        return tuple(warnings)

    def _answer(self, question: Message, sampling: SamplingParams, again: bool = False) -> Iterator[Event]:
        """Stream one answer; `again` puts it in the place of the last turn."""
        if self._answering:
            raise UsageError("an answer is still running", "cancel it or read it to its end first")
        before = self.turns[:-1] if again else self.turns
        events = self.engine.run([self._request(before, question, sampling)])
        self._answering = True
        ended = False
        try:
            for event in events:
                ended = self._keep(event, before, question)
                yield event
        except GeneratorExit:
            if not ended:
                self.engine.cancel()
                _ = [self._keep(event, before, question) for event in events]
            raise
        finally:
            self._answering = False

    def _request(self, before: Sequence[Turn], question: Message, sampling: SamplingParams) -> Request:
        self._asked += 1
        system = self.messages[: self.system is not None]
        history = (message for turn in before for message in (turn.user, turn.assistant))
        return Request(f"chat-{self._asked}", (*system, *history, question), sampling=sampling, stopping=self.stopping)

    def _keep(self, event: Event, before: tuple[Turn, ...], question: Message) -> bool:
        """Take the turn over where the event finishes it with something said; whether the event is the last one."""
        if isinstance(event, Finished) and (event.text or event.finish_reason != "cancelled"):
            self.turns, self.last = (*before, Turn(question, _answer_message(event))), event
        return isinstance(event, Finished | Failed)

    def _last_turn(self) -> Turn:
        if not self.turns:
            raise UsageError("there is no question yet", "ask something first")
        return self.turns[-1]

    def _next_seed(self) -> int | None:
        if self.sampling.seed is None:
            return None
        used = self.last.seed if self.last is not None else None
        return ((self.sampling.seed if used is None else used) + 1) % 2**64


def _question(text: str, images: Sequence[Image]) -> Message:
    if not text and not images:
        raise UsageError("the question is empty", "give a text, a picture, or both")
    return Message("user", (*map(_held, images), Text(text)))


def _answer_message(end: Finished) -> Message:
    """The answer as the next turn sees it: after a stop string its tokens say more than its text, so they are left out.

    The end mark of a template that is no single token is such a string too: the template adds it once more.
    """
    return Message("assistant", (Text(end.text),), None if end.finish_reason == "stop" else end.token_ids)


def _held(image: Image) -> Image:
    from tinychat.inputs.images import load_image

    return load_image(image)


def is_file(target: str | Path) -> bool:
    """Whether a target of save and load is a file: a Path, `*.json`, or a text with a folder in it."""
    return isinstance(target, Path) or target.endswith(".json") or "/" in target or os.sep in target


def write_conversation(path: Path, conversation: Mapping[str, Any]) -> bool:
    """Write the file whole or not at all; only another saved conversation is replaced. True where one was."""
    replaced = path.exists()
    if replaced and not _is_conversation(path):
        raise UsageError(f"{path} exists and is not a saved conversation", "give another file name")
    text = json.dumps(conversation, ensure_ascii=False, allow_nan=False, indent=1)
    try:
        _write_atomically(path, text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise TinychatError(f"{path} cannot be written: {error.strerror}", "give another place") from error
    return replaced


def read_conversation(path: Path) -> dict[str, Any]:
    """Read a file of write_conversation. Raises FormatError where it is too large or no JSON object."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}", "give the file of a saved conversation")
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise FormatError(f"{path} has {size:,} bytes, at most {LARGEST_FILE:,} are read", "give another file")
        data = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "give the file of a saved conversation") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not a saved conversation: {error}", "give another file") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} is not a saved conversation: it holds no object", "give another file")
    return data


def _is_conversation(path: Path) -> bool:
    try:
        return read_conversation(path).get("schema") == SCHEMA
    except TinychatError:
        return False


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _sampling_data(sampling: SamplingParams) -> dict[str, Any]:
    return {**asdict(sampling), "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()}}


def _read_sampling(data: Mapping[str, Any]) -> SamplingParams:
    bias = {int(token): float(value) for token, value in data.get("logit_bias", {}).items()}
    return SamplingParams(**{**data, "logit_bias": bias})


def _read_stopping(data: Mapping[str, Any]) -> StoppingParams:
    return StoppingParams(**{**data, "stop": tuple(_text(stop) for stop in data.get("stop", ()))})


def _message_data(message: Message) -> dict[str, Any]:
    return {"role": message.role, "parts": [_part_data(part) for part in message.parts]}


def _part_data(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"text": part.text}
    if part.path is not None:
        return {"path": str(Path(part.path).expanduser().absolute()), "digest": part.digest}
    return {"data": base64.b64encode(part.data or b"").decode(), "digest": part.digest}


def _read_turns(data: Sequence[Mapping[str, Any]], warnings: list[str]) -> tuple[Turn, ...]:
    messages = [_read_message(message, warnings) for message in data]
    roles = [message.role for message in messages]
    if len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"its {len(roles)} messages are not question and answer in turn")
    return tuple(Turn(user, answer) for user, answer in zip(messages[::2], messages[1::2], strict=True))


def _read_message(data: Mapping[str, Any], warnings: list[str]) -> Message:
    return Message(data["role"], tuple(_read_part(part, warnings) for part in data["parts"]))


def _read_part(data: Mapping[str, Any], warnings: list[str]) -> Part:
    if "text" in data:
        return Text(_text(data["text"]))
    digest = _text(data["digest"])
    if "data" in data:
        return _read_embedded(data["data"], digest)
    return _read_linked(_text(data["path"]), digest, warnings)


def _read_embedded(encoded: str, digest: str) -> Image:
    try:
        image = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a picture in it is not base64: {error}") from error
    if _digest(image) != digest:
        raise ValueError(f"a picture in it does not have the digest {digest[:12]!r}")
    return Image(data=image, digest=digest)


def _read_linked(path: str, digest: str, warnings: list[str]) -> Part:
    try:
        image = _held(Image(path=path))
    except MediaError as error:
        gone = "is no longer there" if not Path(path).exists() else f"cannot be read ({error.message})"
        warnings.append(f"the picture {path} {gone}; the conversation goes on without it")
        return Text("[a picture that is no longer there]\n")
    if digest and image.digest != digest:
        warnings.append(f"the picture {path} has changed since; the answers so far are about the old one")
    return image


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} stands where a text should be")
    return value


def _optional_text(value: object) -> str | None:
    return None if value is None else _text(value)
