"""What a search may be told."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from awq.errors import OptionsError
from tinychat_kernels.layout import QuantSpec


@dataclass(frozen=True)
class Options:
    """How to search. Up to `dtype` the defaults are the paper's (arXiv 2306.00978); the others go past it or save time.

    scale_grid: exponents tried for the scales; 1 = no scaling
    clip_grid, max_shrink: a group's range is tried at 1, 1 - 1/clip_grid, ..., down to 1 - max_shrink of its own
    clip: whether ranges are clipped at all
    dtype: what scales are stored in, and norms and biases where nothing else is said; None = as the block's own
    duo: scales weigh the weights' magnitudes against the activations' (x^r / w^(1-r))
    compensate: what rounding an input does is taken back by those not rounded yet (GPTQ, arXiv 2210.17323)
    loss_tokens: whole sequences of about so many tokens judge the modules that must be run; None = all of them
    sketch_rows: rows that stand for all tokens where a linear has more inputs than that (see awq.calibrate.Sketch)
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    scale_grid: int = 20
    clip_grid: int = 20
    max_shrink: float = 0.5
    clip: bool = True
    dtype: torch.dtype | None = None
    duo: bool = True
    compensate: bool = True
    loss_tokens: int | None = 2048
    sketch_rows: int = 1024

    def __post_init__(self) -> None:
        for name in ("scale_grid", "clip_grid", "loss_tokens", "sketch_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionsError(f"{name} is {value}, it must be 1 or more", f"give a {name} of at least 1")
        if not 0 <= self.max_shrink < 1:
            raise OptionsError(f"max_shrink is {self.max_shrink}, it must be from 0 to below 1", "the paper's is 0.5")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise OptionsError(f"dtype is {self.dtype}, scales need a float type", "use torch.float16 or bfloat16")
