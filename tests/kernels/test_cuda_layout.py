"""Weights in tiles: every bit where the figure says, exactly back, padded with nothing, and refused where unfit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinychat_kernels.cuda_layout import pack, pack_int8, unpack, unpack_int8
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import Logical, QuantSpec


def logical(inputs: int, outputs: int, spec: QuantSpec, seed: int = 0, dtype: torch.dtype = torch.float16) -> Logical:
    generator = torch.Generator().manual_seed(seed)
    groups = spec.groups(inputs)
    q = torch.randint(0, 2**spec.bits, (inputs, outputs), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**spec.bits, (groups, outputs), generator=generator, dtype=torch.uint8)
    return Logical(q, torch.randn(groups, outputs, generator=generator).to(dtype), zero)


@given(
    groups=st.integers(1, 9), size=st.sampled_from([32, 64, 128]), outputs=st.integers(1, 70),
    bits=st.sampled_from([3, 4]), dtype=st.sampled_from([torch.float16, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_packed_comes_back(groups: int, size: int, outputs: int, bits: int, dtype: torch.dtype, seed: int):
    spec = QuantSpec(bits, size)
    given_ = logical(groups * size, outputs, spec, seed, dtype)
    for before, after in zip(given_, unpack(pack(given_, spec), spec), strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)


@given(inputs=st.integers(1, 300), outputs=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_row_may_be_one_group(inputs: int, outputs: int, seed: int):
    spec = QuantSpec(group_size=-1)
    given_ = logical(inputs, outputs, spec, seed)
    assert all(map(torch.equal, given_, unpack(pack(given_, spec), spec)))


@given(
    groups=st.integers(1, 5), size=st.sampled_from([32, 64, 128]), outputs=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_8_bits_come_back(groups: int, size: int, outputs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (outputs, groups * size), generator=generator, dtype=torch.int8)
    scales = torch.rand(outputs, groups, generator=generator).half()
    packed = pack_int8(q, scales)
    assert packed.bits == 8
    found, found_scales = unpack_int8(packed)
    assert torch.equal(found, q)
    assert torch.equal(found_scales, scales.repeat_interleave(found_scales.shape[1] // groups, 1))


def test_every_nibble_lies_where_the_figure_says():
    spec = QuantSpec(group_size=64)
    given_ = logical(320, 40, spec)
    packed = pack(given_, spec)
    assert packed.words.shape == (3, 3, 1, 2, 32, 4) and packed.scales.shape == (3, 6, 8, 2)
    for k in range(320):
        for n in range(40):
            step, inside = k % 64 // 16, k % 16
            lane = 4 * (n % 8) + inside % 8 // 2
            pair = (n % 16 >= 8) + 2 * (inside >= 8)
            word = int(packed.words[n // 16, k // 128, 0, k // 64 % 2, lane, step])
            assert word >> (4 * pair + 16 * (k % 2)) & 15 == given_.q[k, n]
    for group in range(5):
        for n in range(40):
            word = int(packed.scales[n // 16, group, n % 8, n % 16 // 8])
            assert word & 0xFF == given_.zero[group, n]
            assert word - (word & 0xFF) == int(given_.scale[group, n].float().view(torch.int32))


def test_8_bits_are_two_planes():
    q = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(2, 128).repeat(8, 1)
    packed, ones = pack_int8(q, torch.ones(16, 1).half()), torch.ones(1, 16).half()
    shifted = (q.T.short() + 128).to(torch.uint8)
    for plane, part in enumerate((shifted >> 4, shifted & 15)):
        alone = pack(Logical(part.contiguous(), ones, torch.zeros(1, 16, dtype=torch.uint8)), QuantSpec())
        assert torch.equal(packed.words[:, :, plane], alone.words[:, :, 0])


@pytest.mark.parametrize(("inputs", "group"), [(32, 32), (160, 32), (33, -1), (200, -1), (192, 64)])
def test_padding_weighs_nothing(inputs: int, group: int):
    spec = QuantSpec(group_size=group)
    packed = pack(logical(inputs, 24, spec), spec)
    whole = replace(packed, inputs=packed.units * 128, outputs=32)
    q, scale, zero = unpack(whole, QuantSpec(group_size=packed.group))
    wide = [part.repeat_interleave(packed.group, 0).double() for part in (scale, zero)]
    weight = (q.double() - wide[1]) * wide[0]
    assert weight[:inputs, :24].any() and not weight[inputs:].any() and not weight[:, 24:].any()


def test_more_outputs_than_are_packed_at_a_time():
    spec = QuantSpec(group_size=32)
    given_ = logical(32, 4103, spec)
    assert all(map(torch.equal, given_, unpack(pack(given_, spec), spec)))
    q = torch.randint(-128, 128, (4103, 32), dtype=torch.int8)
    assert torch.equal(unpack_int8(pack_int8(q, torch.ones(4103, 1).half()))[0], q)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(2.0**100, torch.bfloat16), (2.0**-140, torch.bfloat16), (-0.3, torch.bfloat16), (6e-8, torch.float16)],
)
def test_wide_scales_are_held_where_they_leave_room(scale: float, dtype: torch.dtype):
    spec = QuantSpec(group_size=32)
    given_ = logical(32, 8, spec)._replace(scale=torch.full((1, 8), scale).to(dtype).float())
    assert all(map(torch.equal, given_, unpack(pack(given_, spec), spec)))


def test_scales_that_leave_no_room_are_refused():
    spec = QuantSpec(group_size=32)
    given_ = logical(32, 8, spec)._replace(scale=torch.full((1, 8), 1 + 2.0**-20))
    with pytest.raises(LayoutError, match="need all of its bits: round them to float16 or bfloat16 first"):
        pack(given_, spec)


def test_what_does_not_fit_is_refused():
    spec = QuantSpec(group_size=32)
    given_ = logical(32, 8, spec)
    with pytest.raises(LayoutError, match="q holds 16, at most 15 fits in 4 bits"):
        pack(given_._replace(q=given_.q + 16 - given_.q), spec)
    with pytest.raises(LayoutError, match="in_features=48 is not a multiple of group_size=32"):
        pack(given_._replace(q=torch.zeros(48, 8, dtype=torch.uint8)), spec)
    with pytest.raises(LayoutError, match="3 groups for 144 inputs: groups of 32, 64 or 128"):
        pack_int8(torch.zeros(8, 144, dtype=torch.int8), torch.ones(8, 3))
    packed, wide = pack(given_, spec), pack_int8(torch.zeros(8, 32, dtype=torch.int8), torch.ones(8, 1))
    with pytest.raises(LayoutError, match="the tiles hold weights of 8 bits, not of 4"):
        unpack(wide, spec)
    with pytest.raises(LayoutError, match="the tiles hold weights of 4 bits, not of 8"):
        unpack_int8(packed)
