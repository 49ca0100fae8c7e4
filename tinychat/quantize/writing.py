"""Safetensors written as a stream: the header is known beforehand, the data is copied in pieces, whatever its size."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from awq.save import atomic
from tinychat.checkpoint import Index
from tinychat.quantize.blocks import narrowed
from tinychat.weight_files import DTYPES, Entry

SHARD = 4 * 2**30
PIECE = 2**23  # bytes of a tensor in memory at once
INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Copy:
    """A tensor to be written: its name, where it lies, and the dtype that it is written in."""

    name: str
    entry: Entry
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.entry.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[bytes]:
        """The data, row-major and little-endian. Raises ModelError where the dtype cannot hold it."""
        for rows in self.rows():
            yield _bytes(narrowed(rows, self.dtype, self.name))

    def rows(self) -> Iterator[Tensor]:
        """The data as it is, some rows at a time, copied; the mapping that they come from is given back."""
        count = self.entry.shape[0] if self.entry.shape else 1
        step = max(1, count * PIECE // max(self.nbytes, 1))
        for start in range(0, count, step):
            yield self._some(start, start + step)

    def _some(self, start: int, end: int) -> Tensor:
        tensor = Index({self.name: self.entry}).get(self.name)
        return (tensor[start:end] if tensor.ndim else tensor).clone()


def write_sharded(copies: Sequence[Copy], folder: Path, shard: int = SHARD) -> None:
    """Write tensors as model.safetensors, or as shards with their index, into an existing folder."""
    shards = _shards(copies, shard)
    count = len(shards)
    numbered = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = numbered if count > 1 else ["model.safetensors"]
    for name, part in zip(names, shards, strict=True):
        write_file(part, folder / name)
    if count > 1:
        places = {copy.name: name for name, part in zip(names, shards, strict=True) for copy in part}
        total = sum(copy.nbytes for copy in copies)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        with atomic(folder / INDEX) as file:
            file.write(json.dumps(content, indent=2).encode())


def write_file(copies: Iterable[Copy], path: Path) -> None:
    """One safetensors file; the widest dtypes come first, so that every tensor is aligned."""
    ordered = sorted(copies, key=lambda copy: (-copy.dtype.itemsize, copy.name))
    header = json.dumps(_header(ordered), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for copy in ordered:
            for piece in copy.pieces():
                file.write(piece)


def _header(copies: Iterable[Copy]) -> Mapping[str, object]:
    rows: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for copy in copies:
        end = start + copy.nbytes
        rows[copy.name] = {
            "dtype": _NAMES[copy.dtype],
            "shape": list(copy.entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    return rows


def _shards(copies: Sequence[Copy], limit: int) -> list[list[Copy]]:
    shards: list[list[Copy]] = [[]]
    size = 0
    for copy in copies:
        if shards[-1] and size + copy.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(copy)
        size += copy.nbytes
    return shards


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "little":
        return flat.tobytes()
    return flat.reshape(-1, tensor.dtype.itemsize)[:, ::-1].tobytes()
