"""The head of a decoder in 8 bits, for kernels: a quarter to a half of the bytes that a token reads of it."""

from __future__ import annotations

from typing import ClassVar

from tinychat.layers.packed_linear import PackedLinear


class PackedHead(PackedLinear):
    """hidden `[..., D]` -> logits `[..., V]`."""

    NAME: ClassVar[str] = "head"
