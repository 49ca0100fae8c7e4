"""A model folder's tensors: an index made from file headers, foreign names repaired, streamed into an empty model.

Nothing here runs code from a file: safetensors, or pickles under torch's weights_only. A tensor's data is read when
it is asked for, one tensor at a time.
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinychat.errors import FormatError, ModelError
from tinychat.weight_files import AGAIN, Entry, Reader, entries_of, fault, open_reader, weight_files

Progress = Callable[[int, int], None]
Devices = torch.device | str | Mapping[str, torch.device | str | int]

SHARD_SIZE = 2**30  # a shard is held in memory while it is written
EMBEDDINGS, NORM, HEAD = (f"llm.{name}.weight" for name in ("model.embed_tokens", "model.norm", "lm_head"))
MAPPED = 2**28  # bytes of a file that are mapped before they are given back
LISTED = 20  # names of each kind in an error

# Layout -> rules (a name's beginning on disk, its beginning in memory). The first rule that matches is used, and a
# name that is already ours passes unchanged.
_DECODER = ((r"model\.(?=embed_tokens|layers|norm)", "llm.model."), (r"lm_head\.", "llm.lm_head."))
_TOWER = ((r"(model\.)?(vision_tower\.)+(vision_model\.)?", "vision_tower.vision_model."),)
RENAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vila": (
        *_TOWER,
        (r"mm_projector\.layers\.(?=weight|bias)", "mm_projector.layers.0."),
        (r"mm_projector\.image_newline$", "image_newline"),
    ),
    "llava": (
        *_TOWER,
        (r"(model\.)?mm_projector\.(?=\d)", "mm_projector.layers."),
        (r"(model\.)?mm_projector\.(?=weight|bias)", "mm_projector.layers.0."),
        *_DECODER,
    ),
    "llava_hf": (
        *_TOWER,
        (r"(model\.)?multi_modal_projector\.linear_1\.", "mm_projector.layers.0."),
        (r"(model\.)?multi_modal_projector\.linear_2\.", "mm_projector.layers.2."),
        (r"(model\.language_model|language_model\.model)\.", "llm.model."),
        (r"language_model\.lm_head\.", "llm.lm_head."),
        (r"model\.image_newline$", "image_newline"),
        *_DECODER,
    ),
    "text": _DECODER,
}
# In-memory names that published checkpoints carry and no computation needs.
HARMLESS = re.compile(
    r".*\.rotary_emb\.inv_freq"
    r"|.*\.position_ids"
    r"|vision_tower\.vision_model\.(head|text_model|text_projection|visual_projection)\..*"
    r"|vision_tower\.vision_model\.(logit_scale|logit_bias)"
)


def rename(name: str, layout: str) -> str:
    """A tensor's name in memory, from its name in a checkpoint of this layout. Idempotent."""
    for pattern, ours in RENAMES[layout]:
        renamed, count = re.subn(f"^(?:{pattern})", ours, name)
        if count:
            return renamed
    return name


