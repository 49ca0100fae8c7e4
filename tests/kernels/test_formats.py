"""Every format gives back what it was given, lays it out as its source says, and refuses what it cannot hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tinychat_kernels import words
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.formats import (
    COMPRESSED_TENSORS,
    COMPRESSED_TENSORS_8,
    FORMATS,
    GEMM,
    GEMV,
    GEMV_FAST,
    GPTQ,
    GPTQ_V2,
    LLM_AWQ_V2,
    Format,
    padded_groups,
)
from tinychat_kernels.layout import Logical, QuantSpec, from_logical

by_name = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)


def logical(spec: QuantSpec, rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Logical:
    """Random values of the whole range; zero points from 1, which every format has, and 8 where there are none."""
    draw = torch.Generator().manual_seed(seed)
    shape = (spec.groups(rows), columns)
    scale = (torch.rand(shape, generator=draw) * 4 - 6).exp2().to(dtype)
    zero = torch.randint(1, 16, shape, generator=draw, dtype=torch.uint8) if spec.zero_point else torch.full(shape, 8)
    q = torch.randint(0, 16, (rows, columns), generator=draw, dtype=torch.uint8)
    return Logical(q, scale, zero.to(torch.uint8))


def same(one: Logical, other: Logical) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@by_name
@given(
    group=st.sampled_from([32, 64, 128, -1]),
    blocks=st.integers(1, 6),
    wide=st.integers(1, 5),
    zero_point=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_unpacking_undoes_packing(
    format: Format, group: int, blocks: int, wide: int, zero_point: bool, dtype: torch.dtype, seed: int
) -> None:
    spec, rows = QuantSpec(4, group, zero_point), max(group, 64) * blocks
    before = logical(spec, rows, 8 * wide, seed, dtype)
    packed = format.pack(before, spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in packed.items()}
    assert shapes == format.shapes(spec, rows, 8 * wide)
    assert format.size(shapes) == (rows, 8 * wide)
    assert all(tensor.is_contiguous() for tensor in packed.values())
    same(format.unpack(packed, spec), before)


@given(
    group=st.sampled_from([32, 64, 128, -1]),
    blocks=st.integers(1, 4),
    columns=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_heads_of_any_width_are_packed(
    group: int, blocks: int, columns: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    """Symmetric, as a vocabulary of any size is: nothing is packed along the outputs."""
    format, spec = (COMPRESSED_TENSORS, COMPRESSED_TENSORS_8)[bits == 8], QuantSpec(bits, group, zero_point=False)
    rows, draw = max(group, 64) * blocks, torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, columns), generator=draw, dtype=torch.uint8)
    scale = torch.rand((spec.groups(rows), columns), generator=draw).to(dtype)
    before = Logical(q, scale, torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8))
    packed = format.pack(before, spec)
    assert {name: tuple(t.shape) for name, t in packed.items()} == format.shapes(spec, rows, columns)
    word, place = int(packed["weight_packed"][columns - 1, 0]) & 0xFFFFFFFF, 32 // bits - 1
    assert word >> (bits * place) == int(q[place, columns - 1])
    same(format.unpack(packed, spec), before)


@by_name
def test_each_part_is_told_by_the_tensors_it_needs(format: Format) -> None:
    spec = QuantSpec(group_size=32)
    before = logical(spec, 128, 16)
    packed = format.pack(before, spec)
    for part in ("q", "scale", "zero"):
        some = {name: packed[name] for name in format.needs[part] if name in packed}
        assert torch.equal(getattr(format, part)(some, spec), getattr(before, part))


def nibble(word: Tensor, place: int) -> int:
    return (int(word) >> (4 * place)) & 15


def test_gemv_has_outputs_as_rows_and_plain_words() -> None:
    spec = QuantSpec(group_size=32)
    before = logical(spec, 96, 8)
    packed = GEMV.pack(before, spec)
    assert packed["qzeros"].shape == (8, 4) and packed["scales"].shape == (8, 32)
    for n in range(8):
        for k in range(96):
            assert nibble(packed["qweight"][n, k // 8], k % 8) == before.q[k, n]
        for g in range(3):
            assert nibble(packed["qzeros"][n, 0], g) == before.zero[g, n]
            assert packed["scales"][n, g] == before.scale[g, n]
    assert not packed["scales"][:, 3:].any() and not packed["qzeros"][:, 1:].any()


@pytest.mark.parametrize("format", [GEMV_FAST, LLM_AWQ_V2], ids=lambda format: format.name)
def test_v2_has_its_nibbles_where_the_kernel_looks(format) -> None:
    """The closed form of llm-awq's packing, element by element."""
    spec = QuantSpec(group_size=64)
    before = logical(spec, 192, 8)
    packed = format.pack(before, spec)
    assert packed["qweight"].dtype == torch.int16
    for n in range(8):
        for k in range(192):
            row, tile, half, eight = n // 4, k // 64, k % 64 // 32, k % 32 // 8
            flat = 64 * (n % 4) + 32 * half + 8 * (k % 8 // 2) + 4 * (k % 2) + eight
            assert nibble(packed["qweight"][row, 64 * tile + flat // 4], flat % 4) == before.q[k, n]
    scaled = -(before.scale.double() * before.zero.double()).to(torch.float16)
    assert torch.equal(packed[format.zeros][:3], scaled) and not packed[format.zeros][3:].any()


@pytest.mark.parametrize(
    ("rows", "group", "padded"),
    [
        (3584, 128, 32),
        (4096, 128, 32),
        (5120, 128, 40),
        (11008, 128, 88),
        (18944, 128, 152),
        (64, 64, 16),
        (96, 32, 32),
    ],
)
def test_groups_are_padded_as_llm_awq_does(rows: int, group: int, padded: int) -> None:
    assert padded_groups(QuantSpec(group_size=group), rows) == padded


def test_the_padding_tells_the_group_size() -> None:
    """A v1 or v2 file says its group size nowhere else."""
    for rows in range(128, 20000, 128):
        found = [padded_groups(QuantSpec(group_size=group), rows) for group in (128, 64, 32)]
        assert found == [size * math.ceil(rows / 1024) for size in (8, 16, 32)]


def test_gptq_packs_along_the_inputs_and_stores_zeros_less_one() -> None:
    spec = QuantSpec(group_size=32)
    before = logical(spec, 64, 16)
    first, second = GPTQ.pack(before, spec), GPTQ_V2.pack(before, spec)
    for k in range(64):
        for n in range(16):
            assert nibble(first["qweight"][k // 8, n], k % 8) == before.q[k, n]
            assert nibble(first["qzeros"][k // 32, n // 8], n % 8) == before.zero[k // 32, n] - 1
            assert nibble(second["qzeros"][k // 32, n // 8], n % 8) == before.zero[k // 32, n]
    assert first["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_compressed_tensors_are_signed_values_shifted_by_eight() -> None:
    spec = QuantSpec(group_size=32)
    before = logical(spec, 64, 16)
    packed = COMPRESSED_TENSORS.pack(before, spec)
    assert packed["weight_shape"].tolist() == [16, 64]
    assert nibble(packed["weight_packed"][3, 1], 2) - 8 == int(before.q[10, 3]) - 8
    assert nibble(packed["weight_zero_point"][1, 0], 3) == before.zero[0, 11]
    symmetric = COMPRESSED_TENSORS.pack(logical(QuantSpec(4, 32, False), 64, 16), QuantSpec(4, 32, False))
    assert "weight_zero_point" not in symmetric


def changed(format: Format, **changes) -> dict[str, Tensor]:
    packed = format.pack(logical(QuantSpec(group_size=32), 64, 16), QuantSpec(group_size=32))
    return {name: changes.get(name, tensor) for name, tensor in packed.items() if changes.get(name, tensor) is not None}


def unpacked(format: Format, **changes) -> Logical:
    return format.unpack(changed(format, **changes), QuantSpec(group_size=32))


def with_zero(value: int, spec: QuantSpec) -> Logical:
    before = logical(spec, 64, 16)
    before.zero[1, 5] = value
    return before


def turned(rows: int = 64) -> Tensor:
    return (torch.arange(rows) // 32).flip(0).to(torch.int32)


G32 = QuantSpec(group_size=32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPTQ.pack(with_zero(0, G32), G32), "gptq stores zero points less one, and 1 are 0"),
        (lambda: unpacked(GPTQ, g_idx=turned()), r"g_idx does not count up: the weights are in activation order"),
        (lambda: unpacked(GPTQ, g_idx=None), "g_idx is missing"),
        (
            lambda: unpacked(GPTQ, qzeros=torch.full((2, 2), -1, dtype=torch.int32)),
            "32 zero points are stored as 15, which readers take for 0 or for 16",
        ),
        (
            lambda: unpacked(LLM_AWQ_V2, scaled_zeros=torch.full((32, 16), -1.7).half()),
            "32 scaled_zeros are no scale times 0..15, such as -1.7",
        ),
        (lambda: unpacked(LLM_AWQ_V2, scaled_zeros=None), "scaled_zeros is missing"),
        (
            lambda: unpacked(GEMV, scales=torch.ones((16, 16)).half()),
            r"scales has shape \[16, 16\], \[16, 32\] is needed for 64x16 weights in awq-gemv",
        ),
        (
            lambda: GEMV_FAST.pack(logical(G32, 96, 16), G32),
            "in_features=96 is not a multiple of 64, which awq-gemv-fast needs",
        ),
        (
            lambda: LLM_AWQ_V2.pack(logical(G32, 64, 16, dtype=torch.float32), G32),
            "scales are torch.float32, llm-awq-v2 has float16 or bfloat16",
        ),
        (
            lambda: LLM_AWQ_V2.pack(logical(G32, 64, 16)._replace(scale=torch.full((2, 16), 60000.0).half()), G32),
            "zero points cannot be told from scale times zero in torch.float16",
        ),
        (
            lambda: COMPRESSED_TENSORS.pack(logical(G32, 64, 16), QuantSpec(4, 32, False)),
            "symmetric compressed-tensors weights have no zero points, and some here are not 8",
        ),
        (lambda: GPTQ.pack(logical(G32, 64, 16), QuantSpec(8, 32)), "gptq is read and written with 4 bits, not 8"),
        (lambda: GEMM.pack(with_zero(16, G32), G32), "zero holds 16, at most 15 fits in 4 bits"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(make, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        make()


def test_a_scale_of_zero_has_the_zero_point_zero() -> None:
    before = logical(G32, 64, 16)
    before.scale[0, 0], before.zero[0, 0] = 0, 0
    same(LLM_AWQ_V2.unpack(LLM_AWQ_V2.pack(before, G32), G32), before)


def test_gemm_is_the_layout_in_memory() -> None:
    before = logical(G32, 64, 16)
    for name, tensor in from_logical(before, G32)._asdict().items():
        assert torch.equal(GEMM.pack(before, G32)[name], tensor)


def test_a_word_may_be_negative_and_strided() -> None:
    packed = torch.randint(-(2**31), 2**31 - 1, (6, 10), dtype=torch.int32)[:, ::2]
    assert torch.equal(words.pack(words.unpack(packed)), packed)
