"""Runs of rows that speak through the same adapter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinychat.engine.adapters import AdapterBatchMetadata, find_segments


@pytest.mark.parametrize(
    ("indices", "borders", "names"),
    [
        ([], [0], []),
        ([0], [0, 1], [0]),
        ([0, 0, 2, 2, 1, 0], [0, 2, 4, 5, 6], [0, 2, 1, 0]),
    ],
)
def test_segments_are_runs(indices: list[int], borders: list[int], names: list[int]) -> None:
    assert find_segments(indices) == (borders, names)


@given(st.lists(st.integers(0, 3), max_size=20))
def test_segments_give_the_rows_back(indices: list[int]) -> None:
    meta = AdapterBatchMetadata.of(indices)
    lengths = meta.adapter_segments.diff()
    assert torch.repeat_interleave(torch.tensor(meta.segment_indices, dtype=torch.int64), lengths).tolist() == indices
    assert meta.adapter_list == indices and meta.adapter_set == set(indices)
    assert all(a != b for a, b in zip(meta.segment_indices, meta.segment_indices[1:], strict=False))
