"""A float model becomes a 4-bit one: in memory, or streamed block by block from one folder into another."""

from __future__ import annotations

from tinychat.quantize.nearest import SPARED, quantize_to_nearest

__all__ = ["SPARED", "quantize_to_nearest"]
