from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pillow
from scripted_engine import ScriptedEngine

from make_tiny_model import make_tiny_model
from tinychat.core import Failed, Finished, Image, SamplingParams, StoppingParams, Text, Token
from tinychat.engine.engine import Engine
from tinychat.errors import FormatError, MediaError, TinychatError, UsageError
from tinychat.load import load
from tinychat.session import Session
from tinychat.store import Store

FULL = Failed("chat-1", "the context is full: 2,100 of 2,048 tokens", "shorten the conversation", 5)


def talk(session: Session, *questions: str) -> None:
    for question in questions:
        list(session.say(question))


def texts(session: Session) -> list[str]:
    return [f"{message.role}: {message.text}" for message in session.messages]


def test_say_yields_the_engines_events_and_keeps_the_turn() -> None:
    session = Session(ScriptedEngine(["Yes."]), system="Be brief.")
    events = list(session.say("Is it?"))
    assert [type(event).__name__ for event in events] == ["Started", "Progress", "Token", "Token", "Finished"]
    assert texts(session) == ["system: Be brief.", "user: Is it?", "assistant: Yes."]
    assert session.messages[-1].token_ids == (1, 2)
    assert session.last is events[-1]


def test_a_request_holds_the_whole_conversation_with_pictures_before_the_words() -> None:
    engine = ScriptedEngine()
    picture = Image(data=b"png")
    session = Session(engine, sampling=SamplingParams(top_k=7), stopping=StoppingParams(max_new_tokens=9))
    list(session.say("What is this?", [picture]))
    list(session.say("And its colour?"))
    second = engine.requests[1]
    assert [message.role for message in second.messages] == ["user", "assistant", "user"]
    held = Image(data=b"png", digest=hashlib.sha256(b"png").hexdigest())
    assert second.messages[0].parts == (held, Text("What is this?"))
    assert second.messages[1].token_ids == session.turns[0].assistant.token_ids
    assert (second.sampling.top_k, second.stopping.max_new_tokens) == (7, 9)
    assert engine.requests[0].id != second.id
    assert session.images == (held,)


@pytest.mark.parametrize(("reason", "kept"), [("stop", None), ("eos", (1,)), ("length", (1,)), ("cancelled", (1,))])
def test_an_answer_that_a_stop_string_ended_is_kept_as_text(reason: Any, kept: tuple[int, ...] | None) -> None:
    session = Session(ScriptedEngine(["yes"], finish_reason=reason))
    talk(session, "q")
    assert (session.messages[-1].text, session.messages[-1].token_ids) == ("yes", kept)


def test_an_empty_question_is_refused_and_a_picture_alone_is_not() -> None:
    session = Session(ScriptedEngine())
    with pytest.raises(UsageError, match="the question is empty"):
        session.say("")
    list(session.say("", [Image(data=b"png")]))
    assert len(session.turns) == 1


def test_a_failure_keeps_nothing_and_the_session_goes_on() -> None:
    session = Session(ScriptedEngine(["One.", FULL, "Two."]))
    talk(session, "1")
    assert list(session.say("2")) == [FULL]
    assert texts(session) == ["user: 1", "assistant: One."]
    assert session.drop_oldest() is not None
    talk(session, "2")
    assert texts(session) == ["user: 2", "assistant: Two."]


def test_cancelling_keeps_what_was_said() -> None:
    session = Session(ScriptedEngine(["abcdef"]))
    for event in session.say("go"):
        if isinstance(event, Token):
            session.cancel()
    assert texts(session) == ["user: go", "assistant: abc"]
    assert session.last is not None
    assert session.last.finish_reason == "cancelled"


def test_cancelling_before_the_first_word_keeps_nothing() -> None:
    engine = ScriptedEngine(["abc"])
    session = Session(engine)
    for _ in session.say("go"):
        engine.cancel()
    assert session.turns == ()


def test_closing_the_iterator_is_cancelling() -> None:
    engine = ScriptedEngine(["abcdefghi"])
    session = Session(engine)
    events = session.say("go")
    while not isinstance(next(events), Token):
        pass
    events.close()  # type: ignore[attr-defined]
    assert engine.cancelled
    assert texts(session) == ["user: go", "assistant: abc"]
    talk(session, "again")
    assert len(session.turns) == 2


def test_leaving_at_the_last_event_does_not_cancel() -> None:
    engine = ScriptedEngine(["ab"])
    events = Session(engine).say("go")
    while not isinstance(next(events), Finished):
        pass
    events.close()  # type: ignore[attr-defined]
    assert not engine.cancelled


