"""Weights as the CUDA kernels read them: tiles of 16 outputs times 64 inputs, the same bytes for one row and for many.

A tile is 512 bytes, 16 for each of 32 lanes: just what the lane feeds to four products of 16 inputs (csrc/cuda/
w4_tiles.cuh has the figure). Two tiles are a unit of 128 inputs; an 8-bit weight q lies in two planes of a unit,
q = 16 (high - 8) + low. A group's scale and zero point share a word: the scale as fp32, whose lowest 8 bits it does not
need and which hold the zero point.

Outputs are padded to a multiple of 16 and inputs to one of 128, with weights that are exactly zero. What is packed is
unpacked exactly; what the layout cannot hold is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import GROUP_SIZES, PER_ROW, Logical, QuantSpec, check_values

TILE = 16  # outputs
UNIT = 128  # inputs
LANES, WORDS = 32, 4  # of a tile
MIDDLE = 128  # added to an 8-bit weight before it is cut into planes
HIGH_ZERO = 8  # what is taken off its upper half
SLICE = 2048  # outputs packed at a time, which bounds the memory that packing takes
ZERO_BITS = 0xFF  # of a scale's word


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights in tiles: words int32 `[N/16, K/128, planes, 2, 32, 4]`, scales int32 `[N/16, K/G, 8, 2]`.

    `inputs` and `outputs` are the linear's own; the tensors hold them padded. `scale` is the dtype that scales had.
    """

    words: Tensor
    scales: Tensor
    inputs: int
    outputs: int
    group: int
    scale: torch.dtype

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 4 * self.words.shape[2]

    @property
    def units(self) -> int:
        """Units of 128 inputs, the last one padded."""
        return self.words.shape[1]


