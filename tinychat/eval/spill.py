"""Tensors kept for later: in RAM up to a limit, beyond it in files of a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tinychat.errors import CapacityError

LIMIT = 256 * 2**20
Tensors = Mapping[str, Tensor]


class Spill:
    """A list of tensors by name; `kept` is what of them lies in RAM, in bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.kept = 0
        self._entries: list[Tensors | Path] = []

    @classmethod
    def reopened(cls, folder: Path, count: int) -> Spill:
        """One whose `count` entries lie in files, as a limit of 0 leaves them."""
        spill = cls(folder, 0)
        spill._entries += [folder / f"{index}.pt" for index in range(count)]
        return spill

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tensors: Tensors) -> None:
        """Add an entry. Raises CapacityError where the disk is full."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.kept + size <= self.limit:
            self.kept += size
            self._entries.append(tensors)
            return
        path = self.folder / f"{len(self)}.pt"
        try:
            torch.save(dict(tensors), path)
        except (OSError, RuntimeError) as error:
            message = f"{size / 2**20:.0f} MiB cannot be put aside in {self.folder}: {error}"
            raise CapacityError(
                message, "free some disk, set TMPDIR to another one, or give fewer --samples"
            ) from error
        self._entries.append(path)

    def get(self, index: int) -> Tensors:
        """An entry, read again where it lies on disk."""
        entry = self._entries[index]
        return torch.load(entry, weights_only=True, mmap=True) if isinstance(entry, Path) else entry


@contextmanager
def spilling(limit: int = LIMIT) -> Iterator[Spill]:
    """A Spill whose folder is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tinychat-") as folder:
        yield Spill(Path(folder), limit)
