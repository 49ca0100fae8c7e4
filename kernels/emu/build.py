"""Compiles the emulator, and .cu files as they are, with a C++ compiler; a library lies under its sources' digest."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tinychat_kernels.build import find_compiler
from tinychat_kernels.errors import BuildError

EMULATOR = Path(__file__).parent
KERNELS = EMULATOR.parent / "tinychat_kernels" / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fvisibility=hidden", "-U_FORTIFY_SOURCE")
RUNTIME_FLAGS = ("-O3", "-fvisibility=default")
# Kernels read the same bytes by many types, and their addresses must fit the type.
UNIT_FLAGS = (
    "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas",
    "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error",
    f"-I{EMULATOR / 'include'}", f"-I{KERNELS}", "-include", str(EMULATOR / "emulator.h"),
)  # fmt: skip
SHOWN = 2000  # characters of what a compiler says
MOST = 500  # libraries that are kept


def folder() -> Path:
    """Where compiled units lie: beside the other compiled kernels, or in a temporary folder."""
    cache = os.environ.get("TINYCHAT_CACHE")
    return Path(cache, "kernels") if cache else Path(tempfile.gettempdir(), f"tinychat-emulator-{os.getuid()}")


@functools.cache
def runtime() -> ctypes.CDLL:
    """The emulator itself; units find its functions once it is loaded. Raises BuildError."""
    headers = sorted(EMULATOR.rglob("*.h"))
    made = _compiled("emulator", sorted(EMULATOR.glob("*.cpp")), headers, [*FLAGS, *RUNTIME_FLAGS])
    library = ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    library.emu_allocate.restype = library.emu_begin.restype = ctypes.c_void_p
    return library


@functools.cache
def unit(source: Path, arch: int, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """A .cu, compiled for a GPU of this compute capability (75, 80 ...), and loaded. Raises BuildError."""
    runtime()
    headers = [path for place in (source.parent, KERNELS, EMULATOR) for path in sorted(place.rglob("*.*h"))]
    chosen = [f"-D__CUDA_ARCH__={arch * 10}", *(f"-D{name}" for name in defines)]
    return ctypes.CDLL(str(_compiled(source.stem, [source], headers, [*FLAGS, *UNIT_FLAGS, *chosen])))


def _compiled(name: str, sources: Sequence[Path], headers: Sequence[Path], flags: Sequence[str]) -> Path:
    """The library of these sources, made where it is not there yet."""
    command = [*find_compiler(), *flags, *_machine_flags(), "-x", "c++"]
    text = b"".join(path.read_bytes() for path in [*sources, *headers])
    digest = hashlib.sha256("\0".join(command).encode() + text).hexdigest()[:24]
    path = folder() / f"emulated-{name}-{digest}.so"
    try:
        os.utime(path)  # the least recently used go first
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile([*command, *map(str, sources)], path)
        _trim(path.parent)
    return path


def _trim(place: Path) -> None:
    """Delete the least recently used libraries: kernels with planted defects are many."""
    for path in sorted(place.glob("emulated-*.so"), key=lambda path: path.stat().st_mtime)[:-MOST]:
        path.unlink(missing_ok=True)


def _compile(command: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        made = Path(place, path.name)
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{command[0]} cannot compile {path.name}: {done.stderr[:SHOWN]}")
        made.replace(path)  # so that it appears whole, whoever else compiles it


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """What makes half precision an instruction instead of a call."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text("utf-8").split()) if info.exists() else set()
    return ("-march=x86-64-v3",) if {"avx2", "f16c", "fma", "bmi2", "movbe"} <= words else ()