class Index:
    """Tensors by name, known from the files' headers. Data is memory-mapped when a tensor is asked for."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)
        self._readers: dict[Path, Reader] = {}

    @classmethod
    def of(cls, *parts: Path | tuple[str, Path]) -> Index:
        """The tensors of folders, each `(prefix, folder)` under its prefix. Raises one FormatError with all faults."""
        named = [part if isinstance(part, tuple) else ("", part) for part in parts]
        found: defaultdict[str, list[Entry]] = defaultdict(list)
        problems: list[FormatError] = []
        for prefix, folder in named:
            for path, listed in weight_files(folder, problems).items():
                entries = entries_of(path, problems)
                lost = sorted(listed - entries.keys())
                problems += [fault(f"{path.name} lacks {key}, which the index puts there") for key in lost]
                for key, entry in entries.items():
                    found[prefix + key].append(entry)
        several = {name: entries for name, entries in found.items() if len(entries) > 1}
        problems += [fault(f"{name} is in {_names(entries)}") for name, entries in several.items()]
        if problems:
            where = ", ".join(str(folder) for _, folder in named)
            remedies = {problem.remedy for problem in problems}
            remedy = remedies.pop() if len(remedies) == 1 else AGAIN
            found_wrong = _cut([problem.message for problem in problems])
            raise FormatError(f"the weights in {where} cannot be read: {found_wrong}", remedy)
        return cls({name: entries[0] for name, entries in found.items()})

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> Entry:
        """What the header says of a tensor. Raises ModelError where there is no such tensor."""
        if name not in self._entries:
            raise ModelError(f"the checkpoint has no tensor {name}", "check that config.json belongs to these weights")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as they are on disk."""
        return sum(entry.nbytes for entry in self._entries.values())

    def get(self, name: str) -> Tensor:
        """One tensor, memory-mapped where the file allows it: taking a slice of it reads that slice alone."""
        return self.entry(name).read(_opener(self._readers))

    def close(self) -> None:
        """Let go of the files that are open; they are opened again where a tensor is asked for."""
        self._readers.clear()

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor), file by file; a file is closed before the next one is opened, and now and then besides.

        A packed linear that lies across two files holds both.
        """
        readers: dict[Path, Reader] = {}
        mapped = 0
        for name, entry in self._entries.items():
            if entry.path not in readers or (mapped > MAPPED and entry.path.suffix == ".safetensors"):
                readers.clear()
                mapped = 0
            yield name, entry.read(_opener(readers))
            mapped += entry.nbytes

    def files(self, name: str) -> list[Path]:
        """The files that a tensor is read from."""
        return self.entry(name).files

    def renamed(self, layout: str) -> Index:
        """The same tensors under their names in memory, without the harmless extras. Raises ModelError on doubles."""
        ours, doubles = _by_our_name(self.names(), layout)
        if doubles:
            raise ModelError(f"tensors come twice: {_cut(doubles)}", "remove one of the two from the checkpoint")
        return Index({name: self._entries[theirs] for name, theirs in ours.items()})


def _opener(readers: dict[Path, Reader]) -> Callable[[Path], Reader]:
    """What opens a file, or finds it among those that are open."""

    def reader(path: Path) -> Reader:
        if path not in readers:
            readers[path] = open_reader(path)
        return readers[path]

    return reader


def open_model(folder: Path, layout: str, tower: Path | None = None) -> Index:
    """The index of a model folder: a VILA folder's three parts under their prefixes, or the folder itself.

    `tower` is the folder of a vision tower that a `llava` checkpoint keeps elsewhere.
    """
    if layout == "vila" and (folder / "llm").is_dir():
        names = [name for name in ("llm", "vision_tower", "mm_projector") if (folder / name).is_dir()]
        return Index.of(*((f"{name}.", folder / name) for name in names))
    return Index.of(folder, *([("vision_tower.", tower)] if tower else []))


@dataclass(frozen=True, slots=True)
class KeyReport:
    """A checkpoint's names against a model's. `found` maps a name in memory to its name on disk."""

    found: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    duplicate: tuple[str, ...]
    misshapen: tuple[str, ...]

    def check(self) -> None:
        """Raise one ModelError that lists every tensor that is wrong."""
        kinds = {name: getattr(self, name) for name in ("missing", "unexpected", "duplicate", "misshapen")}
        wrong = [f"{len(names)} {kind}: {_cut(names)}" for kind, names in kinds.items() if names]
        if wrong:
            message = f"the weights do not fit the config ({'; '.join(wrong)})"
            raise ModelError(message, "check that config.json and the weights belong together")


def compare(model: nn.Module, index: Index, layout: str) -> KeyReport:
    """What of `model` is in the checkpoint, from headers alone. Of tied parameters one name suffices."""
    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    ties = _ties(wanted)
    ours, doubles = _by_our_name(index.names(), layout)
    here = {name: theirs for name, theirs in ours.items() if name in wanted}
    covered = {id(wanted[name]) for name in here}
    spare = {name for names in ties.values() for name in [n for n in names if n in here][1:]}
    return KeyReport(
        found={name: theirs for name, theirs in here.items() if name not in spare},
        missing=tuple(name for name, tensor in wanted.items() if id(tensor) not in covered),
        unexpected=tuple(theirs for name, theirs in ours.items() if name not in wanted),
        duplicate=tuple(doubles),
        misshapen=tuple(text for name, theirs in here.items() if (text := _misfit(name, index.entry(theirs), wanted))),
    )


def stream_into(
    model: nn.Module,
    index: Index,
    layout: str,
    dtype: torch.dtype | None = None,
    device: Devices = "cpu",
    progress: Progress | None = None,
    *,
    skipped: Collection[str] = (),
    stored: Collection[str] = (),
) -> None:
    """Fill a model on the meta device, tensor by tensor: the peak is the model plus one tensor.

    Parameters become `dtype`, but for those in `stored`; buffers (packed weights, scales) stay as on disk. `device` may
    map prefixes to devices. What is named in `skipped` is somebody else's to fill.
    Raises ModelError, before any data is read, with all missing, unexpected, duplicate and misshapen tensors.
    """
    report = compare(model, index, layout)
    report.check()
    ours = {theirs: name for name, theirs in report.found.items() if name not in skipped}
    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    ties = _ties(wanted)
    done = 0
    for theirs, tensor in index.stream():
        if (name := ours.get(theirs)) is None:
            continue
        old = wanted[name]
        cast = isinstance(old, nn.Parameter) and name not in stored
        kind = (dtype or old.dtype) if cast else tensor.dtype
        _assign(model, ties[id(old)], old, tensor.to(_device_of(name, device), kind, copy=True))
        del tensor
        done += 1
        if progress is not None:
            progress(done, len(ours))


class Group(Protocol):
    """The ranks that share a layer; torch.distributed's ProcessGroup is one."""

    def rank(self) -> int: ...

    def size(self) -> int: ...


