"""The clip search of AWQ (arXiv 2306.00978): a smaller range a group, where that makes the group's output better."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.calibrate import Moments
from awq.options import Options
from awq.rounding import Rounding, row_chunks


def shrinks(options: Options) -> list[float]:
    """The ranges to try, in parts of a group's own: 1 first."""
    return [1 - i / options.clip_grid for i in range(max(1, int(options.max_shrink * options.clip_grid)))]


def best_limits(groups: Tensor, scale: Tensor, moments: Moments, rounding: Rounding, options: Options) -> Tensor:
    """fp32 `[N, B, G]`, scale `[B, G]` -> `[N, B, 1]`: the magnitude to clip each group at.

    The error is the mean over all tokens of (x . rounded - x . weight)^2 within the group, where the weights were
    multiplied by `scale` and x will be divided by it.
    """
    own = groups.abs().amax(2, keepdim=True)
    best, least = own.clone(), torch.full(groups.shape[:2], torch.inf, device=groups.device)
    for shrink in shrinks(options):
        limit = own * shrink
        delta = rounding.nearest(groups.clamp(-limit, limit)).sub_(groups).div_(scale)
        error = moments.group_errors(delta)
        better = error < least
        best[better] = limit[better]
        least = torch.where(better, error, least)
    return best


def search_clip(weight: Tensor, scale: Tensor, moments: Moments, rounding: Rounding, options: Options) -> Tensor:
    """The limits `[N, K/G]` of a weight `[N, K]` that already holds its scale `[K]`."""
    wide = scale.unflatten(0, (-1, rounding.spec.group(len(scale))))
    pieces = [best_limits(rounding.groups(rows), wide, moments, rounding, options) for rows in row_chunks(weight)]
    return torch.cat(pieces).squeeze(2)


def clipped(weight: Tensor, limits: Tensor) -> Tensor:
    """[N, K] with each group held within its limit `[N, K/G]`."""
    groups = weight.unflatten(1, (limits.shape[1], -1))
    wide = limits.to(weight)[..., None]
    return groups.clamp(-wide, wide).flatten(1)
