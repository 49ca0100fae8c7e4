"""Machine code for the CUDA kernels: from the cache, else compiled for the very GPU in this machine and kept.

A unit is a file of csrc/cuda. Its cubin is named by what it was made from: the source and all headers, the defines, the
architecture and the compiler; its file ends in its SHA-256. Without a compiler, any one's cubin serves. Files appear by
renaming, so several processes may build at once; the least recently used go when there are too many.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinychat_kernels.cuda_compilers import Compiler
from tinychat_kernels.errors import BuildError

SOURCES = Path(__file__).parent / "csrc" / "cuda"
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120")
OLDEST = (7, 5)  # compute capability
ELF = b"\x7fELF"
MOST_BYTES = 64 * 2**20  # of all cubins together
DIGEST_LENGTH = 20
SUM_LENGTH = 32  # bytes of SHA-256 behind a cubin


@dataclass(frozen=True, slots=True)
class Target:
    """What is compiled for: the architecture, such as sm_87, with these defines."""

    arch: str
    defines: tuple[str, ...] = ()


def units() -> list[str]:
    """The names of all units."""
    return sorted(path.stem for path in SOURCES.glob("*.cu"))


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture of a GPU of this compute capability. Raises BuildError for one that is too old."""
    if capability < OLDEST:
        raise BuildError("the GPU has compute capability {}.{}, the kernels need 7.5 or more".format(*capability))
    return "sm_{}{}".format(*capability)


def cubin(unit: str, target: Target, folder: Path, compiler: Compiler | BuildError) -> bytes:
    """The machine code of a unit, compiled where `folder` does not hold it; an error stands for a missing compiler.

    Raises BuildError: no compiler, or what it said.
    """
    stem = _stem(unit, target)
    if isinstance(compiler, BuildError):
        found = next((data for path in sorted(folder.glob(f"{stem}-*.cubin")) if (data := _read(path))), None)
        if found is None:
            raise compiler
        return found
    path = folder / f"{stem}-{_digest([compiler.name.encode()])[:8]}.cubin"
    return _read(path) or _made(path, compiler.compile(SOURCES / f"{unit}.cu", target.arch, target.defines))


def forget(unit: str, target: Target, folder: Path) -> bool:
    """Delete what the cache holds of a unit for a target, whoever compiled it; whether it held anything."""
    held = list(folder.glob(f"{_stem(unit, target)}-*.cubin"))
    with contextlib.suppress(OSError):
        for path in held:
            path.unlink(missing_ok=True)
    return bool(held)


def _stem(unit: str, target: Target) -> str:
    return f"cuda-{unit}-{target.arch}-{source_digest(unit, target.defines)}"


def source_digest(unit: str, defines: Sequence[str] = ()) -> str:
    """What a unit hashes to, with the headers that it may include."""
    sources = [SOURCES / f"{unit}.cu", *sorted(SOURCES.glob("*.cuh"))]
    if not sources[0].exists():
        raise BuildError(f"there is no CUDA unit {unit}; there are {', '.join(units())}")
    return _digest([*(path.read_bytes() for path in sources), *(word.encode() for word in defines)])


def build_digest() -> str:
    """What all units hash to: whether what is known of the kernels still holds."""
    return _digest([source_digest(unit).encode() for unit in units()])


def _read(path: Path) -> bytes:
    """A cubin of the cache; nothing where it is not there, or damaged."""
    try:
        data = path.read_bytes()
        os.utime(path)  # the least recently used goes first
    except OSError:
        return b""
    code, own = data[:-SUM_LENGTH], data[-SUM_LENGTH:]
    return code if hashlib.sha256(code).digest() == own and code.startswith(ELF) else b""


def _made(path: Path, data: bytes) -> bytes:
    """Keep a cubin; a folder that cannot be written is left alone."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data + hashlib.sha256(data).digest())
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
        _trim(path.parent, MOST_BYTES)
    return data


def _trim(folder: Path, most: int) -> None:
    """Delete the least recently used cubins until the others are small enough together."""
    states: list[tuple[float, int, Path]] = []
    for path in folder.glob("cuda-*.cubin"):
        with contextlib.suppress(OSError):  # another process may trim too
            states.append(((state := path.stat()).st_mtime, state.st_size, path))
    kept = 0
    for _, size, path in sorted(states, reverse=True):
        kept += size
        if kept > most:
            path.unlink(missing_ok=True)


def _digest(parts: Sequence[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:DIGEST_LENGTH]
