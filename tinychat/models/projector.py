"""The multimodal projectors of LLaVA and VILA: vision features -> rows of the decoder's width.

The layer numbers are those of the checkpoints (VILA's `mm_projector.layers.N`).
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from transformers.activations import ACT2FN

from tinychat.config import ProjectorConfig, TokenOrder
from tinychat.errors import ModelError

# Widths between the input block and the output, in units of the tower's width Dv: "9/1" is 9 Dv. The last two linears
# always end in the decoder's width.
_DOWNSAMPLE_WIDTHS: dict[str, tuple[tuple[int, int], ...]] = {
    "mlp_downsample": ((4, 1),),
    "mlp_downsample_2x2_fix": ((4, 1),),
    "mlp_downsample_3x3_fix": ((9, 1), (3, 1)),
    "mlp_downsample_3x3_s2": ((9, 1), (3, 1), (1, 1), (1, 3)),
    "mlp_downsample_3x3_s2_new": ((9, 1), (4, 1), (2, 1), (1, 1), (1, 3)),
}


class Downsample(nn.Module):
    """[N, s*s, Dv] -> [N, ceil(s/b)^2, b*b*Dv]: squares of b x b patches become one row, zero-padded at the edges.

    Channels are joined row by row inside a square. The squares are read row by row, or column by column as VILA-1.5
    was trained.
    """

    def __init__(self, block: int, token_order: TokenOrder) -> None:
        super().__init__()
        self.block = block
        self.token_order = token_order

    def forward(self, x: Tensor) -> Tensor:
        count, patches, width = x.shape
        side, b = round(patches**0.5), self.block
        if side * side != patches:
            raise ModelError(f"{patches} features do not form a square grid", "use select_feature 'patch' for CLIP")
        missing = -side % b
        grid = nn.functional.pad(x.reshape(count, side, side, width), (0, 0, 0, missing, 0, missing))
        n = (side + missing) // b
        squares = grid.reshape(count, n, b, n, b, width).permute(0, 1, 3, 2, 4, 5)
        if self.token_order == "column":
            squares = squares.transpose(1, 2)
        return squares.reshape(count, n * n, b * b * width)


class Projector(nn.Module):
    """features `[N, n, Dv]` -> rows `[N, m, D]`."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(*_layers(config))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def _layers(config: ProjectorConfig) -> list[nn.Module]:
    if config.type == "identity":
        return []
    if config.type == "linear":
        return [nn.Linear(config.mm_hidden_size, config.hidden_size, bias=config.bias)]
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", config.type):
        return _mlp(config, int(match[1]))
    if config.type in _DOWNSAMPLE_WIDTHS:
        return _downsample(config)
    known = ", ".join(("identity", "linear", "mlpNx_gelu", *_DOWNSAMPLE_WIDTHS))
    raise ModelError(f"the projector type {config.type!r} is not supported", f"works: {known}")


def _mlp(config: ProjectorConfig, depth: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size, bias=config.bias)]
    for _ in range(depth - 1):
        layers += [ACT2FN[config.act], nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)]
    return layers


def _downsample(config: ProjectorConfig) -> list[nn.Module]:
    fractions = _DOWNSAMPLE_WIDTHS[config.type]
    inputs = [config.mm_hidden_size * top // bottom for top, bottom in fractions]
    outputs = [*inputs[1:], config.hidden_size]
    layers: list[nn.Module] = [Downsample(config.block, config.token_order)]
    for width, out in zip(inputs, outputs, strict=True):
        layers += [nn.LayerNorm(width), nn.Linear(width, out), ACT2FN[config.act]]
    return [*layers, nn.Linear(config.hidden_size, config.hidden_size)]