def test_two_answers_at_once_are_refused() -> None:
    session = Session(ScriptedEngine(["abcdef"]))
    events = session.say("go")
    next(events)
    with pytest.raises(UsageError, match="an answer is still running"):
        next(session.say("me too"))
    list(events)
    talk(session, "now")
    assert len(session.turns) == 2


def test_an_engine_that_raises_leaves_the_session_usable() -> None:
    class Broken(ScriptedEngine):
        def run(self, requests: Any) -> Any:
            if not self.requests:
                self.requests.append(None)  # type: ignore[arg-type]
                raise TinychatError("it broke", "mend it")
            return super().run(requests)

    session = Session(Broken(["x", "y"]))
    with pytest.raises(TinychatError, match="it broke"):
        talk(session, "1")
    talk(session, "2")
    assert texts(session) == ["user: 2", "assistant: y"]


def test_undo_takes_back_the_last_turn_and_tells_which() -> None:
    session = Session(ScriptedEngine(["a", "b"]))
    talk(session, "1", "2")
    removed = session.undo()
    assert removed is not None
    assert (removed.user.text, removed.assistant.text) == ("2", "b")
    assert texts(session) == ["user: 1", "assistant: a"]
    assert session.undo()
    assert session.undo() is None


def test_undo_then_ask_sends_what_asking_afresh_sends() -> None:
    undone, fresh = ScriptedEngine(["a", "b", "c"]), ScriptedEngine(["a", "c"])
    session = Session(undone, system="s")
    talk(session, "1", "2")
    session.undo()
    talk(session, "3")
    talk(Session(fresh, system="s"), "1", "3")
    assert undone.requests[-1].messages == fresh.requests[-1].messages


def test_regenerate_asks_the_same_with_the_next_seed() -> None:
    engine = ScriptedEngine(["a", "b", "c"])
    session = Session(engine, sampling=SamplingParams(seed=2**64 - 1))
    talk(session, "1")
    list(session.regenerate())
    list(session.regenerate())
    assert [request.sampling.seed for request in engine.requests] == [2**64 - 1, 0, 1]
    assert engine.requests[2].messages == engine.requests[0].messages
    assert texts(session) == ["user: 1", "assistant: c"]


def test_regenerate_without_a_seed_leaves_the_choice_to_the_engine() -> None:
    engine = ScriptedEngine()
    session = Session(engine)
    with pytest.raises(UsageError, match="there is no question yet"):
        session.regenerate()
    talk(session, "1")
    list(session.regenerate())
    assert engine.requests[1].sampling.seed is None


def test_a_failed_regenerate_keeps_the_old_answer() -> None:
    session = Session(ScriptedEngine(["a", FULL]))
    talk(session, "1")
    list(session.regenerate())
    assert texts(session) == ["user: 1", "assistant: a"]


def test_edit_asks_in_other_words_with_the_same_pictures() -> None:
    engine = ScriptedEngine(["a", "b"])
    session = Session(engine)
    list(session.say("waht?", [Image(data=b"png")]))
    list(session.edit("what?"))
    assert texts(session) == ["user: what?", "assistant: b"]
    assert len(session.images) == 1


def test_drop_oldest_keeps_the_system_message() -> None:
    session = Session(ScriptedEngine(["a", "b"]), system="s")
    talk(session, "1", "2")
    dropped = session.drop_oldest()
    assert dropped is not None
    assert dropped.user.text == "1"
    assert texts(session) == ["system: s", "user: 2", "assistant: b"]
    session.clear()
    assert texts(session) == ["system: s"]
    assert session.drop_oldest() is None


def test_set_system_changes_what_comes_next() -> None:
    session = Session(ScriptedEngine())
    session.set_system("be kind")
    assert texts(session) == ["system: be kind"]
    session.set_system("")
    assert session.messages == ()


@pytest.fixture
def talked(tmp_path: Path) -> Session:
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"a cat")
    session = Session(
        ScriptedEngine(["a \x1b[31m\ud800", "b"]),
        system="s",
        sampling=SamplingParams(temperature=0.5, logit_bias={3: -1.0}, seed=4),
        stopping=StoppingParams(max_new_tokens=7, stop=("###",)),
        store=Store(tmp_path / "home"),
    )
    list(session.say("what?", [Image(path=str(picture)), Image(data=b"a dog")]))
    talk(session, "and?")
    return session


def reload(session: Session, source: str | Path) -> tuple[Session, tuple[str, ...]]:
    other = Session(ScriptedEngine(), store=session.store)
    return other, other.load(source)


