"""The calibration's hidden states between two blocks: on the disk, for resuming, and in memory where they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
import torch
from torch import Tensor

from awq.save import Part, atomic, part_of


class States(Sequence[Tensor]):
    """Sequences `[T, D]` float32 in one file, read one at a time; `held` ones are given from memory instead."""

    def __init__(self, path: Path, lengths: Sequence[int], width: int, held: Sequence[Tensor] | None = None) -> None:
        self.path = path
        self.lengths = tuple(lengths)
        self.width = width
        self._held = held
        self._device = torch.device("cpu")

    @classmethod
    def of(cls, part: Part, folder: Path) -> States:
        """The states that a part of the work holds."""
        return cls(folder / part.file, part.facts["lengths"], part.facts["width"])

    def on(self, device: torch.device) -> States:
        """The same, given out on a device."""
        moved = States(self.path, self.lengths, self.width, self._held)
        moved._device = device
        return moved

    def hold(self) -> States:
        """The same, in memory."""
        return self if self._held is not None else States(self.path, self.lengths, self.width, list(self))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, at: int) -> Tensor: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, at: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]  # negative ones, and IndexError
        found = self._read(at) if self._held is None else self._held[at]
        return found.to(self._device)

    def _read(self, at: int) -> Tensor:
        count, first = self.lengths[at] * self.width, sum(self.lengths[:at]) * self.width
        rows = np.fromfile(self.path, dtype="<f4", count=count, offset=4 * first)
        if len(rows) != count:
            raise OSError(f"{self.path} ends within sequence {at}")
        return torch.from_numpy(rows).reshape(-1, self.width)


class Sink:
    """Takes sequences `[T, D]` in order, and becomes states and a part of the work."""

    def __init__(self, path: Path, file: BinaryIO, hold: bool) -> None:
        self._path, self._file = path, file
        self._digest = hashlib.sha256()
        self._lengths: list[int] = []
        self._held: list[Tensor] | None = [] if hold else None
        self._width = 0

    def add(self, at: int, sequence: Tensor) -> None:
        """The next sequence; `at` is its number."""
        assert at == len(self._lengths), f"sequence {at} came after {len(self._lengths)}"
        rows = sequence.detach().to("cpu", torch.float32).contiguous()
        content = _little(rows)
        self._digest.update(content)
        self._file.write(content)
        self._lengths.append(len(rows))
        self._width = rows.shape[1]
        if self._held is not None:
            self._held.append(rows)

    def states(self) -> States:
        """What was written, once the file is complete."""
        return States(self._path, self._lengths, self._width, self._held)

    def part(self) -> Part:
        """The file as a part of the work."""
        return part_of(self._path, {"lengths": self._lengths, "width": self._width}, self._digest.hexdigest())


@contextmanager
def writing(path: Path, hold: bool) -> Iterator[Sink]:
    """A sink into a file that appears when the block ends well; `hold` keeps what is written in memory as well."""
    with atomic(path) as file:
        yield Sink(path, file, hold)


def _little(rows: Tensor) -> bytes:
    return rows.numpy().astype("<f4", copy=False).tobytes()
