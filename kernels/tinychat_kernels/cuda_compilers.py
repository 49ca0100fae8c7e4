"""The compilers of CUDA C++ on this machine: NVRTC, a library, and nvcc, a program. Neither needs a GPU or a driver.

NVRTC comes with torch's CUDA wheels, with the extras cuda12 and cuda13, and with CUDA itself. It is called through its
C interface, so it fits every Python. A Jetson's own comes first there: it fits its driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tinychat_kernels.errors import BuildError

TOOLKIT = Path("/usr/local/cuda")
TEGRA_SIGNS = (Path("/etc/nv_tegra_release"), Path("/proc/device-tree/compatible"))
WHEEL_LIBRARIES = ("nvidia/cu*/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*")
SYSTEM_LIBRARIES = ("lib64/libnvrtc.so.*", "targets/*/lib/libnvrtc.so.*")
BUILTINS = "libnvrtc-builtins.so.*"
HEADER = "cuda_fp16.h"
OPTIONS = ("-std=c++17",)
SHOWN_LINES = 3  # of what a compiler says
NO_COMPILER = "no NVRTC and no nvcc serves: pip install 'tinychat[cuda13]' brings one, or cuda12 for older drivers"


class Compiler(Protocol):
    """Makes machine code for one architecture; `name` says which one it is, with its version."""

    @property
    def name(self) -> str: ...
    def compile(self, source: Path, arch: str, defines: Sequence[str]) -> bytes:
        """The cubin of a source for an arch such as sm_87. Raises BuildError with what the compiler said."""
        ...


@dataclass(frozen=True, slots=True)
class Nvrtc:
    """NVRTC at a path, and the folder of CUDA's headers that belong to it."""

    path: Path
    headers: Path
    version: tuple[int, int]

    @property
    def name(self) -> str:
        return "NVRTC {}.{}".format(*self.version)

    def compile(self, source: Path, arch: str, defines: Sequence[str]) -> bytes:
        options = [f"--gpu-architecture={arch}", *OPTIONS, *_flags(defines, (source.parent, self.headers))]
        return _Program(_nvrtc(self.path), source, options).cubin()

    def archs(self) -> frozenset[str]:
        """What it compiles for; nothing where it does not say, which is before 11.2."""
        library, count = _nvrtc(self.path), ctypes.c_int()
        if not hasattr(library, "nvrtcGetSupportedArchs") or library.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
            return frozenset()
        found = (ctypes.c_int * count.value)()
        return frozenset() if library.nvrtcGetSupportedArchs(found) else frozenset(f"sm_{number}" for number in found)


@dataclass(frozen=True, slots=True)
class Nvcc:
    """nvcc at a path."""

    path: str
    version: tuple[int, int]

    @property
    def name(self) -> str:
        return "nvcc {}.{}".format(*self.version)

    def compile(self, source: Path, arch: str, defines: Sequence[str]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.cubin"
            options = [f"-arch={arch}", "-cubin", *OPTIONS, *_flags(defines, (source.parent,))]
            done = _ran([self.path, *options, str(source), "-o", str(out)])
            if done.returncode != 0 or not out.exists():
                raise BuildError(f"nvcc cannot compile {source.name} for {arch}: {_told(done.stderr + done.stdout)}")
            return out.read_bytes()

    def archs(self) -> frozenset[str]:
        """What it compiles for; nothing where it does not say."""
        return frozenset(re.findall(r"^sm_\d+$", _ran([self.path, "--list-gpu-code"]).stdout, re.MULTILINE))


def is_jetson() -> bool:
    """Whether this is a Tegra board, whose GPU runs no other's machine code and whose driver is part of its system."""
    if platform.machine() != "aarch64":
        return False
    release, tree = TEGRA_SIGNS
    return release.exists() or (tree.exists() and b"nvidia,tegra" in tree.read_bytes())


def find_compiler(newest: int | None = None, like: int | None = None, arch: str | None = None) -> Compiler:
    """The compiler to take: NVRTC before nvcc, and of CUDA version `like` before others; none is above `newest`.

    Versions are major numbers; `newest` is the driver's, which runs no newer machine code. One that does not compile
    for `arch`, such as sm_87, is passed over. Raises BuildError with the reasons why there is none.
    """
    refused: list[str] = []
    usable: list[Nvrtc | Nvcc] = []
    for found in _found(refused):
        if newest is not None and found.version[0] > newest:
            refused.append(f"{found.name} is too new for a driver of CUDA {newest}")
        elif arch is not None and (archs := found.archs()) and arch not in archs:
            refused.append(f"{found.name} does not compile for {arch}")
        else:
            usable.append(found)
    if not usable:
        raise BuildError("; ".join([*dict.fromkeys(refused), NO_COMPILER]))
    return min(usable, key=lambda found: (isinstance(found, Nvcc), like not in (None, found.version[0])))


def compilers_here() -> str:
    """Which compilers there are, or why there is none, in a sentence."""
    refused: list[str] = []
    names = [found.name for found in _found(refused)]
    return f"{', '.join(names)} can compile" if names else "; ".join([*dict.fromkeys(refused), NO_COMPILER])


def _found(refused: list[str]) -> Iterator[Nvrtc | Nvcc]:
    for path in _libraries():
        try:
            yield open_nvrtc(path)
        except BuildError as error:
            refused.append(str(error))
    if (nvcc := find_nvcc()) is not None:
        yield nvcc


@functools.cache
def open_nvrtc(path: Path) -> Nvrtc:
    """NVRTC at this path. Raises BuildError where it does not load, or has no headers."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    headers = next((folder for folder in _header_folders(path) if (folder / HEADER).exists()), None)
    if headers is None:
        missing = "CUDA's headers are not beside it: pip install nvidia-cuda-runtime brings them"
        raise BuildError(f"NVRTC {major.value}.{minor.value} is at {path}, but {missing}")
    return Nvrtc(path, headers, (major.value, minor.value))


@functools.cache
def find_nvcc() -> Nvcc | None:
    """nvcc of PATH, or of CUDA's usual place."""
    path = shutil.which("nvcc") or shutil.which(str(TOOLKIT / "bin" / "nvcc"))
    if path is None:
        return None
    found = re.search(r"release (\d+)\.(\d+)", _ran([path, "--version"]).stdout)
    return Nvcc(path, (int(found[1]), int(found[2]))) if found else None


def _libraries() -> Iterator[Path]:
    """Where NVRTC may lie, the best first."""
    wheels = [path for folder in _site_folders() for pattern in WHEEL_LIBRARIES for path in _globbed(folder, pattern)]
    system = [path for pattern in SYSTEM_LIBRARIES for path in _globbed(TOOLKIT, pattern)]
    both = [*system, *wheels] if is_jetson() else [*wheels, *system]
    yield from dict.fromkeys(path for path in both if re.fullmatch(r"libnvrtc\.so\.\d+", path.name))


def _globbed(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), reverse=True)