@pytest.mark.parametrize("target", ["pets", "file"])
def test_a_saved_conversation_comes_back(talked: Session, tmp_path: Path, target: str) -> None:
    place = target if target == "pets" else str(tmp_path / "new folder" / "pets.json")
    assert talked.save(place) is False
    assert talked.save(place) is True
    other, warnings = reload(talked, place)
    assert warnings == ()
    assert texts(other) == texts(talked)
    assert (other.system, other.sampling, other.stopping) == (talked.system, talked.sampling, talked.stopping)
    cat, dog = other.images
    assert (cat.path, cat.digest) == (str(tmp_path / "cat.png"), hashlib.sha256(b"a cat").hexdigest())
    assert (dog.data, dog.digest) == (b"a dog", hashlib.sha256(b"a dog").hexdigest())
    assert all(message.token_ids is None for message in other.messages)


def test_a_picture_that_vanished_is_told_and_the_session_goes_on(talked: Session, tmp_path: Path) -> None:
    talked.save("pets")
    (tmp_path / "cat.png").unlink()
    other, warnings = reload(talked, "pets")
    assert len(warnings) == 1
    assert "cat.png is no longer there; the conversation goes on without it" in warnings[0]
    assert [image.data for image in other.images] == [b"a dog"]
    talk(other, "more?")


def test_a_picture_that_changed_is_told(talked: Session, tmp_path: Path) -> None:
    talked.save("pets")
    (tmp_path / "cat.png").write_bytes(b"another cat")
    other, warnings = reload(talked, "pets")
    assert len(warnings) == 1
    assert "cat.png has changed since" in warnings[0]
    assert other.images[0].digest == hashlib.sha256(b"another cat").hexdigest()


def test_a_picture_that_became_a_folder_is_told(talked: Session, tmp_path: Path) -> None:
    talked.save("pets")
    (tmp_path / "cat.png").unlink()
    (tmp_path / "cat.png").mkdir()
    other, (warning,) = reload(talked, "pets")
    assert "cat.png is a folder); the conversation goes on without it" in warning
    assert [image.data for image in other.images] == [b"a dog"]


@pytest.mark.parametrize("change", ["delete", "overwrite"])
def test_a_conversation_keeps_the_picture_that_was_asked_about(tmp_path: Path, change: str) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"a cat")
    session = Session(ScriptedEngine(), store=Store(tmp_path / "home"))
    list(session.say("what?", [Image(path=str(path))]))
    path.unlink()
    if change == "overwrite":
        path.write_bytes(b"a dog")
    talk(session, "and?")
    list(session.edit("or?"))
    held = Image(b"a cat", str(path), hashlib.sha256(b"a cat").hexdigest())
    assert session.images == (held,)
    assert [message.images for message in session.engine.requests[-1].messages] == [(held,), (), ()]  # type: ignore[attr-defined]
    (part, _) = session.to_dict()["messages"][0]["parts"]
    assert part == {"path": str(path), "digest": held.digest}


def test_a_question_about_a_missing_picture_is_refused_and_nothing_is_asked(tmp_path: Path) -> None:
    session = Session(ScriptedEngine())
    with pytest.raises(MediaError, match=r"none\.png does not exist"):
        session.say("what?", [Image(path=str(tmp_path / "none.png"))])
    talk(session, "and?")
    assert len(session.turns) == 1


def break_roles(data: dict[str, Any]) -> None:
    data["messages"].pop()


def break_schema(data: dict[str, Any]) -> None:
    data["schema"] = "tinychat.session/9"


def break_picture(data: dict[str, Any]) -> None:
    data["messages"][0]["parts"][1]["data"] = "AAAA"


def break_sampling(data: dict[str, Any]) -> None:
    data["sampling"]["temperature"] = -1


def break_key(data: dict[str, Any]) -> None:
    del data["system"]


def break_text(data: dict[str, Any]) -> None:
    data["messages"][0]["parts"][2]["text"] = 5


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_roles, "its 3 messages are not question and answer in turn"),
        (break_schema, "its schema is 'tinychat.session/9', not 'tinychat.session/1'"),
        (break_picture, "a picture in it does not have the digest"),
        (break_sampling, "temperature is -1, it must be 0 or more"),
        (break_key, "'system' is missing"),
        (break_text, "5 stands where a text should be"),
    ],
)
def test_a_damaged_conversation_is_refused_and_nothing_changes(
    talked: Session, tmp_path: Path, damage: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    data = talked.to_dict()
    damage(data)
    file = tmp_path / "damaged.json"
    file.write_text(json.dumps(data))
    before = (talked.messages, talked.system, talked.sampling)
    with pytest.raises(FormatError, match=sentence.replace("(", r"\(")):
        talked.load(file)
    assert (talked.messages, talked.system, talked.sampling) == before


def test_a_conversation_saved_before_a_sampling_setting_existed_is_read(talked: Session, tmp_path: Path) -> None:
    data = talked.to_dict()
    for name in ("watermark", "top_n_tokens", "prompt_logprobs"):
        del data["sampling"][name]
    file = tmp_path / "older.json"
    file.write_text(json.dumps(data))
    other, _ = reload(talked, file)
    assert other.sampling == talked.sampling


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = ("schema", "system", "sampling", "stopping", "messages")


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON)), st.sampled_from(KEYS))
def test_any_json_is_taken_or_refused_by_a_sentence(changes: dict[str, Any], dropped: str) -> None:
    session = Session(ScriptedEngine())
    data = {**session.to_dict(), **changes}
    data.pop(dropped)
    with pytest.raises(FormatError):
        session.restore(data)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KEYS), JSON)
