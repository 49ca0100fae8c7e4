"""4-bit layouts: packing is exact, rounding is within half a step, and what does not fit is refused by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import (
    AwqGemm,
    Logical,
    QuantSpec,
    dequantize,
    from_logical,
    pack_awq,
    quantize,
    to_logical,
    unpack_awq,
)

# AutoAWQ's own statement of its GEMM layout: after shifts 0, 4, ... 28, column c of eight stands at REVERSE[c].
REVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def values(rows: int, columns: int, seed: int, top: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (rows, columns), generator=generator, dtype=torch.uint8)


def nibbles_as_autoawq_reads_them(packed: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4)
    spread = ((packed.long() & 0xFFFFFFFF)[:, :, None] >> shifts) & 15
    return spread[:, :, list(REVERSE)].reshape(packed.shape[0], -1).to(torch.uint8)


def logical(spec: QuantSpec, groups: int, columns: int, seed: int = 0) -> Logical:
    scale = torch.rand((groups, columns), generator=torch.Generator().manual_seed(seed)).half()
    zero = values(groups, columns, seed + 1, spec.max_q + 1)
    size = spec.group_size if spec.group_size > 0 else 40
    return Logical(values(groups * size, columns, seed, spec.max_q + 1), scale, zero)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
def test_unpacking_undoes_packing(rows: int, words: int, seed: int) -> None:
    q = values(rows, 8 * words, seed)
    packed = pack_awq(q)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words)
    assert torch.equal(unpack_awq(packed), q)
    assert torch.equal(nibbles_as_autoawq_reads_them(packed), q)


def test_nibble_i_holds_the_column_that_the_format_names() -> None:
    """Stated number by number: columns 0..7 in one word, lowest bits first, are 0 2 4 6 1 3 5 7."""
    word = pack_awq(torch.arange(8, dtype=torch.uint8)[None])
    assert int(word) & 0xFFFFFFFF == 0x75316420
    assert int(pack_awq(torch.full((1, 8), 15, dtype=torch.uint8))) == -1


@given(
    st.sampled_from([32, 64, 128, -1]),
    st.sampled_from([3, 4]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_disk_form_and_logical_form_are_the_same(group: int, bits: int, groups: int, words: int, seed: int) -> None:
    spec = QuantSpec(bits, group)
    groups = groups if group > 0 else 1
    before = logical(spec, groups, 8 * words, seed)
    packed = from_logical(before, spec)
    assert packed.qweight.shape == (before.q.shape[0], words) and packed.qzeros.shape == (groups, words)
    for one, other in zip(to_logical(packed, spec), before, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def test_the_weight_is_q_minus_zero_times_scale() -> None:
    """Written out in float64, element by element, from the packed words."""
    spec = QuantSpec(group_size=32)
    packed = from_logical(logical(spec, 2, 16), spec)
    q, z = nibbles_as_autoawq_reads_them(packed.qweight), nibbles_as_autoawq_reads_them(packed.qzeros)
    weight = dequantize(to_logical(packed, spec), torch.float64)
    assert weight.shape == (16, 64)
    for k in range(64):
        for n in range(16):
            expected = (int(q[k, n]) - int(z[k // 32, n])) * float(packed.scales[k // 32, n])
            assert float(weight[n, k]) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero_point", [True, False])
@given(
    bits=st.sampled_from([3, 4, 8]),
    group=st.sampled_from([32, 64, 128, -1]),
    size=st.floats(1e-3, 100),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 999),
)
def test_rounding_is_within_half_a_step(
    dtype: torch.dtype, zero_point: bool, bits: int, group: int, size: float, shift: float, seed: int
) -> None:
    spec = QuantSpec(bits, group, zero_point)
    rows = 2 * group if group > 0 else 40
    noise = torch.randn((8, rows), generator=torch.Generator().manual_seed(seed))
    weight = ((noise + shift) * size).to(dtype)
    found = quantize(weight, spec)
    assert found.scale.dtype == dtype and found.q.dtype == found.zero.dtype == torch.uint8
    assert int(found.q.max()) <= spec.max_q and int(found.zero.max()) <= spec.max_q
    step = found.scale.double().repeat_interleave(spec.group(rows), 0).T
    worst = ((dequantize(found, torch.float64) - weight.double()).abs() / step).max()
    # the scale itself is rounded to its dtype, more coarsely where it is subnormal: the group's ends move by up to
    # max_q roundings of it
    info = torch.finfo(dtype)
    rounding = max(info.eps, info.tiny * info.eps / float(step.min()))
    assert float(worst) <= 0.5 + spec.max_q * rounding


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_survives(sign: int) -> None:
    """Min-max without zero in the range would clamp the zero point and move [5, 6] by 5."""
    weight = sign * (5 + torch.rand((8, 32), generator=torch.Generator().manual_seed(0)))
    spec = QuantSpec(group_size=32)
    assert float((dequantize(quantize(weight, spec)) - weight).abs().max()) <= 0.5 * 6 / 15 + 1e-5


@pytest.mark.parametrize("zero_point", [True, False])
def test_zeros_stay_zeros(zero_point: bool) -> None:
    weight = torch.randn((8, 64), generator=torch.Generator().manual_seed(0))
    weight[:, :32] = 0
    weight[:, 40] = 0
    found = dequantize(quantize(weight, QuantSpec(group_size=32, zero_point=zero_point)))
    assert torch.isfinite(found).all()
    assert not found[:, :32].any() and not found[:, 40].any()


@pytest.mark.parametrize(("bits", "middle"), [(4, 8), (3, 4), (8, 128)])
def test_symmetric_groups_have_their_zero_in_the_middle(bits: int, middle: int) -> None:
    found = quantize(torch.randn((8, 64), generator=torch.Generator().manual_seed(0)), QuantSpec(bits, 32, False))
    assert (found.zero == middle).all()


def test_values_that_are_representable_come_back_exactly() -> None:
    spec = QuantSpec(group_size=32)
    before = logical(spec, 2, 8)
    q = before.q.reshape(2, 32, 8)
    q[:, 0], q[:, 1] = 0, 15  # both ends are used: min and max give the scale
    scale = torch.full((2, 8), 0.125)
    weight = dequantize(Logical(q.reshape(64, 8), scale, before.zero))
    found = quantize(weight, spec)
    assert torch.equal(found.q, q.reshape(64, 8)) and torch.equal(found.zero, before.zero)
    assert torch.equal(found.scale, scale)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QuantSpec(bits=5), "bits is 5; weights of 3, 4 and 8 bits are supported"),
        (lambda: QuantSpec(bits=8).check(128, 8), "weights of 8 bits do not fit into 4-bit words"),
        (
            lambda: QuantSpec(group_size=100),
            "group_size is 100; groups of 32, 64 and 128, and -1 .a row is one group., are supported",
        ),
        (lambda: QuantSpec(group_size=128).check(192, 8), "in_features=192 is not a multiple of group_size=128"),
        (lambda: QuantSpec(group_size=32).check(32, 12), "out_features=12 is not a multiple of 8"),
        (lambda: quantize(torch.full((8, 32), float("nan")), QuantSpec(group_size=32)), "holds NaN or Inf"),
        (lambda: quantize(torch.full((8, 32), float("inf")), QuantSpec(group_size=32)), "holds NaN or Inf"),
        (
            lambda: from_logical(logical(QuantSpec(4, 32), 1, 8), QuantSpec(3, 32)),
            "q holds 15, at most 7 fits in 3 bits",
        ),
        (
            lambda: to_logical(
                AwqGemm(torch.zeros((64, 1), dtype=torch.int32), torch.zeros((1, 1)), torch.zeros((2, 8))),
                QuantSpec(group_size=32),
            ),
            r"qzeros has shape \[1, 1\], \[2, 1\] is needed for 64x8 weights",
        ),
        (
            lambda: to_logical(
                AwqGemm(torch.zeros((64, 1), dtype=torch.int32), torch.zeros((2, 1)), torch.zeros((2, 4))),
                QuantSpec(group_size=32),
            ),
            r"scales has shape \[2, 4\], \[2, 8\] is needed",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, words) -> None:
    with pytest.raises(LayoutError, match=words):
        make()
