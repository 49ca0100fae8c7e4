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
from tinychat_kernels.layout import Logical, QuantSpec, dequantize, pack_awq

Tensors = Mapping[str, Tensor]

ROWS = 1024  # outputs of a head that are dequantized at once
DAMAGED = "download the file again, or take another checkpoint"


@dataclass(frozen=True, slots=True)
class Computed(Entry):
    """A tensor made from others of its linear when it is read. Raises FormatError where their values are wrong."""

    sources: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    make: Callable[[Tensors], Tensor] | None = None

    @property
    def files(self) -> list[Path]:
        return [entry.path for entry in self.sources.values()]

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
    """The same index with every packed linear as qweight, qzeros and scales of AWQ GEMM. Raises FormatError.

    A packed head is one float32 weight, which becomes the model's dtype as it is loaded.
    """
    stems = [stem for stem in packed_linears(index, quantization.format) if not _stays(stem, quantization)]
    entries = {name: index.entry(name) for name in index.names()}
    first = {f"{stem}.{quantization.format.needs['q'][0]}": stem for stem in stems}
    used = {f"{stem}.{end}" for stem in stems for end in _ends(quantization)}
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name in first:
            stem = first[name]
            make = _dequantized if is_head(stem) else _computed
            found |= {f"{stem}.{end}": made for end, made in make(stem, entries, quantization)}
        elif name not in used:
            found[name] = entry
    return Index(found) if stems else index


def is_head(stem: str) -> bool:
    """Whether a linear, by its name in any layout, gives the logits."""
    return stem.rpartition(".")[2] == "lm_head"


def _stays(stem: str, quantization: Quantization) -> bool:
    return quantization.format is GEMM and not is_head(stem)


def _ends(quantization: Quantization) -> list[str]:
    """The ends of the names of a linear's tensors, needed or not."""
    needed = [end for parts in quantization.format.needs.values() for end in parts]
    return [*quantization.format.shapes(quantization.spec, 128, 128), *needed]


def _stored(stem: str, quantization: Quantization) -> tuple[Format, QuantSpec]:
    """How a linear is stored."""
    if is_head(stem) and quantization.head is not None:
        return quantization.head_format, quantization.head
    return quantization.format, quantization.spec


def _parts(
    stem: str, entries: Mapping[str, Entry], quantization: Quantization
) -> tuple[dict[str, Entry], tuple[int, int]]:
    """A linear's tensors by the ends of their names, and its inputs and outputs. Raises FormatError."""
    format, spec = _stored(stem, quantization)
    parts = {end: entries[f"{stem}.{end}"] for end in _ends(quantization) if f"{stem}.{end}" in entries}
    try:
        size = format.check_shapes({end: entry.shape for end, entry in parts.items()}, spec)
        if not is_head(stem):
            GEMM.check(spec, *size)
        return parts, size
    except LayoutError as error:
        raise FormatError(f"{stem} is not as the quantization_config says: {error}", "check config.json") from error


def _dequantized(stem: str, entries: Mapping[str, Entry], quantization: Quantization) -> Iterator[tuple[str, Entry]]:
    format, spec = _stored(stem, quantization)
    parts, (rows, columns) = _parts(stem, entries, quantization)

    def make(tensors: Tensors) -> Tensor:
        return dequantize_in_slices(format.unpack(tensors, spec))

    path = parts[format.scale_name].path
    yield "weight", Computed(path, f"{stem}.weight", (columns, rows), torch.float32, parts, make)


def dequantize_in_slices(logical: Logical) -> Tensor:
    """fp32 `[N, K]`, without copies of that size on the way."""
    out = torch.empty(logical.q.shape[::-1])
    for start in range(0, len(out), ROWS):
        part = Logical(*(tensor[:, start : start + ROWS] for tensor in logical))
        out[start : start + ROWS] = dequantize(part, torch.float32)
    return out


def _computed(stem: str, entries: Mapping[str, Entry], quantization: Quantization) -> Iterator[tuple[str, Entry]]:
    format, spec = quantization.format, quantization.spec
    parts, (rows, columns) = _parts(stem, entries, quantization)
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
