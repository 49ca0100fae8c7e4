"""Weights that a device has no room for: they lie in RAM or on disk, and come for the time of their module's forward.

Those on disk are read from the checkpoint's own files, one block (a layer, as a rule) ahead by a thread, into two
buffers. What those files do not hold as it is (packed weights of another layout, pickles) is put aside in one file of
the cache folder, which has no name: the system deletes it with the process, however that ends.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinychat.checkpoint import Index
from tinychat.doctor import cache_folder
from tinychat.errors import CapacityError, FormatError, ModelError
from tinychat.spread import EMBEDDINGS, LAYERS, Spread
from tinychat.weight_files import AGAIN, Entry

if TYPE_CHECKING:
    from tinychat.models.vila_llama import VilaLlamaForCausalLM
    from tinychat.placement import Placement

ALIGNMENT = 64  # of a tensor in a buffer, and in the file of what is put aside
GIB = 2**30
ELSEWHERE = "free some disk, set TINYCHAT_CACHE to another one, or allow more with --max-memory"


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor's bytes on disk. `path` None: they are in the file of what was put aside."""

    path: Path | None
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


def pieces_of(index: Index, kinds: Mapping[str, torch.dtype | None], file: IO[bytes] | None) -> dict[str, Piece]:
    """Where each of these tensors can be read from; `file` takes those that have to be put aside.

    `kinds` are the names, and the dtypes that floats take on there.
    """
    found = {name: _piece(index.entry(name)) for name in kinds if index.entry(name).offset is not None}
    for name, tensor in Index({name: index.entry(name) for name in kinds if name not in found}).stream():
        assert file is not None
        kept = tensor.to(kinds[name] or tensor.dtype).contiguous()
        at = _rounded(file.tell())
        file.seek(at)
        file.write(kept.view(-1).view(torch.uint8).numpy().data)
        found[name] = Piece(None, at, tuple(kept.shape), kept.dtype, kept.nbytes)
    if file is not None:
        file.flush()
    return found


def put_aside(index: Index, kinds: Mapping[str, torch.dtype | None]) -> int:
    """Bytes of these tensors that the checkpoint's files do not hold as they are."""
    found = [(index.entry(name), kind) for name, kind in kinds.items() if index.entry(name).offset is None]
    return sum(_rounded(math.prod(entry.shape) * (kind or entry.dtype).itemsize) for entry, kind in found)


def spare_file(folder: Path, size: int) -> IO[bytes]:
    """A file without a name for so many bytes. Raises CapacityError where there is no room for them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size <= free:
            return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise CapacityError(f"weights cannot be put aside in {folder}: {error}", ELSEWHERE) from error
    message = f"{size / GIB:.3f} GiB of weights have to be put aside in {folder}, which has {free / GIB:.3f} GiB free"
    raise CapacityError(message, ELSEWHERE)


class OnDisk:
    """The blocks of a model that lie on disk, read in the order in which they were wanted the last time.

    A block's tensors are valid until another one is taken.
    """

    def __init__(self, blocks: Mapping[str, Mapping[str, Piece]], file: IO[bytes] | None = None) -> None:
        self._blocks = blocks
        self._files: dict[Path | None, int] = {} if file is None else {None: file.fileno()}
        weakref.finalize(self, _close, self._files, file)
        largest = max(map(room_of, blocks.values()), default=0)
        self._buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]
        self._slot = 0  # of the block that was taken last
        names = list(blocks)
        self._after = dict(zip(names, [*names[1:], *names[:1]], strict=True))
        self._last: str | None = None
        self._coming: tuple[str, Future[dict[str, Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1, "tinychat-offload")

    def take(self, block: str) -> dict[str, Tensor]:
        """A block's tensors as they are stored; the next one is read meanwhile. Raises ModelError, FormatError."""
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != block or coming[1].exception() is not None:
            coming = self._ask(block)
        tensors = coming[1].result()
        self._slot ^= 1
        if self._last is not None:
            self._after[self._last] = block
        self._last = block
        self._coming = self._ask(self._after[block])
        return tensors

    def _ask(self, block: str) -> tuple[str, Future[dict[str, Tensor]]]:
        return block, self._reader.submit(self._read, block, self._buffers[self._slot ^ 1])

    def _read(self, block: str, buffer: Tensor) -> dict[str, Tensor]:
        found, at = dict[str, Tensor](), 0
        for name, piece in self._blocks[block].items():
            part = buffer[at : at + piece.nbytes]
            self._fill(piece, part.numpy().data)
            found[name] = part.view(piece.dtype).view(piece.shape)
            at += _rounded(piece.nbytes)
        return found

    def _fill(self, piece: Piece, view: memoryview, start: int = 0) -> None:
        try:
            file, done = self._open(piece.path), 0
            while done < len(view):
                if not (count := os.preadv(file, [view[done:]], piece.offset + start + done)):
                    raise FormatError(f"{piece.path or 'what was put aside'} has become shorter", AGAIN)
                done += count
        except OSError as error:
            raise ModelError(f"weights cannot be read from disk any more: {error}", "see to the disk") from error

    def _open(self, path: Path | None) -> int:
        if path is not None and path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def rows(self, piece: Piece, numbers: Sequence[int]) -> Tensor:
        """Some rows `[n, D]` of a tensor `[N, D]`. Raises ModelError, FormatError."""
        found = torch.empty((len(numbers), *piece.shape[1:]), dtype=piece.dtype)
        views, size = found.view(torch.uint8).numpy(), piece.nbytes // piece.shape[0]
        for number, view in zip(numbers, views, strict=True):
            self._fill(piece, view.data, number * size)
        return found


