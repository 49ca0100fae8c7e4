"""8-bit linears in the emulator: rows rounded as int8.py rounds them, sums of products exact, any shape and mode."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from emulated import Defects, GuardedLaunch, halves, launch_for, modes, needs_compiler, numbers, relative
from torch import Tensor

from emu.launcher import Mode
from tinychat_kernels import cuda_int8, ref
from tinychat_kernels.errors import KernelError
from tinychat_kernels.int8 import Int8, quantize_rows, quantize_tokens

pytestmark = needs_compiler
WIDTHS = (16, 48, 256, 1152, 4304, 8208, 16384)
SHAPES = ((48, 1), (96, 40), (144, 63), (272, 65))  # inputs and outputs
WHOLE = {  # an activation in float64
    "none": lambda x: x,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def rounded(launch: GuardedLaunch, x: Tensor, activation: str = "none") -> Int8:
    """Rows by the kernel; what it leaves out is seen."""
    out = Int8(torch.full(x.shape, -128, dtype=torch.int8), torch.full((len(x),), float("nan")))
    cuda_int8.quantize_rows(launch, x, *out, activation)
    return out


def check_rows(launch: GuardedLaunch, rows: int, width: int, dtype: torch.dtype, heavy: bool = False) -> None:
    x = numbers(rows, width, dtype=dtype, heavy=heavy)
    for found, expected in zip(rounded(launch, x), quantize_tokens(x), strict=True):
        assert torch.equal(found, expected)


def check_activation(launch: GuardedLaunch, activation: str, dtype: torch.dtype, width: int = 264 * 2) -> None:
    x = numbers(3, width, dtype=dtype, heavy=True)
    exact = WHOLE[activation](x.double())
    found = rounded(launch, x, activation)
    assert torch.allclose(found.scale.double(), exact.abs().amax(1) / 127, rtol=1e-5)
    steps = (found.weight.double() * found.scale[:, None] - exact).abs() / found.scale[:, None]
    assert steps.max() <= 0.501


def random_int8(rows: int, inputs: int, seed: int) -> Int8:
    """Any int8 but -128, so that sums are as large as they come."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (rows, inputs), generator=generator, dtype=torch.int8)
    return Int8(values, torch.rand(rows, generator=generator) / 32 + 0.001)


def check_gemm(
    launch: GuardedLaunch, rows: int, shape: tuple[int, int], dtype: torch.dtype, side: int, bias: bool = True
) -> Tensor:
    inputs, outputs = shape
    x, weight = random_int8(rows, inputs, 0), random_int8(outputs, inputs, 1)
    added = numbers(outputs, dtype=dtype, seed=2) * 10 if bias else None
    out = torch.full((rows, outputs), float("nan"), dtype=dtype)
    cuda_int8.gemm(launch, x, weight, added, out, side)
    wide = [part.weight.double() * part.scale.double()[:, None] for part in (x, weight)]
    exact = wide[0] @ wide[1].T
    exact = exact if added is None else exact + added.double()
    spacing = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    assert ((out.double() - exact).abs() <= exact.abs() * spacing + 1e-4).all()
    return out


@halves
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_rounded_as_tokens_are(width: int, heavy: bool, dtype: torch.dtype, arch: int):
    check_rows(launch_for(arch), 3, width, dtype, heavy)


@halves
@pytest.mark.parametrize("activation", WHOLE)
def test_rows_behind_an_activation(activation: str, dtype: torch.dtype, arch: int):
    check_activation(launch_for(arch), activation, dtype)


def test_rows_of_zeros_and_of_what_is_no_number():
    x = numbers(4, 48)
    x[0], x[1, 5], x[2, 7] = 0, float("nan"), float("inf")
    found, expected = rounded(launch_for(), x), quantize_tokens(x)
    assert found.scale[0] == 1 and not found.weight[0].any()
    assert found.scale[1].isnan() and found.scale[2].isinf() and not found.weight[1:3].any()
    assert torch.equal(found.weight[3], expected.weight[3]) and found.scale[3] == expected.scale[3]


@halves
@pytest.mark.parametrize("side", cuda_int8.SIDES)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 127, 128, 129])
def test_products_are_exact(rows: int, side: int, dtype: torch.dtype, arch: int):
    for shape, bias in itertools.product(SHAPES[:2] if rows > 33 else SHAPES, (False, True)):
        check_gemm(launch_for(arch), rows, shape, dtype, side, bias)


