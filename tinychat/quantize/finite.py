"""Weights that are no numbers are refused by name, before hours of work: NaN, Inf, and what 16 bits cannot hold."""

from __future__ import annotations

from collections.abc import Iterator

from tinychat.checkpoint import rename
from tinychat.quantize.blocks import check_finite, narrowed
from tinychat.quantize.job import LAYER, TOWER_LAYER, Job, Source
from tinychat.quantize.writing import Copy


def checked_weights(job: Job, source: Source) -> Iterator[str]:
    """The name of each tensor once it is read, in small pieces. Raises ModelError for the first that is no numbers."""
    for name in source.raw.names():
        entry, layer = source.raw.entry(name), _in_layer(rename(name, source.config.layout), job, source)
        copy = Copy(entry.key, entry, source.stored(entry))
        for rows in copy.rows():
            if layer:  # it is scaled before it is stored
                check_finite(rows.float(), layer)
            else:
                narrowed(rows, copy.dtype, name)
        yield name


def _in_layer(name: str, job: Job, source: Source) -> str:
    """What a tensor of a layer that is worked on is called; nothing for one that is only copied."""
    if (match := LAYER.fullmatch(name)) and name in source.index:
        return f"layer {match[1]}, {match[2]}"
    if job.vision == "w8a8" and (match := TOWER_LAYER.fullmatch(name)):
        return f"the tower's layer {match[1]}, {match[2]}"
    return ""
