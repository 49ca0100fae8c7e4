"""A checkpoint as one rank of a tensor-parallel group sees it: every tensor has its own part's shape, and reads that.

Linears that are split by outputs are cut there, those that are split by inputs the other way; their bias is rank 0's
alone. Packed linears are cut at whole groups; where heads end inside one, all groups are made smaller, which changes
no weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinychat.checkpoint import EMBEDDINGS, HEAD, Index
from tinychat.config import TextConfig, VilaConfig, VisionConfig
from tinychat.errors import ModelError
from tinychat.layers.parallel import Group
from tinychat.models.shares import Share, cuts, tower_group
from tinychat.weight_files import Entry, Reader
from tinychat_kernels.layout import GROUP_SIZES, PER_WORD, QuantSpec

OUTPUTS, INPUTS = "outputs", "inputs"
DECODER = re.compile(r"llm\.model\.layers\.\d+\.(?:self_attn|mlp)\.(\w+)\.(\w+)")
TOWER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.\d+\.(?:self_attn|mlp)\.(\w+)\.(\w+)")
CUT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"), OUTPUTS),
    **dict.fromkeys(("o_proj", "down_proj", "out_proj", "fc2"), INPUTS),
}
GROUPED = ("qzeros", "scales")


@dataclass(frozen=True, slots=True)
class Part(Entry):
    """`spans` of a tensor along `dim`, and of that the `rows`; without a source, zeros."""

    source: Entry | None = None
    dim: int = 0
    spans: tuple[range, ...] = ()
    rows: tuple[int, ...] | None = None

    @property
    def files(self) -> list[Path]:
        return [] if self.source is None else self.source.files

    def read(self, open_file: Callable[[Path], Reader]) -> Tensor:
        if self.source is None:
            return torch.zeros(self.shape, dtype=self.dtype)
        found = self.source.read(open_file)
        parts = [found.narrow(self.dim, span.start, len(span)) for span in self.spans]
        if parts:
            found = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
        return found if self.rows is None else found[torch.tensor(self.rows)]


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a model is cut for one rank: its share, the tower's sizes, and the groups before and after."""

    share: Share
    head_dim: int
    vision: VisionConfig | None
    spec: QuantSpec | None
    finer: QuantSpec | None

    def spans(self, last: str) -> tuple[range, ...]:
        """The channels of a decoder's linear, by the last part of its name, that are this rank's."""
        if last in ("q_proj", "o_proj"):
            return (_scaled(self.share.heads, self.head_dim),)
        if last in ("k_proj", "v_proj"):
            return tuple(_scaled(range(head, head + 1), self.head_dim) for head in self.share.kv_heads)
        return (self.share.inner,)

    def tower_spans(self, last: str) -> tuple[range, ...]:
        """The same for the vision tower's; all of them where every rank has it whole."""
        assert self.vision is not None
        group = tower_group(self.vision, self.share.group)
        size = self.vision.intermediate_size if last in ("fc1", "fc2") else self.vision.hidden_size
        return (cuts(size, group.size())[group.rank()],)


def sharded(index: Index, cutting: Cutting) -> Index:
    """The index of a rank; names stay."""
    return Index({name: _part(name, index.entry(name), cutting) for name in index.names()})


def share_of(text: TextConfig, group: Group, spec: QuantSpec | None) -> tuple[Share, QuantSpec | None]:
    """A rank's share of a decoder, and its groups: smaller than `spec`'s where heads or the MLP would not be whole.

    Raises ModelError where the ranks cannot share the decoder.
    """
    if spec is None or spec.group_size < 0:
        return Share.of(text, group, 1 if spec is None else PER_WORD), spec
    for size in sorted((size for size in GROUP_SIZES if size <= spec.group_size), reverse=True):
        whole = Share.of(text, group, size)
        heads, kv_heads = (count * text.head_dim for count in (len(whole.heads), len(whole.kv_heads)))
        if heads % size == kv_heads % PER_WORD == 0 and text.intermediate_size // size >= group.size():
            return whole, QuantSpec(spec.bits, size, spec.zero_point)
    message = f"{group.size()} ranks would cut inside the groups of {spec.group_size} weights that share a scale"
    raise ModelError(message, "take fewer ranks, or the 16-bit model")


def shared_notes(share: Share, config: VilaConfig) -> list[str]:
    """What the user should know of how the ranks share a model."""
    vision, size = config.vision, share.group.size()
    if vision is None or tower_group(vision, share.group).size() == size:
        return []
    sizes = f"{vision.num_attention_heads} heads and {vision.intermediate_size} channels of the MLP"
    return [f"each of the {size} ranks holds the whole vision tower: they do not divide its {sizes}"]


def _part(name: str, entry: Entry, cutting: Cutting) -> Entry:
    """This rank's part of a tensor; what every rank holds whole stays as it is."""
    if name in (EMBEDDINGS, HEAD):
        return _cut(entry, 0, (cutting.share.vocabulary,))
    for pattern, spans in ((DECODER, cutting.spans), (TOWER, cutting.tower_spans)):
        if (match := pattern.fullmatch(name)) and match[1] in CUT:
            of_linear = _by_outputs if CUT[match[1]] == OUTPUTS else _by_inputs
            return of_linear(entry, match[2], spans(match[1]), cutting)
    return entry


def _by_outputs(entry: Entry, end: str, spans: tuple[range, ...], cutting: Cutting) -> Entry:
    """`end` is the tensor's name within its linear."""
    if end == "qweight":
        return _cut(entry, 1, _words(spans))
    if end in GROUPED:
        factor = _factor(cutting)
        rows = tuple(row // factor for row in range(entry.shape[0] * factor)) if factor > 1 else None
        return _cut(entry, 1, spans if end == "scales" else _words(spans), rows)
    return _cut(entry, 0, spans)


def _by_inputs(entry: Entry, end: str, spans: tuple[range, ...], cutting: Cutting) -> Entry:
    if end == "weight":
        return _cut(entry, 1, spans)
    if end == "qweight":
        return _cut(entry, 0, spans)
    if end in GROUPED and cutting.finer is not None and cutting.finer.group_size > 0:
        size, factor = cutting.finer.group_size, _factor(cutting)
        rows = tuple(row // factor for span in spans for row in range(span.start // size, span.stop // size))
        return _cut(entry, 0, (), rows)
    if end == "bias" and spans[0].start > 0:  # another rank's, who holds the first inputs
        return Part(entry.path, entry.key, entry.shape, entry.dtype)
    return entry


def _cut(entry: Entry, dim: int, spans: tuple[range, ...], rows: tuple[int, ...] | None = None) -> Part:
    shape = list(entry.shape)
    if spans:
        shape[dim] = sum(map(len, spans))
    if rows is not None:
        shape[0] = len(rows)
    return Part(entry.path, entry.key, tuple(shape), entry.dtype, entry, dim, spans, rows)


def _factor(cutting: Cutting) -> int:
    """Groups that one group on disk becomes."""
    if cutting.spec is None or cutting.finer is None or cutting.spec.group_size < 0:
        return 1
    return cutting.spec.group_size // cutting.finer.group_size


def _scaled(units: range, size: int) -> range:
    return range(units.start * size, units.stop * size)


def _words(spans: Sequence[range]) -> tuple[range, ...]:
    """Spans of 4-bit columns as those of the words that hold them."""
    return tuple(range(span.start // PER_WORD, span.stop // PER_WORD) for span in spans)