class RowsOnDisk(nn.Embedding):
    """ids -> rows in `dtype`, read when they are looked up; `weight` is a stand-in without data."""

    def __init__(self, disk: OnDisk, piece: Piece, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(piece.shape[0], piece.shape[1], dtype=dtype)
        self.weight.requires_grad_(False)
        self._disk, self._piece = disk, piece

    def forward(self, input: Tensor) -> Tensor:
        ids, places = input.cpu().unique(return_inverse=True)
        return self._disk.rows(self._piece, ids.tolist()).to(self.weight.dtype)[places]


def _close(files: dict[Path | None, int], spare: IO[bytes] | None) -> None:
    if spare is not None:
        del files[None]
        spare.close()
    for file in files.values():
        os.close(file)


def room_of(block: Mapping[str, Piece]) -> int:
    """Bytes that a block takes in a buffer."""
    return sum(_rounded(piece.nbytes) for piece in block.values())


class Guests:
    """Weights of a module that come for the time of its forward, and inputs that are moved to its device."""

    def __init__(self, module: nn.Module, device: torch.device, home: torch.device | None) -> None:
        self.device, self.home = device, home
        self._held: dict[str, tuple[nn.Module, str, Tensor, Tensor | None]] = {}
        self._disk: OnDisk | None = None
        self._block = ""
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after, always_call=True)

    def keep(self, model: nn.Module, names: Sequence[str], disk: OnDisk | None, block: str) -> None:
        """Take these tensors from the model: of RAM where it has them, else of this block on disk."""
        self._disk, self._block = disk, block
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
            assert tensor is not None
            absent = tensor.detach().to("meta")
            self._held[name] = (module, leaf, absent, None if tensor.is_meta else tensor.detach())
        self._empty()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        from accelerate.utils import send_to_device

        if self._held:
            read = self._disk.take(self._block) if self._disk is not None else {}
            for name, (where, leaf, absent, held) in self._held.items():
                tensor = read[name] if held is None else held
                kind = absent.dtype if leaf in where._parameters else tensor.dtype
                _put(where, leaf, tensor.to(self.device, kind))
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        from accelerate.utils import send_to_device

        self._empty()
        return output if self.home is None else send_to_device(output, self.home)

    def _empty(self) -> None:
        for module, leaf, absent, _ in self._held.values():
            _put(module, leaf, absent)


def _put(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


@dataclass(frozen=True, slots=True)
class Offloading:
    """A model's places, and what reads the tensors that stay on disk; of `embeddings` single rows."""

    spread: Spread
    disk: OnDisk | None
    embeddings: Piece | None

    def dispatch(self, model: VilaLlamaForCausalLM, dtype: torch.dtype) -> None:
        """Make a model compute where its tensors are, or come to. It keeps no gradients from then on."""
        spread = self.spread
        model.requires_grad_(False)
        if self.embeddings is not None and self.disk is not None:
            model.set_submodule(EMBEDDINGS, RowsOnDisk(self.disk, self.embeddings, dtype))
        for block, names in spread.blocks.items():
            away = [name for name in names if spread.is_away(name)]
            if block and (away or spread.moves):
                home = None if block.startswith(LAYERS) else spread.main
                guests = Guests(model.get_submodule(block), spread.runs[block], home)
                on_disk = any(name in spread.stored for name in away)
                guests.keep(model, away, self.disk if on_disk else None, block)
        model.home, model.kv_devices = spread.main, spread.layers


def offloading(model: nn.Module, index: Index, placement: Placement, dtype: torch.dtype) -> Offloading | None:
    """Where an empty model's parts are to be; None where it is on one device.

    Raises UsageError and ModelError for a map that does not fit it, CapacityError for a disk without room.
    """
    if not isinstance(placement.device_map, Mapping):
        return None
    spread = Spread.of(model, placement.device_map, index)
    if not placement.is_spread:
        return None
    kinds = {theirs: dtype if name in spread.floats else None for name, theirs in spread.stored.items()}
    if not kinds:
        return Offloading(spread, None, None)
    folder = cache_folder() / "offload"
    size = put_aside(index, kinds)
    file = spare_file(folder, size) if size else None
    try:
        pieces = pieces_of(index, kinds, file)
    except OSError as error:
        raise CapacityError(f"weights cannot be put aside in {folder}: {error}", ELSEWHERE) from error
    blocks: dict[str, dict[str, Piece]] = {}
    for block, names in spread.blocks.items():
        if on_disk := {name: pieces[spread.stored[name]] for name in names if name in spread.stored}:
            blocks[block] = on_disk
    embeddings = blocks.pop(EMBEDDINGS, {})
    return Offloading(spread, OnDisk(blocks, file), next(iter(embeddings.values()), None))


def _piece(entry: Entry) -> Piece:
    assert entry.offset is not None
    return Piece(entry.path, entry.offset, entry.shape, entry.dtype, entry.nbytes)


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
