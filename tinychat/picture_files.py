"""The pictures that lie in a folder: their names and states, and why some of them cannot be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ELOOP, ENOENT, ENOTDIR
from pathlib import Path
from threading import Condition

from tinychat.errors import CapacityError

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MOST = 300_000  # pictures: what the header of an index can name
NOWHERE = (ENOENT, ENOTDIR, ELOOP)  # what a link that leads to nothing fails with


@dataclass(frozen=True, slots=True)
class Picture:
    """A file by its path below the folder, its state when it was read, and why it could not be, where it could not."""

    path: str
    size: int
    mtime_ns: int
    sha256: str = ""
    fault: str = ""

    def same_file(self, other: Picture | None) -> bool:
        """Whether the other one is as large and as old: then its content is taken to be the same."""
        return other is not None and (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


def unseen(path: str, fault: str) -> Picture:
    """A picture of which no more is known, and which is looked at anew as soon as it can be."""
    return Picture(path, -1, -1, fault=fault)


def pictures_in(folder: Path, recursive: bool) -> Iterator[Picture]:
    """Files that are named like pictures, below a folder, in order; hidden ones and links to folders are left out.

    What cannot be looked at has a fault. Raises CapacityError where they are more than an index holds.
    """
    for count, picture in enumerate(_walk(folder, "", recursive)):
        if count >= MOST:
            message = f"{folder} has more than {MOST:,} pictures"
            raise CapacityError(message, "search the folders in it one by one")
        yield picture


def _walk(folder: Path, below: str, recursive: bool) -> Iterator[Picture]:
    try:
        with os.scandir(folder / below) as listed:
            entries = sorted((entry for entry in listed if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        yield unseen(below, f"cannot be opened: {error.strerror}")
        return
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        if _is_folder(entry):
            if recursive and not entry.is_symlink():
                yield from _walk(folder, path, recursive)
        elif entry.name.lower().endswith(SUFFIXES):
            yield _seen(entry, path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that may not be entered
        return False


def _seen(entry: os.DirEntry[str], path: str) -> Picture:
    try:
        status = entry.stat()
    except OSError as error:
        broken = entry.is_symlink() and error.errno in NOWHERE
        return unseen(path, "is a broken link" if broken else f"cannot be read: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return unseen(path, "is not a regular file")
    return Picture(path, status.st_size, status.st_mtime_ns)


class PixelBudget:
    """How many pixels are decoded at once: threads wait for their turn. A picture of more than all goes alone."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._used = 0
        self._freed = Condition()

    @contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        """Room for so many, once there is some."""
        with self._freed:
            self._freed.wait_for(lambda: not self._used or self._used + pixels <= self.most)
            self._used += pixels
        try:
            yield
        finally:
            with self._freed:
                self._used -= pixels
                self._freed.notify_all()