@modes
@pytest.mark.parametrize("arch", [75, 80])
def test_in_every_order(mode: Mode, arch: int):
    launch = launch_for(arch, mode)
    check_rows(launch, 2, 528, torch.float16, heavy=True)
    for side in cuda_int8.SIDES:
        expected, found = (check_gemm(each, 37, (400, 69), torch.float16, side) for each in (launch_for(arch), launch))
        assert torch.equal(expected, found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@modes
@halves
def test_the_whole_grid(mode: Mode, dtype: torch.dtype, arch: int):
    launch = launch_for(arch, mode)
    for width, heavy in itertools.product(WIDTHS, (False, True)):
        check_rows(launch, 2, width, dtype, heavy)
    for activation in WHOLE:
        check_activation(launch, activation, dtype)
    for rows, shape, side in itertools.product((1, 15, 16, 17, 33, 63, 129), (*SHAPES, (1152, 130)), cuda_int8.SIDES):
        check_gemm(launch, rows, shape, dtype, side)


def test_the_largest_sums_fit():
    ones = Int8(torch.full((1, 16384), 127, dtype=torch.int8), torch.ones(1))
    out = torch.empty(1, 1, dtype=torch.float32).bfloat16()
    cuda_int8.gemm(launch_for(), ones, Int8(-ones.weight, ones.scale), None, out)
    assert out.item() == torch.tensor(-127.0 * 127 * 16384).bfloat16().item()


@pytest.mark.parametrize("heavy", [False, True])
def test_a_linear_is_refs(heavy: bool):
    x, bias = numbers(37, 144, heavy=heavy), numbers(70, seed=1)
    weight = quantize_rows(numbers(70, 144, seed=2, heavy=heavy).float())
    out = torch.empty(37, 70).half()
    cuda_int8.linear(launch_for(), x, weight, bias, out, processors=1)
    assert relative(out, ref.w8a8_linear(x, weight, bias)) <= 1e-4
    small = torch.empty_like(out)
    cuda_int8.linear(launch_for(), x, weight, bias, small, processors=99)
    assert torch.equal(out, small)


@pytest.mark.parametrize(
    ("rows", "outputs", "processors", "side"),
    [(729, 1152, 132, 64), (729, 4304, 132, 128), (1, 1152, 1, 128), (577, 1024, 16, 128), (577, 1024, 132, 64)],
)
def test_large_blocks_are_taken_where_no_processor_idles(rows: int, outputs: int, processors: int, side: int):
    assert cuda_int8.gemm_side(rows, outputs, processors) == side
    assert cuda_int8.STAGES * 2 * side * cuda_int8.DEPTH <= 48 << 10


def test_what_does_not_fit_is_refused():
    x, weight, out = random_int8(2, 32, 0), random_int8(8, 32, 1), torch.empty(2, 8).half()
    launch = launch_for()
    with pytest.raises(KernelError, match="a number of inputs of 40 is no multiple of 16"):
        cuda_int8.gemm(launch, random_int8(2, 40, 0), random_int8(8, 40, 1), None, out)
    with pytest.raises(KernelError, match=r"x is \[2, 32\] and out \[2, 7\], the weights are \[8, 32\]"):
        cuda_int8.gemm(launch, x, weight, None, out[:, :7])
    with pytest.raises(KernelError, match="scales are torch.float32 and torch.float16"):
        cuda_int8.gemm(launch, x, weight._replace(scale=weight.scale.half()), None, out)
    with pytest.raises(KernelError, match="there is no activation 'relu'; known are none, gelu"):
        rounded(launch, numbers(1, 16), "relu")
    with pytest.raises(KernelError, match="a width of 24 is no multiple of 16"):
        rounded(launch, numbers(1, 24))
    with pytest.raises(KernelError, match="a row of 16400 values is too wide"):
        rounded(launch, numbers(1, 16400))


DEFECTS = {
    "one warp's largest": ("join_block<Largest>(largest, 0u, shared_memory<u32>())", "join_lanes<Largest>(largest)"),
    "a step of the values before the activation": ("held[i][j] = activated(held[i][j], activation);", ""),
    "the wrong half of the bell": ("(1.0f + erff(x * kRootHalf))", "(1.0f - erff(x * kRootHalf))"),
    "another gate": ("1.702f * x", "1.602f * x"),
    "another curve": ("0.044715f * x * x, x, x", "0.034715f * x * x, x, x"),
    "values behind the row": ("if (at < width) *reinterpret_cast", "*reinterpret_cast"),
    "a copy too few is waited for": ("copy_wait<kStages - 2>();", "copy_wait<kStages - 1>();"),
    "no barrier in the loop": ("();\n            __syncthreads();\n", "();\n"),
    "the stage that is read is filled": ("copy(step + kStages - 1);", "copy(step + kStages);"),
    "pieces lie elsewhere than they are read": ("+ place(line, piece);", "+ line * kDepth + kPiece * piece;"),
    "inputs beyond the last": (" && input < of.inputs", ""),
    "rows beyond the last are read": ("at < (of_x ? of.rows : of.outputs)", "at < (of_x ? of.rows + 1 : of.outputs)"),
    "rows beyond the last are written": ("if (at >= of.rows) continue;", ""),
    "outputs beyond the last": ("if (first + 1 < of.outputs) to[1]", "to[1]"),
    "halves of b are swapped": ("{words[2 * k], words[2 * k + 1]}", "{words[2 * k + 1], words[2 * k]}"),
    "one half twice": ("output_at ^ 2 * kPiece * half", "output_at"),
    "a step of another row": ("const float step = steps[at];", "const float step = steps[row];"),
    "a scale of another output": ("scales[first + k]", "scales[first]"),
    "a bias of another output": ("bias[first + k]", "bias[first]"),
    "rows of the other fragment": ("[i % 2 * 2], step", "[0], step"),
}  # fmt: skip


def check_small(launch: GuardedLaunch) -> None:
    check_rows(launch, 2, 528, torch.float16)
    for activation in WHOLE:
        check_activation(launch, activation, torch.float16)
    check_gemm(launch, 37, (272, 69), torch.float16, 64)


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_found(defect: str, tmp_path: Path):
    trims = (("    GEMM(name, Type, 128)\n", "\n"), ("#ifdef TINYCHAT_BF16\nENTRIES(bf16, BF16)\n#endif", ""))
    assert not Defects("int8_linear", trims).survive(check_small, tmp_path, DEFECTS[defect])
