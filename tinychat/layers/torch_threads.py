"""Torch's own threads beside those of the CPU kernels: they want the same cores."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """Torch computes on this thread alone: its others would go on looking for work for milliseconds.

    Meanwhile the CPU kernels' threads want those cores: it cost more than half of a 1-billion model's speed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
