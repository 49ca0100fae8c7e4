"""Linears with 4-bit and 8-bit weights in the emulator, against float64: any shape, any mode, a row by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated import halves, launch_for, modes, needs_compiler, numbers, relative
from packed_linears import TOLERANCE, check_dequantize, check_gemm, check_gemv, linear, linear8

from emu.launcher import Mode
from tinychat_kernels import cuda_linear
from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.errors import KernelError

pytestmark = needs_compiler
SIZES = ((8, 32), (16, 64), (33, 96), (136, 320), (48, 1152))  # outputs and inputs
GROUPS = (32, 64, 128, -1)


def fits(inputs: int, group: int) -> bool:
    return group == -1 or inputs % group == 0


@halves
@pytest.mark.parametrize("group", GROUPS)
def test_up_to_8_rows(group: int, dtype: torch.dtype, arch: int):
    for (outputs, inputs), heavy in itertools.product(SIZES, (False, True)):
        if fits(inputs, group):
            of, launch = linear(outputs, inputs, group, seed=inputs), launch_for(arch)
            check_gemv(launch, of, 1, dtype, heavy)
            check_gemv(launch, of, 8 if heavy else 3, dtype, heavy)


@halves
@pytest.mark.parametrize("group", GROUPS)
def test_more_rows(group: int, dtype: torch.dtype, arch: int):
    for (outputs, inputs), heavy in itertools.product(SIZES, (False, True)):
        if fits(inputs, group):
            of = linear(outputs, inputs, group, seed=inputs)
            for rows in (1, 17) if heavy else (16, 33):
                check_gemm(launch_for(arch), of, rows, dtype, heavy)
            check_dequantize(launch_for(arch), of, dtype)


@halves
@pytest.mark.parametrize("rows", [64, 65, 130])
def test_many_rows(rows: int, dtype: torch.dtype, arch: int):
    check_gemm(launch_for(arch), linear(264, 256, 64), rows, dtype)


@halves
@pytest.mark.parametrize(("inputs", "groups"), [(40, 1), (320, 10), (320, 5), (1152, 9)])
def test_weights_of_8_bits(inputs: int, groups: int, dtype: torch.dtype, arch: int):
    of, launch = linear8(40, inputs, groups), launch_for(arch)
    for rows in (1, 5):
        check_gemv(launch, of, rows, dtype, heavy=True)
        check_gemv(launch, of, rows, dtype, wide=True)
    check_dequantize(launch, of, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16])
def test_scales_of_another_type_are_exact_in_a_gemv(dtype: torch.dtype, scale: torch.dtype):
    of = linear(40, 256, 64, scale)
    check_gemv(launch_for(), of, 1, dtype, wide=True)
    check_gemv(launch_for(), of, 2, dtype, wide=True)
    check_gemm(launch_for(), of, 20, dtype)


@modes
@pytest.mark.parametrize("arch", [75, 80])
def test_in_every_order(mode: Mode, arch: int):
    first, launch = launch_for(arch), launch_for(arch, mode)
    small, long, head = linear(24, 640, 32), linear(24, 2816, 128), linear8(24, 256, 2)
    for of, rows in ((small, 1), (long, 8), (head, 2)):
        expected, found = (check_gemv(each, of, rows, torch.float16) for each in (first, launch))
        assert torch.equal(expected, found)
    for of, rows in ((small, 17), (long, 40)):
        expected, found = (check_gemm(each, of, rows, torch.float16) for each in (first, launch))
        assert torch.equal(expected, found)
    assert torch.equal(*(check_dequantize(each, small, torch.float16) for each in (first, launch)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@modes
@halves
@pytest.mark.parametrize("group", GROUPS)
def test_the_whole_grid(group: int, mode: Mode, dtype: torch.dtype, arch: int):
    launch = launch_for(arch, mode)
    for outputs, inputs in (*SIZES, (264, 256), (24, 2816), (8, 5632)):
        if not fits(inputs, group):
            continue
        of = linear(outputs, inputs, group)
        for rows in range(1, 9):
            check_gemv(launch, of, rows, dtype, heavy=rows % 2 == 0)
        for rows in (1, 15, 16, 31, 32, 33, 63, 64, 65, 128, 129):
            check_gemm(launch, of, rows, dtype, heavy=rows % 2 == 0)
        check_dequantize(launch, of, dtype)


@pytest.mark.parametrize("inputs", [256, 2816])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_depends_on_itself_alone(bits: int, inputs: int):
    of = linear(40, inputs, 64) if bits == 4 else linear8(40, inputs)
    x = numbers(8, inputs, heavy=True)
    x[2, 5], x[5, 9], x[6] = float("inf"), float("nan"), 60000.0
    together, alone = torch.empty(8, 40), torch.empty(8, 40)
    cuda_linear.gemv(launch_for(), x, of.packed, None, together)
    for row in range(8):
        cuda_linear.gemv(launch_for(), x[row : row + 1], of.packed, None, alone[row : row + 1])
    clean = [0, 1, 3, 4, 6, 7]
    assert torch.equal(together[clean], alone[clean]) and together[clean].isfinite().all()
    assert not together[[2, 5]].isfinite().any()


def test_rows_may_lie_apart():
    of, wide = linear(40, 128, 64), numbers(20, 192)
    for rows, run in ((3, cuda_linear.gemv), (20, cuda_linear.gemm)):
        x, out = wide[:rows, 64:], torch.empty(rows, 40).half()
        run(launch_for(), x, of.packed, None, out)
        assert relative(out, x.double() @ of.weight.T) <= TOLERANCE


def test_8_rows_of_2816_inputs_take_two_chunks():
    assert cuda_linear.gemv_chunk(22, 8) == 16


def test_splits_give_what_one_part_gives():
    of, x = linear(40, 1152, 128), numbers(20, 1152)
    whole, split = torch.empty(20, 40).half(), torch.empty(20, 40).half()
    cuda_linear.gemm(launch_for(), x, of.packed, None, whole)
    parts = torch.full((3, 20, 48), float("nan"))  # of 9 steps
    cuda_linear.gemm(launch_for(), x, of.packed, None, split, parts)
    assert relative(split, whole) < 1e-3 and parts.isfinite().all()


@pytest.mark.parametrize("units", [1, 2, 8, 9, 16, 23, 24, 32, 112, 224])
@pytest.mark.parametrize("rows", range(1, 9))
def test_chunks_of_a_gemv_fit_and_give_warps_the_same_units(units: int, rows: int):
    chunk = cuda_linear.gemv_chunk(units, rows)
    kind = 1 if rows == 1 else 8
    assert 8 * 16 * kind * 4 + 2 * rows * (chunk * 128 + 8) <= 48 << 10
    assert chunk == units or chunk % 8 == 0
    assert -(-units // chunk) <= -(-units // 16) + (rows > 1)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "processors", "splits"),
    [(16, 4096, 4096, 132, 8), (16, 28672, 4096, 132, 1), (64, 4096, 14336, 132, 8), (512, 2048, 4096, 132, 2),
     (512, 4096, 4096, 132, 1), (2048, 4096, 4096, 132, 1), (9, 4096, 4096, 16, 1), (9, 1024, 128, 132, 1)],
)  # fmt: skip
def test_splits_leave_no_processor_idle(rows: int, outputs: int, inputs: int, processors: int, splits: int):
    units, tiles = -(-inputs // 128), -(-outputs // 16)
    packed = Packed(torch.empty(tiles, units, 1, 0), torch.empty(0), inputs, outputs, 128, torch.float16)
    assert cuda_linear.gemm_splits(packed, rows, processors) == splits
    assert cuda_linear.gemm_parts(packed, rows, processors) == (splits if splits > 1 else 0, rows, tiles * 16)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_blocks_fit_into_the_smallest_shared_memory(group: int):
    assert max(block.shared(group) for block in cuda_linear.BLOCKS) <= 64 << 10  # sm_75


def test_an_entry_says_how_it_is_compiled():
    assert cuda_linear.defines("w4_gemv_bf16_g64_m8") == ("TINYCHAT_TYPE=bf16", "TINYCHAT_GROUP=64")
    assert cuda_linear.defines("w8_dequantize_f16_g32") == ("TINYCHAT_TYPE=f16", "TINYCHAT_GROUP=32")
    assert cuda_linear.defines("attn_decode_f16_d128") == ()


def refused(match: str, run, *arguments) -> None:
    with pytest.raises(KernelError, match=match):
        run(launch_for(), *arguments)


def test_what_does_not_fit_is_refused():
    packed, head = linear(8, 64, 32).packed, linear8(8, 64).packed
    x, out = numbers(2, 64), torch.empty(2, 8).half()
    refused("gemv takes 1 to 8 rows, not 9", cuda_linear.gemv, numbers(9, 64), packed, None, torch.empty(9, 8).half())
    refused("x is torch.float32; the CUDA kernels take", cuda_linear.gemv, x.float(), packed, None, out)
    refused("the weights have 64 inputs and 8 outputs", cuda_linear.gemv, numbers(2, 32), packed, None, out)
    refused("the weights have 64 inputs and 8 outputs", cuda_linear.gemm, x, packed, None, out[:, :4])
    refused("whole vectors of 8 values", cuda_linear.gemv, numbers(2, 68)[:, :64], packed, None, out)
    refused("gemm takes weights of 4 bits, not of 8", cuda_linear.gemm, x, head, None, out)
    refused("gemm gives torch.float16, out is torch.float32", cuda_linear.gemm, x, packed, None, out.float())
    refused("gives torch.float16 or float32, out is torch.bfloat16", cuda_linear.gemv, x, packed, None, out.bfloat16())
    refused("gemm_parts says what is needed", cuda_linear.gemm, x, packed, None, out, torch.empty(2, 2, 8))
    refused("the weights are 8x64", cuda_linear.dequantize, packed, torch.empty(8, 32).half())
