"""Which adapter each row of a batch speaks through, as runs of equal rows.

After LoRAX's AdapterBatchMetadata: 0 is the base model. Segments are runs, no sorted groups: one adapter may have many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdapterBatchMetadata:
    """adapter_indices int64 `[B]`, one a row; `adapter_segments` int32 `[S + 1]` are the borders of its runs."""

    adapter_indices: Tensor
    adapter_set: frozenset[int]
    adapter_segments: Tensor
    segment_indices: tuple[int, ...]

    @classmethod
    def of(cls, indices: Sequence[int]) -> AdapterBatchMetadata:
        """Of the rows' adapters, in order."""
        segments, names = find_segments(indices)
        borders = torch.tensor(segments, dtype=torch.int32)
        return cls(torch.tensor(indices, dtype=torch.int64), frozenset(indices), borders, tuple(names))

    @property
    def adapter_list(self) -> list[int]:
        """One a row."""
        return [int(index) for index in self.adapter_indices]


def find_segments(indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Borders and adapters of the runs of equal indices: [0, 0, 2, 2, 1] -> ([0, 2, 4, 5], [0, 2, 1])."""
    borders, names = [0], list[int]()
    for index, run in groupby(indices):
        names.append(index)
        borders.append(borders[-1] + len(list(run)))
    return borders, names
