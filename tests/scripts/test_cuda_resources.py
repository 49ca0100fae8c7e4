"""What the CUDA kernels take of a GPU: the tables of the tools are read rightly, and the kernels are as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cuda_resources
from cuda_resources import Kernel
from tinychat_kernels import cuda_build, cuda_compilers
from tinychat_kernels.errors import BuildError

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function w4_gemm_f16:
  REG:76 STACK:0 SHARED:12288 LOCAL:0 CONSTANT[0]:404 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function put:
  REG:9 STACK:16 SHARED:0 LOCAL:8 CONSTANT[2]:16 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
	.section	.text.w4_gemm_f16,"ax",@progbits
.text.w4_gemm_f16:
        /*0000*/                   LDG.E.128 R4, [R2] ;
        /*0010*/               @P0 LDGSTS.E.BYPASS.128 [R0], [R2] ;
        /*0020*/                   LDG.E.NA.LTC128B.128.CONSTANT R4, [R2] ;
        /*0030*/                   LDG.E.U16 R4, [R2] ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
	.section	.text.put,"ax",@progbits
.text.put:
        /*0000*/                   STL [R1], R4 ;
        /*0010*/                   LDL.64 R4, [R1] ;
        /*0020*/                   IMMA.16832.S8.S8 R4, R8, R12, R4 ;
"""


def kernel(registers: int = 40, stack: int = 0, **counts: int) -> Kernel:
    return Kernel(registers, stack, 0, {name: counts.get(name, 0) for name in cuda_resources.INSTRUCTIONS})


def test_the_tools_are_read() -> None:
    usages = dict(cuda_resources.usages(USAGE))
    assert {name: (u["REG"], u["STACK"], u["LOCAL"], u["SHARED"]) for name, u in usages.items()} == {
        "w4_gemm_f16": (76, 0, 0, 12288),
        "put": (9, 16, 8, 0),
    }
    counts = cuda_resources.counted(CODE)
    assert +counts["w4_gemm_f16"] == {"HMMA": 1, "LDGSTS": 1, "LDG.128": 2}
    assert +counts["put"] == {"spills": 2, "IMMA": 1}


def test_defects_are_named() -> None:
    good = kernel(HMMA=4, LDSM=2, LDGSTS=1)
    name = "w4_gemm_f16_g128"

    def said(kernel: Kernel, arch: str = "sm_80", before: list[int] | None = None) -> list[str]:
        return list(cuda_resources.defects(name, arch, kernel, [40, 0, 0, 0] if before is None else before))

    assert said(good) == [] and said(kernel(48, HMMA=4, LDSM=2, LDGSTS=1)) == []
    assert said(kernel(49, HMMA=4, LDSM=2, LDGSTS=1)) == [f"{name} on sm_80 takes 49 registers, 40 before"]
    assert said(kernel(HMMA=4, LDSM=2)) == [f"{name} on sm_80 has no LDGSTS"]
    assert said(kernel(HMMA=4, LDSM=2), "sm_75") == []
    narrow = "attn_decode_bf16_d32_kv8"
    assert cuda_resources.missing(narrow, "sm_80", kernel(HMMA=1)) == []
    assert cuda_resources.missing("attn_decode_bf16_d32", "sm_80", kernel(HMMA=1)) == ["LDG.128"]
    assert cuda_resources.missing("int8_gemm_f16_64", "sm_75", kernel(LDSM=1)) == ["IMMA"]
    spilled = kernel(stack=8, spills=3, HMMA=4, LDSM=2, LDGSTS=1)
    assert said(spilled) == [f"{name} on sm_80 spills: 3 loads and stores, 8 bytes of stack"]
    (unknown,) = cuda_resources.defects(name, "sm_80", good, None)
    assert unknown.endswith("is not in resources.json: scripts/check_cuda_kernels resources --write adds it")


def test_the_table_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_resources, "TABLE", tmp_path / "resources.json")
    assert cuda_resources.read_table() == {}
    cuda_resources.write_table({"b": {"sm_100": kernel(7), "sm_80": kernel(8, stack=4)}, "a": {}}, "NVRTC 0.0")
    assert cuda_resources.read_table() == {"a": {}, "b": {"sm_80": [8, 0, 4, 0], "sm_100": [7, 0, 0, 0]}}
    assert cuda_resources.table_for("NVRTC 0.0", {}) == cuda_resources.read_table()
    assert cuda_resources.table_for("NVRTC 0.1", {"b": {"sm_80": kernel(99)}}) == {"b": {"sm_80": [99, 0, 0, 0]}}
    text = cuda_resources.TABLE.read_text()
    assert text.count("\n") == 8 and text.index("sm_80") < text.index("sm_100")
    assert json.loads(text)["columns"] == list(cuda_resources.COLUMNS)


def compiler() -> cuda_compilers.Compiler | None:
    try:
        return cuda_compilers.find_compiler()
    except BuildError:
        return None


needs_tools = pytest.mark.skipif(
    compiler() is None or bool(cuda_resources.missing_tools()), reason="no NVRTC, cuobjdump or nvdisasm"
)


@needs_tools
def test_a_kernel_that_spills_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spill.cu").write_text(
        'extern "C" __global__ void spill(const float* in, float* out, int n) {\n'
        "  float kept[200];\n  for (int i = 0; i < 200; i++) kept[i] = in[i];\n  out[0] = kept[n];\n}\n"
        'extern "C" __global__ void copy(const uint4* in, uint4* out, long long n) { out[n] = in[n]; }\n'
    )
    monkeypatch.setattr(cuda_build, "SOURCES", tmp_path)
    made = compiler()
    assert made is not None
    (_, _, cubin), *_ = cuda_resources.compiled(made, ["sm_87"], ["spill"])
    found = cuda_resources.kernels_of(cubin)
    assert found["spill"].stack >= 800 and found["spill"].spills
    assert not found["copy"].stack and not found["copy"].spills and found["copy"].counts["LDG.128"] == 1
    assert 0 < found["copy"].registers < 32
    assert cuda_resources.parameters_of(cubin) == {"spill": [8, 8, 4], "copy": [8, 8, 8]}


@needs_tools
@pytest.mark.parametrize(
    "archs",
    [("sm_75", "sm_87"), pytest.param(cuda_build.ARCHS, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
    ids=["two", "all"],
)
def test_the_kernels_are_as_the_table_says(archs: tuple[str, ...]) -> None:
    made = compiler()
    assert made is not None
    found = cuda_resources.survey(made, archs, cuda_build.units())
    assert cuda_resources.findings(found, cuda_resources.table_for(made.name, found)) == []
    assert set(found) == set(cuda_resources.read_table())
