"""Rounding that makes up for its own errors (GPTQ, arXiv 2210.17323), on a grid that is already chosen.

One input after another is rounded; what its rounding does to the output is taken back, as well as can be, by the inputs
that are not rounded yet. The grid (scale and zero of each group) stays as the scale and clip searches left it, so that
the inputs may be visited in any order: the loudest come first, and the file needs no g_idx.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awq.errors import CalibrationError
from awq.rounding import Rounding
from tinychat_kernels.layout import Logical

DAMPING = 0.01  # of the mean square of an input, added to each: fewer tokens than inputs must not be trusted wholly
BLOCK = 128  # inputs whose errors are gathered before the rest of the weight is touched


@dataclass(frozen=True)
class Dependence:
    """How the inputs of a linear depend on each other: the order `[K]` to visit them in, and the upper Cholesky factor
    `[K, K]` of the inverse of their damped products in that order."""

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, products: Tensor) -> Dependence:
        """From the mean `[K, K]` of x x^T; silent inputs count for themselves. Raises CalibrationError for Inf, NaN."""
        if not bool(torch.isfinite(products).all()):
            raise CalibrationError("the squares of a linear's inputs are beyond float32", "check the model's weights")
        order = torch.argsort(torch.diagonal(products), descending=True, stable=True)
        damped = products[order[:, None], order]
        loudness = torch.diagonal(damped)
        more = DAMPING * loudness.mean()
        loudness += more
        loudness += (loudness == 0).to(loudness)
        factor, failed = _inverse_factor(damped)
        while failed:  # float32 was too coarse for inputs that depend on each other this much: trust them less
            more = 2 * more
            loudness += more
            factor, failed = _inverse_factor(damped)
        return cls(order, factor)


def _inverse_factor(damped: Tensor) -> tuple[Tensor, bool]:
    """The upper Cholesky factor of the inverse, and whether one of the two factorings failed."""
    lower, first = torch.linalg.cholesky_ex(damped)
    factor, second = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return factor, bool(first) or bool(second) or not bool(torch.isfinite(factor).all())


def compensated(weight: Tensor, inputs: Dependence, grid: Logical, rounding: Rounding) -> Logical:
    """Round a weight `[N, K]` to the scales and zeros of `grid`; q is chosen anew."""
    order, factor = inputs.order, inputs.factor
    groups = order // rounding.spec.group(weight.shape[1])
    rest = weight.float().T[order]
    q = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        end = min(start + BLOCK, len(rest))
        places = groups[start:end]
        grids = grid.scale[places].float(), grid.zero[places].float()
        within = factor[start:end, start:end]
        q[start:end], errors = _round_block(rest[start:end], within, grids, rounding.spec.max_q)
        rest[end:] -= factor[start:end, end:].T @ errors
    out = torch.empty_like(grid.q)
    out[order] = q.to(torch.uint8)
    return Logical(out, grid.scale, grid.zero)


def _round_block(rest: Tensor, factor: Tensor, grids: tuple[Tensor, Tensor], max_q: int) -> tuple[Tensor, Tensor]:
    """q `[B, N]` of some inputs' weights `[B, N]`, and each one's error in units of its pivot.

    An input is brought up to date when its turn comes: vectors of N numbers are worked on, never the whole block.
    """
    scale, zero = grids
    q, errors = torch.empty_like(rest), torch.empty_like(rest)
    for i, pivot in enumerate(factor.diagonal().tolist()):
        row = rest[i] - factor[:i, i] @ errors[:i]
        q[i] = (row / scale[i]).add_(zero[i]).round_().clamp_(0, max_q)
        errors[i] = row.sub_((q[i] - zero[i]).mul_(scale[i])).div_(pivot)
    return q, errors