def pack(logical: Logical, spec: QuantSpec) -> Packed:
    """(q, scale, zero) -> tiles, exactly, on the device of q. Raises LayoutError."""
    inputs, outputs = logical.q.shape
    spec.group(inputs)
    check_values(logical, spec)
    made = _empty(inputs, outputs, 4, spec.group_size, logical.scale.dtype, logical.q.device)
    for start in range(0, outputs, SLICE):
        part = slice(start, start + SLICE)
        tiles = slice(start // TILE, (start + SLICE) // TILE)
        made.words[tiles, :, 0] = _words(_whole(logical.q[:, part], logical.zero[-1:, part], made.units))
        made.scales[tiles] = _scales(logical.scale[:, part], logical.zero[:, part], made)
    return made


def unpack(packed: Packed, spec: QuantSpec) -> Logical:
    """Tiles -> (q, scale, zero) of the spec's groups, exactly what was packed. Raises LayoutError for 8-bit tiles."""
    if packed.bits != 4:
        raise LayoutError(f"the tiles hold weights of {packed.bits} bits, not of 4")
    scale, zero = _read_scales(packed, spec.groups(packed.inputs))
    q = _nibbles(packed.words[:, :, 0])[: packed.inputs, : packed.outputs].contiguous()
    return Logical(q, scale, zero)


def pack_int8(weight: Tensor, scales: Tensor) -> Packed:
    """int8 `[N, K]` with scales `[N, groups]` -> tiles of 8 bits, exactly. Raises LayoutError.

    Groups are 32, 64 or 128 inputs, or one a row.
    """
    outputs, inputs = weight.shape
    groups = scales.shape[1]
    size = PER_ROW if groups == 1 else inputs // groups
    if size not in (*GROUP_SIZES, PER_ROW) or (groups > 1 and size * groups != inputs):
        raise LayoutError(f"{groups} groups for {inputs} inputs: groups of 32, 64 or 128 inputs, or one, are supported")
    made = _empty(inputs, outputs, 8, size, scales.dtype, weight.device)
    for start in range(0, outputs, SLICE):
        tiles = slice(start // TILE, (start + SLICE) // TILE)
        q = (weight[start : start + SLICE].T.to(torch.int16) + MIDDLE).to(torch.uint8)
        wide = _whole(q, torch.full_like(q[:1], MIDDLE), made.units)
        made.words[tiles, :, 0], made.words[tiles, :, 1] = _words(wide >> 4), _words(wide & 15)
        part = scales[start : start + SLICE].T
        made.scales[tiles] = _scales(part, torch.full_like(part, HIGH_ZERO, dtype=torch.uint8), made)
    return made


def unpack_int8(packed: Packed) -> tuple[Tensor, Tensor]:
    """Tiles of 8 bits -> int8 `[N, K]` and scales `[N, groups]` of at most 128 inputs. Raises LayoutError."""
    if packed.bits != 8:
        raise LayoutError(f"the tiles hold weights of {packed.bits} bits, not of 8")
    high, low = _nibbles(packed.words[:, :, 0]), _nibbles(packed.words[:, :, 1])
    q = (high.to(torch.int16) * 16 + low - MIDDLE).to(torch.int8)
    scale, _ = _read_scales(packed, -(-packed.inputs // packed.group))
    return q.T[: packed.outputs, : packed.inputs].contiguous(), scale.T.contiguous()


def _empty(inputs: int, outputs: int, bits: int, group_size: int, scale: torch.dtype, device: torch.device) -> Packed:
    group = UNIT if group_size == PER_ROW else group_size
    tiles, units = -(-outputs // TILE), -(-inputs // UNIT)
    words = torch.empty(tiles, units, bits // 4, 2, LANES, WORDS, dtype=torch.int32, device=device)
    scales = torch.empty(tiles, units * UNIT // group, 8, 2, dtype=torch.int32, device=device)
    return Packed(words, scales, inputs, outputs, group, scale)


def _whole(q: Tensor, nothing: Tensor, units: int) -> Tensor:
    """`[K, n]` -> `[K, n]` of whole units and tiles; `nothing` `[1, n]` is what a weight of zero is stored as."""
    return pad(torch.cat([q, nothing.expand(units * UNIT - len(q), -1)]), (0, -q.shape[1] % TILE))


def _words(q: Tensor) -> Tensor:
    """uint8 `[K, n]` in 0..15 -> int32 `[n/16, units, 2, 32, 4]`.

    Inputs are (unit, tile, step of 16, column pair c of 8, t, e); outputs are (tile, r of 8, g). Lane 4g + t has a word
    for each step, in which nibble 4e + 2c + r is input (c, t, e) of output (r, g).
    """
    parts = q.reshape(-1, 2, 4, 2, 4, 2, q.shape[1] // TILE, 2, 8).permute(6, 0, 1, 8, 4, 2, 5, 3, 7).flatten(6)
    out = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=q.device)
    for nibble in range(8):
        out |= parts[..., nibble].to(torch.int32) << (4 * nibble)
    return out.flatten(3, 4)


def _nibbles(words: Tensor) -> Tensor:
    """int32 `[tiles, units, 2, 32, 4]` -> uint8 `[K, N]`, padded: the inverse of _words."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    parts = ((words[..., None] >> shifts) & 15).to(torch.uint8)
    tiles, units = words.shape[:2]
    whole = parts.reshape(tiles, units, 2, 8, 4, 4, 2, 2, 2).permute(1, 2, 5, 7, 4, 6, 0, 8, 3)
    return whole.reshape(units * UNIT, tiles * TILE)


def _scales(scale: Tensor, zero: Tensor, into: Packed) -> Tensor:
    """`[groups, n]` of each -> int32 `[n/16, K/G, 8, 2]`; one group a row is repeated, missing ones are zero."""
    groups = into.scales.shape[1]
    bits = scale.float().contiguous().view(torch.int32)
    if (bits & ZERO_BITS).any():
        raise LayoutError(
            f"the scales are {scale.dtype} and need all of its bits: round them to float16 or bfloat16 first"
        )
    both = bits | zero.to(torch.int32)
    if len(both) == 1:
        both = both.expand(groups, -1)
    whole = pad(both, (0, -both.shape[1] % TILE, 0, groups - len(both)))
    return whole.reshape(groups, -1, 2, 8).permute(1, 0, 3, 2)


def _read_scales(packed: Packed, groups: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points `[groups, N]`."""
    both = packed.scales.permute(1, 0, 3, 2).reshape(packed.scales.shape[1], -1)[:groups, : packed.outputs].contiguous()
    return (both & ~ZERO_BITS).view(torch.float32).to(packed.scale), (both & ZERO_BITS).to(torch.uint8)