class Weights:
    """Tensors under a prefix for a module that fills itself, each rank taking its slice. No group = one rank.

    What is given is copied once, out of the mapped file and into its dtype: a rank never holds more of a tensor.
    """

    def __init__(
        self, index: Index, prefix: str = "", group: Group | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.index = index
        self.prefix = prefix
        self.dtype = dtype
        self.group = group
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)

    def get(self, name: str) -> Tensor:
        """The whole tensor, in this object's dtype."""
        return self._own(self._mapped(name))

    def get_sharded(self, name: str, dim: int) -> Tensor:
        """This rank's equal part along `dim`. Raises ModelError where the ranks do not divide the size."""
        return self._own(self._part(name, dim))

    def get_multi_sharded(self, names: Sequence[str], dim: int) -> Tensor:
        """This rank's parts of several tensors, joined along `dim`: slices first, so that q, k and v stay whole."""
        parts = [self._part(name, dim) for name in names]
        if len({(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) > 1:
            shapes = ", ".join(f"{self._full(name)} {list(self._mapped(name).shape)}" for name in names)
            raise ModelError(f"{shapes} do not join along dim {dim}", "check that these weights are whole")
        lengths = [part.shape[dim] for part in parts]
        shape = list(parts[0].shape)
        shape[dim] = sum(lengths)
        dtype = functools.reduce(torch.promote_types, (self._kind(part) for part in parts))
        whole = torch.empty(shape, dtype=dtype)
        for place, part in zip(whole.split(lengths, dim), parts, strict=True):
            place.copy_(part)
        return whole

    def _part(self, name: str, dim: int) -> Tensor:
        """This rank's slice of the mapped file."""
        tensor = self._mapped(name)
        if (length := tensor.shape[dim]) % self.size:
            message = f"{self._full(name)} has size {length} along dim {dim}, which {self.size} ranks do not divide"
            raise ModelError(message, f"use a number of ranks that divides {length}")
        part = length // self.size
        return tensor.narrow(dim, self.rank * part, part)

    def _full(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def _mapped(self, name: str) -> Tensor:
        return self.index.get(self._full(name))

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._kind(tensor), copy=True, memory_format=torch.contiguous_format)

    def _kind(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype


def write_safetensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_size: int = SHARD_SIZE) -> list[Path]:
    """Write model.safetensors, or shards and their index, and remove what an earlier save left. Returns the files.

    Everything is written beside and renamed at the end: a folder holds the old weights or the new ones. At most one
    shard is in memory. Raises ModelError for a name that comes twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[Path, list[str]]] = []
    total = 0
    try:
        for shard in _shards(tensors, shard_size):
            path = folder / f".weights-{len(shards)}.tmp"
            shards.append((path, list(shard)))
            total += sum(tensor.nbytes for tensor in shard.values())
            path.touch()
            mode = path.stat().st_mode
            save_file(shard, path, metadata={"format": "pt"})
            path.chmod(mode)  # as the umask says; save_file makes files for their owner alone
        return _publish(folder, shards, total)
    finally:
        for path, _ in shards:
            path.unlink(missing_ok=True)


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_size: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise ModelError(f"tensor {name} comes twice", "give every tensor its own name")
        seen.add(name)
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_size:
            yield shard
            shard = {}
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        shared = any(storage == other.untyped_storage().data_ptr() for other in shard.values())
        shard[name] = tensor.clone() if shared else tensor  # safetensors refuses two tensors of one memory
    yield shard


def _publish(folder: Path, shards: Sequence[tuple[Path, list[str]]], total: int) -> list[Path]:
    count = len(shards)
    final = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = [folder / name for name in (final if count > 1 else ["model.safetensors"])]
    index = folder / "model.safetensors.index.json"
    stale = {*folder.glob("model*.safetensors"), index} - set(files)
    for (path, _), file in zip(shards, files, strict=True):
        path.replace(file)
    if count > 1:
        weight_map = {name: file.name for (_, names), file in zip(shards, files, strict=True) for name in names}
        beside = folder / ".index.tmp"
        beside.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
        beside.replace(index)
        stale.discard(index)
    for path in stale:
        path.unlink(missing_ok=True)
    return files


def _by_our_name(names: Iterable[str], layout: str) -> tuple[dict[str, str], list[str]]:
    """Our name -> their name without the harmless ones, and sentences about those that collide."""
    theirs: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        if not HARMLESS.fullmatch(ours := rename(name, layout)):
            theirs[ours].append(name)
    doubles = [f"{ours} (as {' and '.join(several)})" for ours, several in theirs.items() if len(several) > 1]
    return {ours: several[0] for ours, several in theirs.items()}, doubles


def _misfit(name: str, entry: Entry, wanted: Mapping[str, Tensor]) -> str:
    """What keeps a tensor on disk from being the model's own, or nothing."""
    needed = wanted[name]
    if entry.shape != tuple(needed.shape):
        return f"{name} is {list(entry.shape)}, {list(needed.shape)} is needed"
    if entry.dtype.is_floating_point != needed.dtype.is_floating_point:
        return f"{name} is {entry.dtype}, {needed.dtype} is needed"
    return ""


def _ties(wanted: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Names by the identity of their tensor: tied parameters share one."""
    ties: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in wanted.items():
        ties[id(tensor)].append(name)
    return ties


def _assign(model: nn.Module, names: Iterable[str], old: Tensor, new: Tensor) -> None:
    """Put one tensor under all its names, as the kind of thing that was there."""
    value = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for name in names:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, value)


def _device_of(name: str, device: Devices) -> torch.device:
    if not isinstance(device, Mapping):
        return torch.device(device)
    prefixes = [prefix for prefix in device if not prefix or f"{name}.".startswith(f"{prefix}.")]
    if not prefixes:
        raise ModelError(f"the device map has no device for {name}", "add the module, or an entry '' for the rest")
    return torch.device(device[max(prefixes, key=len)])


def _names(entries: Iterable[Entry]) -> str:
    return " and ".join(str(entry.path) for entry in entries)


def _cut(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
