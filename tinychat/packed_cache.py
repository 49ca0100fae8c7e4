"""Packed weights on disk, so that the second start need not pack: found by content, checked whole, written atomically.

A file holds the linears of one model as the kernels read them, and is named by the hash of what they were made from.
What is damaged or half-written is deleted and counts as not there; what cannot be read now, and a folder that cannot be
written, is left alone.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinychat_kernels import cpu
from tinychat_kernels.cpu import Packed

Json = dict[str, Any]

MAGIC = b"tinychat packed 1\n"
LENGTH = struct.Struct("<QI")  # of the header, and its checksum
ALIGNMENT = 64  # of each linear, from the beginning of the data
CHUNK = 32 * 2**20  # bytes that have a checksum of their own
MAX_HEADER = 2**26
LONGEST = 100  # characters of a file's name that a half-written one carries on
ABANDONED = 3600.0  # seconds after which nobody writes a file any more
MOST_BYTES = 32 * 2**30  # of all files together; the least recently used ones go first
FREE_SHARE = 0.5  # of the disk's free bytes that a new file may take
THREADS = 4
STATES = "files.json"  # what files hashed to, as long as they have not changed


@dataclass(frozen=True, slots=True)
class Place:
    """Where the packed weights of one key lie."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.key}.bin"


class Damaged(Exception):
    """A file that is not as it was written."""


def key_of(weights: Iterable[Path], facts: Sequence[str], folder: Path) -> str:
    """The name of what is made from these files' content and from what `facts` say."""
    content = Contents(folder)
    parts = [*(content.digest(path) for path in sorted(weights)), *facts]
    content.keep()
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def load(place: Place) -> dict[str, Packed] | None:
    """The weights by name, in memory of their own; None where they are not there, cannot be read, or are damaged."""
    try:
        with place.path.open("rb") as file:
            header, start = _read_header(file.fileno())
            blocks = _read_blocks(file.fileno(), start, header)
        found = {name: _packed(blocks, entry) for name, entry in header["linears"].items()}
    except OSError:  # of the system, this time: the file may be good
        return None
    except (Damaged, KeyError, TypeError, ValueError):
        with contextlib.suppress(OSError):
            place.path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(place.path)  # the least recently used goes first
    return found


def save(place: Place, linears: Mapping[str, Packed]) -> bool:
    """Write the weights, unless there is no room or no permission; says whether they are there now."""
    size = sum(_rounded(packed.blocks.nbytes) for packed in linears.values())
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        if size > min(MOST_BYTES, FREE_SHARE * shutil.disk_usage(place.folder).free):
            return False
        _make_room(place.folder, size)
        with beside(place.path) as temporary:
            _write(temporary, linears, size)
            temporary.replace(place.path)
    except OSError:
        return False
    return True


