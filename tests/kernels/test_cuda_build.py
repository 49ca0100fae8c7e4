"""Compiling CUDA kernels: what the cache holds, whom it asks, and the sentences where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinychat_kernels import cuda_build, cuda_compilers
from tinychat_kernels.cuda_build import ELF, Target
from tinychat_kernels.cuda_compilers import Nvcc, Nvrtc
from tinychat_kernels.errors import BuildError

KERNEL = '#include "number.cuh"\nextern "C" __global__ void put(float* out) { *out = NUMBER; }\n'
TARGET = Target("sm_87")


@dataclass
class Counting:
    """A compiler that counts."""

    name: str = "counting 1"
    asked: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)

    def compile(self, source: Path, arch: str, defines: Sequence[str]) -> bytes:
        self.asked.append((source.name, arch, tuple(defines)))
        return ELF + str(len(self.asked)).encode()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "number.cuh").write_text("#pragma once\n#define NUMBER 42.f\n")
    (folder / "put.cu").write_text(KERNEL)
    monkeypatch.setattr(cuda_build, "SOURCES", folder)
    return folder


def test_what_is_compiled_once_is_kept(sources: Path, tmp_path: Path) -> None:
    cache, compiler = tmp_path / "cache", Counting()
    first = cuda_build.cubin("put", TARGET, cache, compiler)
    assert cuda_build.cubin("put", TARGET, cache, compiler) == first
    assert compiler.asked == [("put.cu", "sm_87", ())]
    assert not list(cache.glob("*.part"))


def test_another_header_define_arch_or_compiler_is_compiled_anew(sources: Path, tmp_path: Path) -> None:
    cache, compiler = tmp_path / "cache", Counting()
    cuda_build.cubin("put", TARGET, cache, compiler)
    before = cuda_build.build_digest()
    (sources / "number.cuh").write_text("#define NUMBER 7.f\n")
    assert cuda_build.build_digest() != before
    cuda_build.cubin("put", TARGET, cache, compiler)
    cuda_build.cubin("put", Target("sm_87", ("FAST=1",)), cache, compiler)
    cuda_build.cubin("put", Target("sm_90"), cache, compiler)
    assert len(compiler.asked) == 4
    other = Counting("counting 2")
    cuda_build.cubin("put", TARGET, cache, other)
    assert len(other.asked) == 1


def test_without_a_compiler_the_cache_serves(sources: Path, tmp_path: Path) -> None:
    cache, missing = tmp_path / "cache", BuildError("no compiler at all")
    with pytest.raises(BuildError, match="no compiler at all"):
        cuda_build.cubin("put", TARGET, cache, missing)
    made = cuda_build.cubin("put", TARGET, cache, Counting())
    assert cuda_build.cubin("put", TARGET, cache, missing) == made


def test_a_damaged_file_is_made_again(sources: Path, tmp_path: Path) -> None:
    cache, compiler = tmp_path / "cache", Counting()
    cuda_build.cubin("put", TARGET, cache, compiler)
    (path,) = cache.glob("*.cubin")
    whole = path.read_bytes()
    for made, damaged in enumerate((b"", whole[:-1], ELF + b"2" + whole[len(ELF) + 1 :], ELF + bytes(90)), start=2):
        path.write_bytes(damaged)
        assert cuda_build.cubin("put", TARGET, cache, compiler) == ELF + str(made).encode()
        assert path.read_bytes().startswith(ELF) and len(compiler.asked) == made


def test_what_does_not_load_is_forgotten(sources: Path, tmp_path: Path) -> None:
    cache, compiler = tmp_path / "cache", Counting()
    assert not cuda_build.forget("put", TARGET, cache)
    for target in (TARGET, Target("sm_90")):
        cuda_build.cubin("put", target, cache, compiler)
    assert cuda_build.forget("put", TARGET, cache)
    assert [path.name.split("-")[2] for path in cache.iterdir()] == ["sm_90"]


def test_a_folder_that_cannot_be_written_is_left_alone(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert cuda_build.cubin("put", TARGET, tmp_path / "cache", Counting()) == ELF + b"1"


def test_the_least_recently_used_go_first(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, compiler = tmp_path / "cache", Counting()
    monkeypatch.setattr(cuda_build, "MOST_BYTES", 2 * (len(ELF + b"1") + cuda_build.SUM_LENGTH))
    for age, arch in ((30, "sm_80"), (20, "sm_86")):
        cuda_build.cubin("put", Target(arch), cache, compiler)
        path = next(cache.glob(f"*-{arch}-*"))
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    cuda_build.cubin("put", Target("sm_80"), cache, compiler)  # a hit makes it young
    cuda_build.cubin("put", Target("sm_90"), cache, compiler)
    assert sorted(path.name.split("-")[2] for path in cache.iterdir()) == ["sm_80", "sm_90"]


def test_unknown_units_and_old_gpus_are_named(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="there is no CUDA unit get; there are put"):
        cuda_build.cubin("get", TARGET, tmp_path, Counting())
    with pytest.raises(BuildError, match=r"compute capability 7.0, the kernels need 7.5 or more"):
        cuda_build.arch_of((7, 0))
    assert [cuda_build.arch_of(c) for c in ((7, 5), (8, 7), (12, 0))] == ["sm_75", "sm_87", "sm_120"]


# Which compiler


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """NVRTC of 13 and of 12 in that order, and nvcc 13."""
    libraries = [Path("/a/libnvrtc.so.13"), Path("/a/libnvrtc.so.12")]

    def opened(path: Path) -> Nvrtc:
        return Nvrtc(path, Path("/a"), (int(path.suffix[1:]), 1))

    monkeypatch.setattr(cuda_compilers, "_libraries", lambda: iter(libraries))
    monkeypatch.setattr(cuda_compilers, "open_nvrtc", opened)
    monkeypatch.setattr(cuda_compilers, "find_nvcc", lambda: Nvcc("/a/nvcc", (13, 0)))
    return libraries


@pytest.mark.parametrize(
    ("newest", "like", "name"),
    [(None, None, "NVRTC 13.1"), (13, 12, "NVRTC 12.1"), (12, 13, "NVRTC 12.1"), (13, 11, "NVRTC 13.1")],
)
def test_the_compiler_fits_driver_and_torch(
    compilers: list[Path], newest: int | None, like: int | None, name: str
) -> None:
    assert cuda_compilers.find_compiler(newest, like).name == name


def test_a_compiler_that_does_not_know_the_gpu_is_passed_over(
    compilers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {13: frozenset({"sm_75", "sm_120"}), 12: frozenset({"sm_70", "sm_75"})}
    monkeypatch.setattr(Nvrtc, "archs", lambda self: known[self.version[0]])
    monkeypatch.setattr(Nvcc, "archs", lambda self: frozenset({"sm_110"}))
    names = [cuda_compilers.find_compiler(13, 12, f"sm_{n}").name for n in (75, 120, 110)]
    assert names == ["NVRTC 12.1", "NVRTC 13.1", "nvcc 13.0"]
    with pytest.raises(BuildError, match=r"NVRTC 13.1 does not compile for sm_130; NVRTC 12.1 does not .*nvcc serves"):
        cuda_compilers.find_compiler(13, 12, "sm_130")
    monkeypatch.setattr(Nvcc, "archs", lambda self: frozenset())  # one that does not say is tried
    assert cuda_compilers.find_compiler(13, 12, "sm_130").name == "nvcc 13.0"


def test_which_compilers_there_are_is_said(compilers: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_compilers.compilers_here() == "NVRTC 13.1, NVRTC 12.1, nvcc 13.0 can compile"
    compilers.clear()
    monkeypatch.setattr(cuda_compilers, "find_nvcc", lambda: None)
    assert cuda_compilers.compilers_here().startswith("no NVRTC and no nvcc serves")


def test_the_builtins_beside_nvrtc_are_loaded_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(path: str) -> SimpleNamespace:
        loaded.append(Path(path).name)
        if "alt" in path:
            raise OSError("not for this machine")
        return SimpleNamespace(nvrtcGetErrorString=SimpleNamespace())

    monkeypatch.setattr(cuda_compilers.ctypes, "CDLL", load)
    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.so.13.0.alt", "libcudart.so.13"):
        (tmp_path / name).touch()
    cuda_compilers._nvrtc(tmp_path / "libnvrtc.so.13")
    assert loaded == ["libnvrtc-builtins.so.13.0", "libnvrtc-builtins.so.13.0.alt", "libnvrtc.so.13"]


def test_nvcc_serves_without_nvrtc(compilers: list[Path]) -> None:
    compilers.clear()
    assert cuda_compilers.find_compiler(13, 12).name == "nvcc 13.0"
    with pytest.raises(BuildError, match="^nvcc 13.0 is too new for a driver of CUDA 12; no NVRTC and no nvcc serves"):
        cuda_compilers.find_compiler(12)


def test_no_compiler_says_what_to_install(compilers: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compilers.clear()
    monkeypatch.setattr(cuda_compilers, "find_nvcc", lambda: None)
    with pytest.raises(BuildError, match=r"^no NVRTC and no nvcc serves: pip install 'tinychat\[cuda13\]' brings one"):
        cuda_compilers.find_compiler()


def test_a_library_that_does_not_load_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "libnvrtc.so.13"
    wrong.write_bytes(b"nothing")
    monkeypatch.setattr(cuda_compilers, "_libraries", lambda: iter([wrong]))
    monkeypatch.setattr(cuda_compilers, "find_nvcc", lambda: None)
    with pytest.raises(BuildError, match=f"^{wrong} does not load: .*; no NVRTC and no nvcc serves"):
        cuda_compilers.find_compiler()


@pytest.mark.parametrize("jetson", [False, True])
def test_a_jetson_takes_its_own_library_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jetson: bool) -> None:
    system, wheels = tmp_path / "cuda", tmp_path / "site"
    names = [system / "lib64" / "libnvrtc.so.12", wheels / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13"]
    for path in (*names, wheels / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13.5.1"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(cuda_compilers, "TOOLKIT", system)
    monkeypatch.setattr(cuda_compilers, "_site_folders", lambda: [wheels])
    monkeypatch.setattr(cuda_compilers, "is_jetson", lambda: jetson)
    assert list(cuda_compilers._libraries()) == (names if jetson else names[::-1])


def test_a_jetson_is_known_by_its_device_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "compatible"
    monkeypatch.setattr(cuda_compilers, "TEGRA_SIGNS", (tmp_path / "release", tree))
    monkeypatch.setattr(cuda_compilers.platform, "machine", lambda: "aarch64")
    assert not cuda_compilers.is_jetson()
    tree.write_bytes(b"arm,server\0")
    assert not cuda_compilers.is_jetson()
    tree.write_bytes(b"nvidia,p3768\0nvidia,tegra234\0")
    assert cuda_compilers.is_jetson()
    monkeypatch.setattr(cuda_compilers.platform, "machine", lambda: "x86_64")
    assert not cuda_compilers.is_jetson()


# The real ones


def real() -> list[Nvrtc | Nvcc]:
    refused: list[str] = []
    return list(cuda_compilers._found(refused))


@pytest.mark.skipif(not real(), reason="neither NVRTC nor nvcc")
def test_the_compilers_here_compile_and_say_what_is_wrong(sources: Path, tmp_path: Path) -> None:
    for compiler in real():
        assert {"sm_87", "sm_90"} <= compiler.archs() and "sm_42" not in compiler.archs()
        made = cuda_build.cubin("put", Target("sm_87", ("OTHER=1",)), tmp_path / "cache", compiler)
        assert made.startswith(ELF) and b"put" in made
        with pytest.raises(BuildError, match=r"cannot compile put.cu for sm_42: .*(gpu-architecture|gpu architecture)"):
            cuda_build.cubin("put", Target("sm_42"), tmp_path / "cache", compiler)
    (sources / "number.cuh").write_text("")
    for compiler in real():
        with pytest.raises(BuildError, match="cannot compile put.cu for sm_87: .*NUMBER"):
            cuda_build.cubin("put", TARGET, tmp_path / "cache", compiler)


@pytest.mark.skipif(not real(), reason="neither NVRTC nor nvcc")
def test_several_processes_may_compile_at_once(sources: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tinychat_kernels import cuda_build, cuda_compilers; "
        "cuda_build.SOURCES = pathlib.Path(sys.argv[1]); "
        "made = cuda_build.cubin('put', cuda_build.Target('sm_90'), pathlib.Path(sys.argv[2]), "
        "cuda_compilers.find_compiler()); assert made.startswith(cuda_build.ELF)"
    )
    path = str(Path(__file__).parents[2] / "kernels")
    command = [sys.executable, "-c", code, str(sources), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_lines_of_cuda_sources_are_short() -> None:
    emulator = Path(__file__).parents[2] / "kernels" / "emu"
    paths = [*cuda_build.SOURCES.glob("*.cu*"), *emulator.glob("*.h"), *emulator.glob("*.cpp")]
    lines = [(path.name, line) for path in paths for line in path.read_text("utf-8").splitlines()]
    assert len(paths) > 15 and [name for name, line in lines if len(line) > 120] == []
