"""Defects planted in the kernels of packed linears, one at a time: the tests in the emulator find each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated import Defects, GuardedLaunch, launch_for, modes, needs_compiler
from packed_linears import check_dequantize, check_gemm, check_gemv, linear, linear8

from emu.launcher import Mode

pytestmark = needs_compiler
HALF = torch.float16

GEMV_DEFECTS = {
    "x is read before it is staged": ("count * kUnitInputs);\n            __syncthreads();", "count * kUnitInputs);"),
    "x is staged while it is read": ("if (begin > 0) __syncthreads();", ""),
    "copies are not waited for": ("copy_commit();\n        copy_wait<0>();", "copy_commit();\n        copy_wait<1>();"),
    "sums are read before they are written": (
        "= sums[j];\n        }\n        __syncthreads();",
        "= sums[j];\n        }",
    ),
    "x is read beyond its end": ("const bool valid = first + i < inputs;", "const bool valid = true;"),
    "rows that are not there": ("min(lane % 8, rows - 1)", "(lane % 8)"),
    "the halves of b are swapped": (
        "matrices[2 * half], matrices[2 * half + 1]",
        "matrices[2 * half + 1], matrices[2 * half]",
    ),
    "one scale for all groups of a unit": ("load_once_8(scales + 8 * i, wanted)", "load_once_8(scales, wanted)"),
    "outputs that are not there": ("if (row >= rows || output >= outputs) return;", "if (row >= rows) return;"),
    "rows that lie askew": ("constexpr int kRowGap = 8;", "constexpr int kRowGap = 4;"),
    "a unit too many": ("if (i < left) multiply", "multiply"),
    "a unit is fetched that is not there": ("i + kAhead < left", "true"),
    "the next unit is a neighbour's": ("words += kWarps * Unit<Bits>::kStride;", "words += Unit<Bits>::kStride;"),
    "the last warp's sums are left out": ("i < kWarps; ++i) sum", "i < kWarps - 1; ++i) sum"),
    "scales of outputs g for g + 8": ("j < 2 ? first : second", "first"),
    "a chunk starts at the wrong input": ("stage(begin * kUnitInputs,", "stage(begin,"),
}
GEMM_DEFECTS = {
    "a copy too few is waited for": ("copy_wait<kStages - 2>", "copy_wait<kStages - 1>"),
    "no barrier in the loop": ("copy_wait<kStages - 2>();\n            __syncthreads();", "copy_wait<kStages - 2>();"),
    "copies of a step are no group": (
        "of.x_stride);\n            copy_commit();\n            multiply",
        "of.x_stride);\n            multiply",
    ),
    "the stage that is read is filled": ("now == 0 ? kStages - 1 : now - 1", "now"),
    "pieces of x are not permuted": ("[at % 8 ^ row % 8]", "[at % 8]"),
    "x is read permuted otherwise": ("(x_at ^ 32 * step)", "(x_at + 32 * step)"),
    "rows of x beyond the last": ("% Rows < of.rows) << i", "% Rows >= 0) << i"),
    "inputs beyond the last": ("&& input + slice * kDepth < inputs", ""),
    "tiles beyond the last": ("valid |= static_cast<u32>(tile < of.tiles) << (kX + i);", "valid |= 1u << (kX + i);"),
    "rows of out beyond the last": ("if (row < of.rows) store", "store"),
    "slices read each other too early": (
        "= flat[i];\n            }\n            __syncthreads();",
        "= flat[i];\n            }",
    ),
    "slices overwrite what is multiplied": ("++from) {\n            __syncthreads();", "++from) {"),
    "a split takes the next one's steps": ("steps * (split + 1) / splits", "steps"),
    "the last split is left out": ("for (int i = 0; i < splits; ++i)", "for (int i = 0; i + 1 < splits; ++i)"),
    "the halves of b are swapped": ("b[p % 2][p / 2]", "b[p / 2][p % 2]"),
    "slices use the first one's groups": ("slice * kDepth / Group + group", "group"),
    "scales of another step": ("scales + step * kInputs / Group * 8", "scales + step * kInputs / Group"),
    "bias for the second of a pair is the first's": (
        "second += Type::to_float(bias[output + 1])",
        "second += Type::to_float(bias[output])",
    ),
    "a pair where there is one": ("const bool both = output + 1 < outputs;", "const bool both = true;"),
    "a warp reads rows that it has not written": ("__syncwarp();", ""),
    "dequantized rows lie askew": (
        "constexpr int kStride = kUnitInputs + 8,",
        "constexpr int kStride = kUnitInputs + 4,",
    ),
    "dequantized outputs beyond the last": (
        "if (output >= outputs || at >= inputs) continue;",
        "if (at >= inputs) continue;",
    ),
}
TILE_DEFECTS = {
    "zero points of outputs g for g + 8": ("zero_twice(second) << 4", "zero_twice(first) << 4"),
    "the high nibbles' mask": ("high(0x00f000f0u", "high(0x000f000fu"),
    "the planes are swapped": ("zeros(8, 8)", "zeros(0, 0)"),
    "the zero point's bits lie in the scale": ("scale & 0xffffff00u", "scale ^ 0x00800000u"),
    "a word of another step": ("case 2: return four.z;", "case 2: return four.w;"),
}  # fmt: skip


# All of one type and group, so that a defect costs one compilation.


def check_small_gemv(launch: GuardedLaunch) -> None:
    check_gemv(launch, linear(24, 608, 32), 1, HALF)
    check_gemv(launch, linear(17, 2816, 32), 8, HALF)
    check_gemv(launch, linear8(24, 256, 8), 2, HALF)


def check_small_gemm(launch: GuardedLaunch) -> None:
    check_gemm(launch, linear(40, 1056, 32), 15, HALF)
    check_gemm(launch, linear(33, 320, 32), 40, HALF)
    check_dequantize(launch, linear(24, 96, 32), HALF)


@modes
def test_without_a_defect_they_pass(mode: Mode):
    check_small_gemv(launch_for(80, mode))
    check_small_gemm(launch_for(80, mode))


@pytest.mark.parametrize("defect", GEMV_DEFECTS)
def test_defects_of_the_gemv_are_found(defect: str, tmp_path: Path):
    assert not Defects("w4_gemv").survive(check_small_gemv, tmp_path, GEMV_DEFECTS[defect])


@pytest.mark.parametrize("defect", GEMM_DEFECTS)
def test_defects_of_the_gemm_are_found(defect: str, tmp_path: Path):
    assert not Defects("w4_gemm").survive(check_small_gemm, tmp_path, GEMM_DEFECTS[defect])


@pytest.mark.parametrize("defect", TILE_DEFECTS)
def test_defects_of_the_tiles_are_found(defect: str, tmp_path: Path):
    assert not Defects("w4_gemv").survive(check_small_gemv, tmp_path, TILE_DEFECTS[defect])
