from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tinychat.errors import FormatError, TinychatError, UsageError
from tinychat.store import Store, home


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def test_home_is_the_variable_or_the_platforms_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    assert home() == tmp_path
    assert Store().path == tmp_path / "conversations.sqlite3"
    monkeypatch.delenv("TINYCHAT_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home().name == "tinychat"


def test_nothing_is_written_before_it_is_needed(store: Store) -> None:
    assert store.list() == ()
    assert not store.folder.exists()


def test_a_conversation_comes_back_as_it_was_saved(store: Store) -> None:
    conversation = {"system": None, "messages": ["\x1b[31m \ud800 é", 1.5]}
    assert store.save("cats", conversation) is False
    assert Store(store.folder).load("cats") == conversation


def test_saving_again_replaces_and_says_so(store: Store) -> None:
    store.save("cats", {"n": 1})
    assert store.save("cats", {"n": 2}) is True
    assert store.load("cats") == {"n": 2}
    assert [saved.name for saved in store.list()] == ["cats"]


def test_delete_forgets_one(store: Store) -> None:
    store.save("a", {})
    store.save("b", {})
    assert store.delete("a") is True
    assert store.delete("a") is False
    assert [saved.name for saved in store.list()] == ["b"]


def test_an_unknown_name_tells_the_known_ones(store: Store) -> None:
    with pytest.raises(UsageError, match=r"no conversation is saved as 'dogs'; nothing is saved yet"):
        store.load("dogs")
    store.save("cats", {})
    with pytest.raises(UsageError, match="saved are: cats"):
        store.load("dogs")


@pytest.mark.parametrize("name", ["", "  ", "a\x1b[31m", "a\nb", "x" * 101])
def test_a_bad_name_is_refused(store: Store, name: str) -> None:
    with pytest.raises(UsageError, match="is not a name for a conversation"):
        store.save(name, {})
    assert not store.folder.exists()


def test_a_damaged_database_is_told_and_left_as_it_is(store: Store) -> None:
    store.folder.mkdir()
    store.path.write_bytes(b"this is no database, but somebody may want it" * 30)
    before = store.path.read_bytes()
    for call in (lambda: store.save("a", {}), lambda: store.load("a"), lambda: store.list(), lambda: store.delete("a")):
        with pytest.raises(FormatError, match=r"are damaged: file is not a database; move that file away"):
            call()
    assert store.path.read_bytes() == before


def test_a_newer_schema_is_told_and_left_as_it_is(store: Store) -> None:
    store.save("a", {})
    with closing(sqlite3.connect(store.path)) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(FormatError, match="has schema version 7, this tinychat knows 1; update tinychat"):
        store.load("a")


def test_a_damaged_row_names_the_conversation(store: Store) -> None:
    store.save("a", {})
    with closing(sqlite3.connect(store.path)) as database, database:
        database.execute("UPDATE conversations SET body = '{\"messages\": ['")
    with pytest.raises(FormatError, match="the conversation 'a' is damaged"):
        store.load("a")


def test_a_failing_save_leaves_the_old_one(store: Store) -> None:
    store.save("a", {"n": 1})
    with pytest.raises(ValueError, match="JSON"):
        store.save("a", {"n": float("nan")})
    assert store.load("a") == {"n": 1}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TinychatError, match="set TINYCHAT_HOME to a folder of yours"):
        Store(tmp_path / "file" / "home").save("a", {})


def test_a_locked_database_is_told(store: Store) -> None:
    store.save("a", {})
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        impatient = Store(store.folder, patience=0.01)
        with pytest.raises(TinychatError, match="cannot be used now: database is locked"):
            impatient.save("b", {})


def test_only_the_user_may_read_it(store: Store) -> None:
    store.save("a", {})
    assert store.path.stat().st_mode & 0o077 == 0
    assert store.folder.stat().st_mode & 0o077 == 0
