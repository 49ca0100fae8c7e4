"""Rounding to the nearest, as fast as a search needs it; the same numbers as tinychat_kernels.layout.quantize."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinychat_kernels.layout import Logical, QuantSpec

_CHUNK = 2**19  # weights that are worked on at once: a few temporaries of them stay in a core's cache


@dataclass(frozen=True)
class Rounding:
    """The format that weights are rounded to: spec, and the dtype of the stored scales."""

    spec: QuantSpec
    dtype: torch.dtype

    def groups(self, weight: Tensor) -> Tensor:
        """[N, K] -> fp32 `[N, K/G, G]`."""
        return weight.float().unflatten(1, (-1, self.spec.group(weight.shape[1])))

    def grid(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """[N, B, G] -> scale (rounded to dtype, held in fp32) and zero `[N, B, 1]`; the range always holds zero."""
        top = self.spec.max_q
        low, high = self._range(groups)
        scale = ((high - low) / top).to(self.dtype).float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # an all-zero group
        return scale, (-low / scale).round_().clamp_(0, top)

    def nearest(self, groups: Tensor) -> Tensor:
        """fp32 `[N, B, G]` -> the values that the rounded weights stand for."""
        scale, zero = self.grid(groups)
        return self._integers(groups, scale, zero).sub_(zero).mul_(scale)

    def logical(self, weight: Tensor) -> Logical:
        """[N, K] -> (q, scale, zero) as a checkpoint holds them."""
        pieces = [self._rounded(self.groups(rows)) for rows in row_chunks(weight)]
        q, scale, zero = (torch.cat(parts).T.contiguous() for parts in zip(*pieces, strict=True))
        return Logical(q, scale, zero)

    def _rounded(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero = self.grid(groups)
        q = self._integers(groups, scale, zero).flatten(1).to(torch.uint8)
        return q, scale.squeeze(2).to(self.dtype), zero.squeeze(2).to(torch.uint8)

    def _integers(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (groups / scale).add_(zero).round_().clamp_(0, self.spec.max_q)

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.zero_point:
            return groups.amin(2, keepdim=True).clamp_(max=0), groups.amax(2, keepdim=True).clamp_(min=0)
        top = groups.abs().amax(2, keepdim=True)
        return -top * ((self.spec.max_q + 1) / (self.spec.max_q - 1)), top


def row_chunks(weight: Tensor) -> Iterator[Tensor]:
    """Some rows of `[N, K]` at a time, in order."""
    yield from weight.split(max(1, _CHUNK // weight.shape[1]))