def test_a_field_of_any_type_is_taken_or_refused_by_a_sentence(key: str, value: Any) -> None:
    session = Session(ScriptedEngine())
    try:
        session.restore({**session.to_dict(), key: value})
    except FormatError:
        assert session.messages == ()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_conversation_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(FormatError, match="is not a saved conversation"):
        Session(ScriptedEngine()).load(file)


def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(ScriptedEngine())
    with pytest.raises(UsageError, match="there is no file"):
        session.load(tmp_path / "none.json")
    monkeypatch.setattr("tinychat.session.LARGEST_FILE", 10)
    (tmp_path / "big.json").write_text("{" + " " * 10 + "}")
    with pytest.raises(FormatError, match="has 12 bytes, at most 10 are read"):
        session.load(tmp_path / "big.json")


def test_a_foreign_file_is_never_overwritten(talked: Session, tmp_path: Path) -> None:
    file = tmp_path / "package.json"
    file.write_text('{"name": "precious"}')
    with pytest.raises(UsageError, match="exists and is not a saved conversation"):
        talked.save(str(file))
    assert file.read_text() == '{"name": "precious"}'


def test_a_write_that_fails_leaves_the_old_file(
    talked: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pets.json"
    talked.save(str(file))
    before = file.read_bytes()
    talked.undo()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(TinychatError, match="cannot be written: No space left on device"):
        talked.save(str(file))
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.glob(".pets*")] == []


def test_the_store_is_the_users_own_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "mine"))
    session = Session(ScriptedEngine())
    assert not (tmp_path / "mine").exists()
    session.save("pets")
    assert (tmp_path / "mine" / "conversations.sqlite3").exists()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    return Engine(*load(str(folder)), context=256)


@pytest.fixture
def picture(tmp_path: Path) -> Image:
    path = tmp_path / "red.png"
    pillow.new("RGB", (64, 48), "red").save(path)
    return Image(path=str(path))


def test_a_turn_of_the_real_engine_computes_only_what_is_new(engine: Engine, picture: Image) -> None:
    session = Session(engine, stopping=StoppingParams(max_new_tokens=6))
    list(session.say("what is this?", [picture]))
    first = session.last
    list(session.say("and?"))
    assert first is not None
    assert session.last is not None
    assert session.last.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens - 1


def test_undo_then_ask_answers_as_asking_afresh_does(engine: Engine, picture: Image) -> None:
    undone = Session(engine, stopping=StoppingParams(max_new_tokens=6))
    list(undone.say("what is this?", [picture]))
    talk(undone, "and that?")
    undone.undo()
    list(undone.say("how many?", [picture]))
    engine.reset()
    fresh = Session(engine, stopping=StoppingParams(max_new_tokens=6))
    list(fresh.say("what is this?", [picture]))
    engine.reset()
    list(fresh.say("how many?", [picture]))
    assert [turn.assistant.token_ids for turn in undone.turns] == [turn.assistant.token_ids for turn in fresh.turns]


def test_a_full_context_of_the_real_engine_leaves_the_session_usable(engine: Engine) -> None:
    session = Session(engine, stopping=StoppingParams(max_new_tokens=4))
    talk(session, "a" * 90, "b" * 50)
    (failed,) = session.say("c" * 60)
    assert isinstance(failed, Failed)
    assert failed.exit_code == 5
    assert len(session.turns) == 2
    session.drop_oldest()
    talk(session, "c" * 60)
    assert len(session.turns) == 2


def test_closing_an_answer_of_the_real_engine_keeps_what_was_said(engine: Engine) -> None:
    session = Session(engine, stopping=StoppingParams(max_new_tokens=100, ignore_eos=True))
    events = session.say("go")
    words = [event for event, _ in zip(events, range(9), strict=False) if isinstance(event, Token)]
    events.close()  # type: ignore[attr-defined]
    assert words
    assert session.last is not None
    assert session.last.finish_reason == "cancelled"
    assert len(words) <= len(session.last.token_ids) < 12
    talk(session, "again")
    assert len(session.turns) == 2