def _site_folders() -> list[Path]:
    """Where wheels are unpacked; those of an environment come before the system's."""
    return [Path(name) for name in dict.fromkeys([*sys.path, *site.getsitepackages()]) if name and Path(name).is_dir()]


def _header_folders(library: Path) -> Iterator[Path]:
    """CUDA's headers that fit a library: in the same toolkit or wheel, or in the wheel of the runtime beside it."""
    real = library.resolve()
    for folder in (library.parent, real.parent):
        yield folder.parent / "include"
    yield real.parent.parent.parent / "cuda_runtime" / "include"
    yield TOOLKIT / "include"


@functools.cache
def _nvrtc(path: Path) -> ctypes.CDLL:
    for own in sorted(path.parent.glob(BUILTINS)):  # which NVRTC opens by name, and some wheels do not say where it is
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(own))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from error
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


class _Program:
    """One compilation by NVRTC."""

    def __init__(self, library: ctypes.CDLL, source: Path, options: Sequence[str]) -> None:
        self._library = library
        self._source = source
        self._options = [option.encode() for option in options]

    def cubin(self) -> bytes:
        """Raises BuildError."""
        handle = ctypes.c_void_p()
        text, name = self._source.read_bytes(), self._source.name.encode()
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(handle), text, name, 0, None, None), handle)
        try:
            options = (ctypes.c_char_p * len(self._options))(*self._options)
            self._check(self._library.nvrtcCompileProgram(handle, len(self._options), options), handle)
            return self._read("CUBIN", handle)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(handle))

    def _read(self, what: str, handle: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{what}Size")(handle, ctypes.byref(size))
        out = ctypes.create_string_buffer(size.value)
        getattr(self._library, f"nvrtcGet{what}")(handle, out)
        return out.raw

    def _check(self, result: int, handle: ctypes.c_void_p) -> None:
        if result == 0:
            return
        reason = self._library.nvrtcGetErrorString(result).decode()
        said = _told(self._read("ProgramLog", handle).decode("utf-8", "replace").strip("\0")) if handle else ""
        arch = next(option for option in self._options if b"architecture" in option).decode().partition("=")[2]
        raise BuildError(f"NVRTC cannot compile {self._source.name} for {arch}: {said or reason}")


def _flags(defines: Sequence[str], folders: Sequence[Path]) -> list[str]:
    return [*(f"-D{name}" for name in defines), *(f"-I{folder}" for folder in folders)]


def _told(output: str) -> str:
    """The lines of an output that name an error, or its first ones."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join([line for line in lines if "error" in line][:SHOWN_LINES] or lines[:SHOWN_LINES])


def _ran(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
