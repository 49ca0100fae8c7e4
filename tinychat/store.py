"""Saved conversations by name, in one SQLite file of the user."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tinychat.errors import FormatError, TinychatError, UsageError

SCHEMA_VERSION = 1
LONGEST_NAME = 100

_CREATE = """
CREATE TABLE IF NOT EXISTS conversations (name TEXT PRIMARY KEY, saved_at TEXT NOT NULL, body TEXT NOT NULL)
"""
_SAVE = """
INSERT INTO conversations (name, saved_at, body) VALUES (?, ?, ?)
ON CONFLICT (name) DO UPDATE SET saved_at = excluded.saved_at, body = excluded.body
"""


def home() -> Path:
    """The user's tinychat folder: TINYCHAT_HOME, or the platform's place for user data. It may not exist yet."""
    chosen = os.environ.get("TINYCHAT_HOME")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("tinychat", appauthor=False))


@dataclass(frozen=True, slots=True)
class Saved:
    """One row of the list: the name and when it was saved (UTC, to the second)."""

    name: str
    saved_at: str


class Store:
    """Conversations by name. The disk is touched by the first call that needs it.

    `patience` is how many seconds to wait for another program that holds the file.
    """

    def __init__(self, folder: Path | None = None, *, patience: float = 5.0) -> None:
        self.folder = home() if folder is None else folder
        self.path = self.folder / "conversations.sqlite3"
        self.patience = patience

    def save(self, name: str, conversation: Mapping[str, Any]) -> bool:
        """Write the conversation under the name, whole or not at all; True where it replaced another."""
        _check_name(name)
        body = json.dumps(conversation, allow_nan=False)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        with self._open() as database:
            replaced = bool(database.execute("SELECT 1 FROM conversations WHERE name = ?", (name,)).fetchall())
            database.execute(_SAVE, (name, now, body))
        return replaced

    def load(self, name: str) -> dict[str, Any]:
        """The conversation of that name. Raises UsageError where there is none, FormatError where it is damaged."""
        _check_name(name)
        with self._open() as database:
            row = database.execute("SELECT body FROM conversations WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise UsageError(f"no conversation is saved as {name!r}", self._known())
        try:
            return dict(json.loads(row[0]))
        except (TypeError, ValueError) as error:
            raise FormatError(f"the conversation {name!r} is damaged: {error}", "delete it and save anew") from error

    def list(self) -> tuple[Saved, ...]:
        """All saved conversations, the newest first."""
        if not self.path.exists():
            return ()
        with self._open() as database:
            rows = database.execute("SELECT name, saved_at FROM conversations ORDER BY saved_at DESC, name").fetchall()
        return tuple(Saved(name, saved_at) for name, saved_at in rows)

    def delete(self, name: str) -> bool:
        """Forget the conversation of that name; False where there is none."""
        _check_name(name)
        with self._open() as database:
            return database.execute("DELETE FROM conversations WHERE name = ?", (name,)).rowcount > 0

    def _known(self) -> str:
        names = ", ".join(saved.name for saved in self.list()[:10])
        return f"saved are: {names}" if names else "nothing is saved yet"

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction: committed where the block ends well, rolled back where it raises."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=self.patience)) as database, database:
                self._check_version(database)
                yield database
        except sqlite3.OperationalError as error:
            raise TinychatError(
                f"the saved conversations at {self.path} cannot be used now: {error}",
                "close other tinychat programs, and see that the folder is writable",
            ) from error
        except sqlite3.DatabaseError as error:
            raise FormatError(
                f"the saved conversations at {self.path} are damaged: {error}",
                "move that file away to start a new one; it was left as it is",
            ) from error
        except OSError as error:
            raise TinychatError(
                f"the folder {self.folder} cannot be used: {error.strerror}", "set TINYCHAT_HOME to a folder of yours"
            ) from error

    def _check_version(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise FormatError(
                f"{self.path} has schema version {version}, this tinychat knows {SCHEMA_VERSION}",
                "update tinychat, or set TINYCHAT_HOME to another folder",
            )
        if version < SCHEMA_VERSION:
            self.path.chmod(0o600)
            database.execute(_CREATE)
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _check_name(name: str) -> None:
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        raise UsageError(
            f"{name[:LONGEST_NAME]!r} is not a name for a conversation",
            f"give 1 to {LONGEST_NAME} printable characters",
        )
