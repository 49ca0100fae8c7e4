"""Packed linears of any format, seen as the AWQ GEMM layout that a model has in memory: unpacked when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tinychat.checkpoint import Index
from tinychat.errors import FormatError
from tinychat.quantization import Quantization
from tinychat.weight_files import Entry, Reader
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.formats import GEMM, Format
from tinychat_kernels.layout import pack_awq

Tensors = Mapping[str, Tensor]

DAMAGED = "download the file again, or take another checkpoint"


@dataclass(frozen=True, slots=True)
class Computed(Entry):
    """A tensor made from others of its linear when it is read. Raises FormatError where their values are wrong."""

    sources: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    make: Callable[[Tensors], Tensor] | None = None

    def read(self, open_file: Callable[[Path], Reader]) -> Tensor:
        assert self.make is not None
        try:
            return self.make({name: entry.read(open_file) for name, entry in self.sources.items()})
        except LayoutError as error:
            raise FormatError(f"{self.key} cannot be read: {error}", DAMAGED) from error


def packed_linears(index: Index, format: Format = GEMM) -> list[str]:
    """The names of the linears that are packed, in the order of the index."""
    marker = f".{next(iter(format.needs['q']))}"
    return [name.removesuffix(marker) for name in index.names() if name.endswith(marker)]


def as_gemm(index: Index, quantization: Quantization) -> Index:
    """The same index with every packed linear as qweight, qzeros and scales of AWQ GEMM. Raises FormatError."""
    stems = packed_linears(index, quantization.format)
    if quantization.format is GEMM or not stems:
        return index
    entries = {name: index.entry(name) for name in index.names()}
    first = {f"{stem}.{quantization.format.needs['q'][0]}": stem for stem in stems}
    used = {f"{stem}.{end}" for stem in stems for end in _ends(quantization)}
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name in first:
            stem = first[name]
            found |= {f"{stem}.{end}": made for end, made in _computed(stem, entries, quantization)}
        elif name not in used:
            found[name] = entry
    return Index(found)


def _ends(quantization: Quantization) -> list[str]:
    """The ends of the names of a linear's tensors, needed or not."""
    needed = [end for parts in quantization.format.needs.values() for end in parts]
    return [*quantization.format.shapes(quantization.spec, 128, 128), *needed]


def _computed(stem: str, entries: Mapping[str, Entry], quantization: Quantization) -> Iterator[tuple[str, Entry]]:
    format, spec = quantization.format, quantization.spec
    parts = {end: entries[f"{stem}.{end}"] for end in _ends(quantization) if f"{stem}.{end}" in entries}
    try:
        rows, columns = format.check_shapes({end: entry.shape for end, entry in parts.items()}, spec)
    except LayoutError as error:
        raise FormatError(f"{stem} is not as the quantization_config says: {error}", "check config.json") from error
    scales = parts[format.scale_name]
    makes = {
        "qweight": ("q", torch.int32, lambda tensors: pack_awq(format.q(tensors, spec))),
        "qzeros": ("zero", torch.int32, lambda tensors: pack_awq(format.zero(tensors, spec))),
        "scales": ("scale", scales.dtype, lambda tensors: format.scale(tensors, spec).contiguous()),
    }
    shapes = GEMM.shapes(spec, rows, columns)
    for end, (part, dtype, make) in makes.items():
        sources = {name: parts[name] for name in format.needs[part] if name in parts}
        yield end, Computed(scales.path, f"{stem}.{end}", shapes[end], dtype, sources, make)
