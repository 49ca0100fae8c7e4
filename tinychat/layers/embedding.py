"""Token embeddings in the type that they are stored in, 16 bits as a rule, whatever the model computes in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class StoredEmbedding(nn.Embedding):
    """ids -> rows in `dtype`; `weight` is a buffer and keeps its own type, and is never copied as a whole."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(weight.shape[0], weight.shape[1])
        del self.weight
        self.register_buffer("weight", weight.detach())
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)
