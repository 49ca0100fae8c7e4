"""Compile every CUDA kernel for every GPU we name, and compare registers and instructions with what they were.

Needs no GPU: NVRTC, cuobjdump and nvdisasm come with the dev extra. A kernel that spills, takes over 8 registers more
than csrc/cuda/resources.json says, or has lost its matrix instructions or wide loads, fails. --write renews the table.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinychat_kernels import cuda_build, cuda_compilers
from tinychat_kernels.cuda_build import ARCHS
from tinychat_kernels.cuda_compilers import Compiler
from tinychat_kernels.errors import BuildError

TABLE = cuda_build.SOURCES / "resources.json"
COLUMNS = ("registers", "spills", "stack", "shared")
MORE_REGISTERS = 8  # a processor gives them out so many at a time
THREADS = 2
INSTRUCTIONS = {  # what is counted -> how it is written
    "HMMA": r"HMMA\.",
    "IMMA": r"IMMA\.",
    "LDSM": r"LDSM\.",
    "LDGSTS": r"LDGSTS\.",
    "LDG.128": r"LDG\.\S*128\b",
    "spills": r"(?:LDL|STL)\b",
}
EXPECTED = {  # the entries that begin like this -> what they must have; before sm_80 there is no LDGSTS
    "w4_gemm_": ("HMMA", "LDSM", "LDGSTS"),
    "w4_gemv_": ("HMMA", "LDSM", "LDGSTS", "LDG.128"),
    "w8_gemv_": ("HMMA", "LDSM", "LDGSTS", "LDG.128"),
    "w4_reduce_": ("LDG.128",),
    "w4_dequantize_": ("LDG.128",),
    "w8_dequantize_": ("LDG.128",),
    "attn_decode_": ("HMMA", "LDG.128"),
    "int8_gemm_": ("IMMA", "LDSM", "LDGSTS"),
    "quantize_rows_": ("LDG.128",),
    "add_rms_norm_": ("LDG.128",),
    "swiglu_": ("LDG.128",),
    "rope_kv_": ("LDG.128",),
}
NARROW = re.compile(r"attn_decode_\w+_d32_kv8")  # rows of 32 bytes, which 4 and 8 lanes share


@dataclass(frozen=True, slots=True)
class Kernel:
    """What an entry takes of a processor, and how often each of INSTRUCTIONS stands in it."""

    registers: int
    stack: int
    shared: int
    counts: Mapping[str, int]

    @property
    def spills(self) -> int:
        return self.counts["spills"]

    @property
    def row(self) -> list[int]:
        return [getattr(self, name) for name in COLUMNS]


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: of a wheel beside this Python, else of PATH or CUDA's usual place."""
    wheels = [path for folder in sys.path for path in Path(folder).glob(f"nvidia/cu*/bin/{name}")]
    known = [*map(str, wheels), name, str(cuda_compilers.TOOLKIT / "bin" / name)]
    return next((found for candidate in known if (found := shutil.which(candidate))), None)


def missing_tools() -> list[str]:
    """What is needed and not here."""
    return [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]


def kernels_of(cubin: bytes) -> dict[str, Kernel]:
    """The entries of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unit.cubin"
        path.write_bytes(cubin)
        counts = counted(_said("nvdisasm", "-c", path))
        return {
            name: Kernel(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], numbers["SHARED"], counts[name])
            for name, numbers in usages(_said("cuobjdump", "-res-usage", path))
        }


def parameters_of(cubin: bytes) -> dict[str, list[int]]:
    """The bytes of each entry's parameters, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unit.cubin"
        path.write_bytes(cubin)
        said = _said("cuobjdump", "-elf", path)
    found: dict[str, dict[int, int]] = {}
    for block in re.split(r"^\.nv\.info\.", said, flags=re.MULTILINE)[1:]:
        name = block.partition("\n")[0].strip()
        places = re.findall(r"Ordinal\s*:\s*(0x\w+)\s+Offset\s*:\s*0x\w+\s+Size\s*:\s*(0x\w+)", block)
        found[name] = {int(ordinal, 16): int(size, 16) for ordinal, size in places}
    return {name: [sizes[i] for i in sorted(sizes)] for name, sizes in found.items()}


def usages(said: str) -> Iterator[tuple[str, dict[str, int]]]:
    """What cuobjdump -res-usage says, a function at a time."""
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", said):
        yield name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}


def counted(said: str) -> dict[str, Counter[str]]:
    """How often each of INSTRUCTIONS stands in what nvdisasm says, a function at a time."""
    out: dict[str, Counter[str]] = {}
    for block in re.split(r"^\.text\.", said, flags=re.MULTILINE)[1:]:
        name, _, code = block.partition(":")
        out[name] = Counter({what: len(re.findall(rf"\s{how}", code)) for what, how in INSTRUCTIONS.items()})
    return out


def defects(name: str, arch: str, kernel: Kernel, before: Sequence[int] | None) -> Iterator[str]:
    """What is wrong with a kernel, beside what it took before."""
    where = f"{name} on {arch}"
    if kernel.spills or kernel.stack:
        yield f"{where} spills: {kernel.spills} loads and stores, {kernel.stack} bytes of stack"
    for what in missing(name, arch, kernel):
        yield f"{where} has no {what}"
    if before is None:
        yield f"{where} is not in {TABLE.name}: scripts/check_cuda_kernels resources --write adds it"
    elif kernel.registers > before[0] + MORE_REGISTERS:
        yield f"{where} takes {kernel.registers} registers, {before[0]} before"


