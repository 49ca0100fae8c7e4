"""The files that hold a folder's tensors: found, their headers read and checked, their tensors read by key.

Nothing here runs code from a file: safetensors, or pickles under torch's weights_only.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinychat.errors import FormatError, ModelError

Reader = Callable[[str], Tensor]

MAX_HEADER = 100 * 2**20
LFS_POINTER = b"version https://git-lfs"
AGAIN = "download or copy the file again"
NOT_WEIGHTS = re.compile(r"^(adapter_model|consolidated|training_args|optimizer|scheduler|rng_state)")
UNPICKLING = (  # what torch's unpickler raises on bytes that are no pickle
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    struct.error,
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies, and what it is; `offset` is that of its first byte, None where it is not there as it is."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None = field(default=None, kw_only=True)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def files(self) -> list[Path]:
        """Where its data comes from."""
        return [self.path]

    def read(self, open_file: Callable[[Path], Reader]) -> Tensor:
        """The data, from the file that `open_file` opens, or has open."""
        return open_file(self.path)(self.key)


def weight_files(folder: Path, problems: list[FormatError]) -> dict[Path, set[str]]:
    """The files that hold a folder's tensors, each with the names that an index file expects in it."""
    for single, index, suffixes in (
        ("model.safetensors", "model.safetensors.index.json", (".safetensors",)),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", (".bin", ".pt", ".pth")),
    ):
        if (folder / single).is_file():
            return {folder / single: set()}
        if (folder / index).is_file():
            return _indexed_files(folder / index, problems)
        found = sorted(path for path in folder.glob("*") if path.suffix in suffixes and path.is_file())
        if weights := [path for path in found if not NOT_WEIGHTS.match(path.name)]:
            return {path: set() for path in weights}
    there = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
    raise ModelError(f"{folder} has no *.safetensors, *.bin or *.pt; found {there}", "give the folder with the weights")


def _indexed_files(index: Path, problems: list[FormatError]) -> dict[Path, set[str]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index} is not an index of shards ({error!r})", AGAIN) from error
    files: defaultdict[Path, set[str]] = defaultdict(set)
    for name, file in pairs:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise FormatError(f"{index} points outside its folder, to {file}", "do not use this checkpoint")
        files[index.parent / file].add(name)
    lost = [path for path in files if not path.is_file()]
    problems += [fault(f"{path.name} is missing ({len(files[path])} tensors)") for path in lost]
    return {path: names for path, names in files.items() if path.is_file()}


def entries_of(path: Path, problems: list[FormatError]) -> dict[str, Entry]:
    """A file's tensors by key; what is wrong with it goes to `problems`."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        problems.append(FormatError(f"{path.name} is a Git LFS pointer and not the weights", "run git lfs pull"))
        return {}
    try:
        return _header(path) if path.suffix == ".safetensors" else _pickle_entries(path)
    except FormatError as error:
        problems.append(error)
        return {}


def _header(path: Path) -> dict[str, Entry]:
    """Entries of a safetensors file. Raises FormatError where its header is not whole or does not match its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise FormatError(f"{path.name} announces a header of {length} bytes and is {size} bytes long", AGAIN)
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {key: _entry(path, key, row, 8 + length) for key, row in header.items()}
        end = _end_of_data([row["data_offsets"] for row in header.values()])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path.name} has a header that cannot be read ({error!r})", AGAIN) from error
    if end != (there := size - 8 - length):
        raise FormatError(f"{path.name} is truncated: its header describes {end} bytes of data, it has {there}", AGAIN)
    return entries


def _end_of_data(spans: list[list[int]]) -> int:
    """Where the last tensor ends. Raises ValueError unless each begins where the one before it ends."""
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"a tensor begins at byte {start}, the one before it ends at {end}")
        end = stop
    return end


def _entry(path: Path, key: str, row: Mapping[str, Any], data: int) -> Entry:
    """`data` is where the file's tensors begin."""
    start, end = (int(n) for n in row["data_offsets"])
    entry = Entry(path, key, tuple(int(n) for n in row["shape"]), DTYPES[row["dtype"]], offset=data + start)
    if min(0, start, *entry.shape) < 0 or end - start != entry.nbytes:
        raise ValueError(f"{key} of shape {list(entry.shape)} cannot fill bytes {start} to {end}")
    return entry


def _pickle_entries(path: Path) -> dict[str, Entry]:
    return {key: Entry(path, key, tuple(tensor.shape), tensor.dtype) for key, tensor in _tensors_of(path).items()}


def unpickled(path: Path) -> Any:
    """What a pickle holds, mapped where it is a zip file. Raises FormatError where it needs more than tensors."""
    try:
        with warnings.catch_warnings():  # about old protocols: whether they can be read is answered below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        message = f"{path.name} needs more than tensors to be read (torch's weights_only refuses it)"
        raise FormatError(message, "convert it to safetensors where you trust it") from error
    except UNPICKLING as error:
        raise FormatError(f"{path.name} is not a PyTorch file that can be read ({error!r:.200})", AGAIN) from error


def _tensors_of(path: Path) -> dict[str, Tensor]:
    content = unpickled(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise FormatError(f"{path.name} holds something else than named tensors", "give a state dict")
    return {str(key): value for key, value in content.items()}


def open_reader(path: Path) -> Reader:
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, framework="pt").get_tensor
        except SafetensorError as error:
            raise FormatError(f"{path} cannot be read ({error})", AGAIN) from error
    return _tensors_of(path).__getitem__


def fault(message: str) -> FormatError:
    return FormatError(message, AGAIN)
