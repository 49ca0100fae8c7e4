"""Work in parts on disk: a manifest of what is done, one file a part; killed at any moment, it goes on where it was.

A file appears under its name only when it is complete and on the disk, and counts only once the manifest lists it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from awq.errors import AwqError

MANIFEST = "manifest.json"
SCHEMA = "awq.work/1"
PIECE = 2**22  # bytes read at once
LISTED = 5  # differences named in an error


class SaveError(AwqError):
    """Work on disk cannot be continued: it is another one's, damaged, or in use."""


@dataclass(frozen=True)
class Part:
    """A file of the work: its name in the folder, its content's hash, and what is known about it."""

    file: str
    sha256: str
    size: int
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Work:
    """A folder with a manifest: what the work was begun with, and the parts that are complete."""

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        parts: Mapping[str, Part] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.parts = dict(parts or {})
        self.notes = dict(notes or {})

    @classmethod
    def begin(cls, folder: Path, fingerprint: Mapping[str, Any]) -> Work:
        """Make the folder and a manifest without parts."""
        folder.mkdir(parents=True, exist_ok=True)
        work = cls(folder, fingerprint)
        work._write_manifest()
        return work

    @classmethod
    def resume(cls, folder: Path) -> Work:
        """The work that a folder holds; files that the manifest does not list are removed.

        Raises SaveError where the manifest or a part is damaged.
        """
        raw = _read_manifest(folder / MANIFEST)
        parts = {name: Part(**part) for name, part in raw["parts"].items()}
        work = cls(folder, raw["fingerprint"], parts, raw["notes"])
        for name, part in parts.items():
            path = folder / part.file
            if not path.is_file() or sha256(path) != part.sha256:
                raise SaveError(f"{path} ({name}) is missing or damaged", f"delete {folder} and begin anew")
        work._sweep()
        return work

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise SaveError, with the differences, unless the work was begun with this fingerprint."""
        if found := differences(self.fingerprint, fingerprint):
            more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
            said = "; ".join(found[:LISTED])
            remedy = "give what it was begun with, or another folder"
            raise SaveError(f"the work in {self.folder} was begun with something else: {said}{more}", remedy)

    def path(self, name: str, suffix: str) -> Path:
        """Where the file of a new part belongs."""
        return self.folder / f"{name}{suffix}"

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Part:
        """Write a part of tensors; it counts once it is committed."""
        path = self.path(name, ".safetensors")
        with beside(path) as temporary:
            _save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary)
        return part_of(path, facts)

    def commit(self, parts: Mapping[str, Part], drop: Iterable[str] = (), **notes: float | str) -> None:
        """Let parts count and others not any more, in one step; the files of the latter are removed."""
        gone = [self.parts.pop(name) for name in drop if name in self.parts]
        self.parts.update(parts)
        self.notes.update(notes)
        self._write_manifest()
        for part in gone:
            (self.folder / part.file).unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        rows = {name: asdict(part) for name, part in self.parts.items()}
        content = {"schema": SCHEMA, "fingerprint": self.fingerprint, "notes": self.notes, "parts": rows}
        with atomic(self.folder / MANIFEST) as file:
            file.write(json.dumps(content, indent=1).encode())

    def _sweep(self) -> None:
        """Remove half-written files and parts that were not committed."""
        listed = {part.file for part in self.parts.values()}
        for path in self.folder.iterdir():
            if path.suffix in (".tmp", ".safetensors", ".bin") and path.name not in listed:
                path.unlink()


def part_of(path: Path, facts: Mapping[str, Any], digest: str | None = None) -> Part:
    """The part that a finished file is; its digest, where it is known already, is not computed again."""
    return Part(path.name, digest or sha256(path), path.stat().st_size, dict(facts))


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path`, on the disk, when the block ends well, and goes otherwise."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears under its name when it is complete."""
    with beside(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two fingerprints differ in, one clause each."""
    old, new = _flat(begun), _flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}" for name in names]


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """safetensors' own writer; an error of the system that it reports as text becomes an OSError again."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise as_os_error(error, path) from error


def as_os_error(error: SafetensorError, path: Path) -> OSError:
    """The error of the system that safetensors reports as text. Raises it again where it is none."""
    code = re.search(r"os error (\d+)", str(error))
    if code is None:
        raise error
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows |= _flat(value, f"{prefix}{name}: ")
        else:
            rows[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return rows


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _read_manifest(path: Path) -> dict[str, Any]:
    remedy = f"delete {path.parent} and begin anew"
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise SaveError(f"{path} has the schema {raw['schema']}, {SCHEMA} is needed", remedy)
        return {name: dict(raw[name]) for name in ("fingerprint", "notes", "parts")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SaveError(f"{path} cannot be read ({error!r:.120})", remedy) from error