def missing(name: str, arch: str, kernel: Kernel) -> list[str]:
    """The instructions that a kernel is said to have and has not."""
    wanted = [what for prefix, whats in EXPECTED.items() if name.startswith(prefix) for what in whats]
    without = {what for what, never in (("LDGSTS", arch == "sm_75"), ("LDG.128", NARROW.match(name))) if never}
    return [what for what in wanted if what not in without and not kernel.counts[what]]


def compiled(compiler: Compiler, archs: Sequence[str], units: Sequence[str]) -> Iterator[tuple[str, str, bytes]]:
    """(unit, arch, cubin) of every unit for every arch."""
    pairs = [(unit, arch) for unit in units for arch in archs]

    def made(pair: tuple[str, str]) -> bytes:
        return compiler.compile(cuda_build.SOURCES / f"{pair[0]}.cu", pair[1], ())

    with ThreadPoolExecutor(THREADS) as pool:
        for (unit, arch), cubin in zip(pairs, pool.map(made, pairs), strict=True):
            yield unit, arch, cubin


def survey(compiler: Compiler, archs: Sequence[str], units: Sequence[str]) -> dict[str, dict[str, Kernel]]:
    """Entry -> arch -> what it takes."""
    out: dict[str, dict[str, Kernel]] = {}
    for _, arch, cubin in compiled(compiler, archs, units):
        for name, kernel in kernels_of(cubin).items():
            out.setdefault(name, {})[arch] = kernel
    return out


def findings(found: Mapping[str, Mapping[str, Kernel]], table: Mapping[str, Any]) -> list[str]:
    """What is wrong, kernel by kernel, beside a table."""
    return [
        defect
        for name, archs in found.items()
        for arch, kernel in archs.items()
        for defect in defects(name, arch, kernel, table.get(name, {}).get(arch))
    ]


def read_table() -> dict[str, dict[str, list[int]]]:
    return json.loads(TABLE.read_text("utf-8"))["kernels"] if TABLE.exists() else {}


def table_for(compiler: str, found: Mapping[str, Mapping[str, Kernel]]) -> dict[str, dict[str, list[int]]]:
    """The table where this compiler made it. Another one's registers differ: they are beside nothing but themselves."""
    if TABLE.exists() and json.loads(TABLE.read_text("utf-8"))["compiler"] == compiler:
        return read_table()
    print(f"{TABLE.name} is not of {compiler}: registers are not compared", file=sys.stderr)
    return {name: {arch: kernel.row for arch, kernel in archs.items()} for name, archs in found.items()}


def write_table(found: Mapping[str, Mapping[str, Kernel]], compiler: str) -> None:
    """One line a kernel, so that a change is a line."""
    lines = [
        f"    {json.dumps(name)}: {json.dumps({arch: kernel.row for arch, kernel in sorted(archs.items(), key=_age)})}"
        for name, archs in sorted(found.items())
    ]
    head = f'{{\n  "compiler": {json.dumps(compiler)},\n  "columns": {json.dumps(COLUMNS)},\n  "kernels": {{\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n  }\n}\n", "utf-8")


def _age(item: tuple[str, object]) -> int:
    return int(item[0].removeprefix("sm_"))


def _said(name: str, *arguments: object) -> str:
    path = tool(name)
    if path is None:
        raise BuildError(f"{name} is missing: pip install nvidia-cuda-{name}")
    beside = str(Path(path).parent)  # cuobjdump looks for nvdisasm there
    return subprocess.run([path, *map(str, arguments)], check=True, capture_output=True, text=True, cwd=beside).stdout


def check_nvcc(archs: Sequence[str], units: Sequence[str]) -> list[str]:
    """What is wrong with nvcc's machine code, where there is nvcc; registers are not compared."""
    nvcc = cuda_compilers.find_nvcc()
    if nvcc is None:
        print("no nvcc is here: NVRTC alone was asked", file=sys.stderr)
        return []
    found = survey(nvcc, archs, units)
    return [f"{nvcc.name}: {line}" for line in findings(found, table_for(nvcc.name, found))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="*", default=list(ARCHS), help=f"default: {' '.join(ARCHS)}")
    parser.add_argument("--unit", action="append", help="a unit of csrc/cuda alone; may be given again")
    parser.add_argument("--write", action="store_true", help="renew the table; what is wrong is said all the same")
    args = parser.parse_args()
    if lacking := missing_tools():
        print(f"{lacking[0]} is missing: scripts/setup --dev installs it", file=sys.stderr)
        return 2
    units = args.unit or cuda_build.units()
    compiler = cuda_compilers.find_compiler()
    found = survey(compiler, args.archs, units)
    if args.write:
        write_table(found, compiler.name)
    wrong = [*findings(found, table_for(compiler.name, found)), *check_nvcc(args.archs, units)]
    print("\n".join(wrong) or f"{len(found)} kernels for {len(args.archs)} GPUs: clean", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