def _write(path: Path, linears: Mapping[str, Packed], size: int) -> None:
    """The header is as long in any case, so that the checksums, known at the end, fit into it."""
    described, at = dict[str, Json](), 0
    for name, packed in linears.items():
        described[name] = {"at": at, **_description(packed)}
        at += _rounded(packed.blocks.nbytes)
    checksums = ["00000000"] * -(-size // CHUNK)
    with path.open("wb") as file:
        file.write(_header(described, size, checksums))
        checksum, filled, sums = 0, 0, list[str]()
        for piece in _pieces(linears):
            file.write(piece)
            checksum, filled = zlib.crc32(piece, checksum), filled + len(piece)
            if filled % CHUNK == 0 or filled == size:
                sums.append(f"{checksum:08x}")
                checksum = 0
        file.seek(0)
        file.write(_header(described, size, sums))


def _pieces(linears: Mapping[str, Packed]) -> Iterator[memoryview]:
    """All bytes in order, none of the pieces across the end of a chunk."""
    at = 0
    for packed in linears.values():
        data = packed.blocks.numpy().data
        padded = [data, memoryview(bytes(_rounded(len(data)) - len(data)))]
        for part in padded:
            while part:
                room = CHUNK - at % CHUNK
                yield part[:room]
                at += min(room, len(part))
                part = part[room:]


def _header(linears: Mapping[str, Json], size: int, checksums: Sequence[str]) -> bytes:
    text = json.dumps({"linears": linears, "size": size, "checksums": list(checksums)}).encode()
    start = len(MAGIC) + LENGTH.size + len(text)
    text += b" " * (-start % ALIGNMENT)
    return MAGIC + LENGTH.pack(len(text), zlib.crc32(text)) + text


def _read_header(file: int) -> tuple[Json, int]:
    """The header and where the data begins. Raises Damaged."""
    head = os.pread(file, len(MAGIC) + LENGTH.size, 0)
    if len(head) != len(MAGIC) + LENGTH.size or not head.startswith(MAGIC):
        raise Damaged
    length, checksum = LENGTH.unpack(head[len(MAGIC) :])
    if length > MAX_HEADER:
        raise Damaged
    text = os.pread(file, length, len(head))
    if zlib.crc32(text) != checksum:
        raise Damaged
    return json.loads(text), len(head) + length


def _read_blocks(file: int, start: int, header: Json) -> Tensor:
    """The data in one piece, read and checked by several threads. Raises Damaged."""
    size = int(header["size"])
    if os.fstat(file).st_size != start + size:
        raise Damaged
    blocks = cpu.empty(size)
    view = blocks.numpy().data

    def read(number: int) -> bool:
        at, part = number * CHUNK, view[number * CHUNK : (number + 1) * CHUNK]
        done = 0
        while done < len(part):
            count = os.preadv(file, [part[done:]], start + at + done)
            if not count:
                return False
            done += count
        return f"{zlib.crc32(part):08x}" == header["checksums"][number]

    with ThreadPoolExecutor(THREADS) as pool:
        if not all(pool.map(read, range(-(-size // CHUNK)))):
            raise Damaged
    return blocks


def _packed(blocks: Tensor, entry: Json) -> Packed:
    at, size = entry["at"], entry["bytes"]
    if at + size > len(blocks):
        raise Damaged
    kind = getattr(torch, entry["scale"])
    shape = entry["in_features"], entry["out_features"], entry["group"], entry["bits"], kind
    return Packed(blocks[at : at + size], *shape)


def _description(packed: Packed) -> Json:
    return {
        "bytes": packed.blocks.nbytes,
        "in_features": packed.in_features,
        "out_features": packed.out_features,
        "group": packed.group,
        "bits": packed.bits,
        "scale": str(packed.scale).removeprefix("torch."),
    }


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _make_room(folder: Path, size: int) -> None:
    """Delete what a killed process left half-written, and the files that were used least recently, until one of this
    size may be added."""
    sweep(folder)
    files = sorted(_found(folder))
    total = sum(length for _, length, _ in files)
    for _, length, path in files:
        if total + size <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= length


def _found(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each file was used last, and its size; another process may delete one meanwhile."""
    for path in folder.glob("*.bin"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            yield status.st_mtime, status.st_size, path


def sweep(folder: Path, stem: str = "") -> None:
    """Delete what killed processes left half-written: of all files in the folder, or of those whose name begins so."""
    for path in folder.glob(f".{glob.escape(stem)}*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A new file in the same folder, gone at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:LONGEST]}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


class Contents:
    """What files hash to. A hash is remembered for as long as a file's inode, size and times of change stay."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATES
        self.known: Json = {}
        self.changed = False
        with contextlib.suppress(OSError, ValueError):
            read = json.loads(self.path.read_text("utf-8"))
            self.known = read if isinstance(read, dict) else {}

    def digest(self, path: Path) -> str:
        """SHA-256 of the content. A file that changes while it is read is not remembered."""
        name, state = str(path.resolve()), _state(path)
        found = self.known.get(name)
        if isinstance(found, list) and found[:-1] == state and isinstance(found[-1], str):
            return found[-1]
        with path.open("rb") as file:
            digest = _sha256(file)
        if _state(path) == state:
            self.known[name] = [*state, digest]
            self.changed = True
        return digest

    def keep(self) -> None:
        """Write what is new, without those files that are no more."""
        if not self.changed:
            return
        kept = {name: value for name, value in self.known.items() if Path(name).exists()}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with beside(self.path) as temporary:
                temporary.write_text(json.dumps(kept), "utf-8")
                temporary.replace(self.path)


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _sha256(file: Any) -> str:
    hashed, buffer = hashlib.sha256(), memoryview(bytearray(2**22))
    while count := file.readinto(buffer):
        hashed.update(buffer[:count])
    return hashed.hexdigest()
