"""Rotary position embedding (arXiv 2104.09864) with the scalings linear, dynamic NTK, llama3 and YaRN (2309.00071).

Nothing is stored in a module: angles are made from the positions at hand, so a model can be built on the meta device.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class Rope(Protocol):
    """The fields of tinychat.config.RopeConfig that matter here."""

    @property
    def theta(self) -> float: ...
    @property
    def type(self) -> str: ...
    @property
    def factor(self) -> float: ...
    @property
    def original_max_position(self) -> int: ...
    @property
    def low_freq_factor(self) -> float: ...
    @property
    def high_freq_factor(self) -> float: ...
    @property
    def attention_factor(self) -> float | None: ...
    @property
    def beta_fast(self) -> float: ...
    @property
    def beta_slow(self) -> float: ...
    @property
    def mscale(self) -> float | None: ...
    @property
    def mscale_all_dim(self) -> float | None: ...
    @property
    def truncate(self) -> bool: ...


def cos_sin(rope: Rope, head_dim: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions `[B, T]` -> cos and sin `[B, 1, T, head_dim]`, half-rotation order, computed in fp32."""
    freqs = frequencies(rope, head_dim, positions)
    angles = positions[:, None, :, None].float() * freqs[:, None, None, :]
    angles = torch.cat((angles, angles), dim=-1)
    scale = attention_scale(rope)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[B, H, T, D]` turned by its positions' angles."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def frequencies(rope: Rope, head_dim: int, positions: Tensor) -> Tensor:
    """Angle a position of each pair of channels: `[B or 1, head_dim/2]`, fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    if rope.type == "dynamic":
        return _dynamic(rope, head_dim, exponent, positions)
    base = 1.0 / rope.theta**exponent
    scaled = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}[rope.type](rope, base)
    return scaled[None]


def attention_scale(rope: Rope) -> float:
    """YaRN's factor on cos and sin (its section 3.4); 1 for the other types."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _default(_rope: Rope, base: Tensor) -> Tensor:
    return base


def _linear(rope: Rope, base: Tensor) -> Tensor:
    return base / rope.factor


def _dynamic(rope: Rope, dim: int, exponent: Tensor, positions: Tensor) -> Tensor:
    """The base grows with the length seen so far, each row by its own: `[B, dim/2]`."""
    length = (positions.amax(1, keepdim=True) + 1).clamp(min=rope.original_max_position).float()
    growth = rope.factor * length / rope.original_max_position - (rope.factor - 1)
    return 1.0 / (rope.theta * growth ** (dim / (dim - 2))) ** exponent[None]


def _llama3(rope: Rope, base: Tensor) -> Tensor:
    """Long waves are slowed down, short ones kept, those between are blended (Llama 3.1)."""
    waves = 2 * math.pi / base
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = ((rope.original_max_position / waves - low) / (high - low)).clamp(0, 1)
    return keep * base + (1 - keep) * base / rope.factor


def _yarn(rope: Rope, base: Tensor) -> Tensor:
    """Channels that turn often are kept, slow ones interpolated, with a ramp between (YaRN, section 3.2)."""
    dim = 2 * len(base)
    low, high = (_yarn_channel(rope, dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as published: the ramp must not divide by 0
    ramp = ((torch.arange(dim // 2, device=base.device) - low) / (high - low)).clamp(0, 1)
    return base * (1 - ramp) + base / rope.factor * ramp


def _yarn_channel(rope: Rope, dim: int, turns: float) -> float:
    return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
