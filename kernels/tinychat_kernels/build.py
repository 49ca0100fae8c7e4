"""Compiles the CPU kernels into one shared library: at installation (setup.py), or at first use into the cache.

A library knows the digest of the sources it was made from, so one that lies beside newer sources is never loaded.
Compilation goes file by file, each object under the digest of what it was made from; files appear by renaming, so
several processes may build at once. What a compiler cannot compile is remembered for a day.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tinychat_kernels.errors import BuildError

SOURCES = Path(__file__).parent / "csrc" / "cpu"
LIBRARY = "_cpu.so"  # beside this file, where the installation compiled it
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-pthread")
LINK_FLAGS = ("-shared", "-pthread")
MARK = b"tinychat CPU kernels, sources "  # stands before the digest in a library
DIGEST_LENGTH = 24
SHOWN_LINES = 3  # of what a compiler says
KEPT_SECONDS = 30 * 24 * 3600
FAILED = ".failed"  # the suffix of a file that holds what a compiler said
FAILED_SECONDS = 24 * 3600  # until the same compiler is asked again to compile the same sources


def installed() -> Path | None:
    """The library of the installation, if it was made from the sources that lie here."""
    path = Path(__file__).parent / LIBRARY
    return path if path.exists() and digest_of(path) == source_digest() else None


def load(folder: Path) -> tuple[Path, ctypes.CDLL]:
    """The library that is installed, or the cache folder's, compiled if need be; a damaged one is compiled anew, once.

    Raises BuildError.
    """
    path = installed()
    if path is not None:
        return path, _loaded(path)
    path = built(folder)
    try:
        return path, _loaded(path)
    except BuildError:
        with _writing(folder):
            path.unlink(missing_ok=True)
        path = built(folder)
        return path, _loaded(path)


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        if digest_of(path) != source_digest():  # before it is mapped: what is cut off ends the process
            raise BuildError(f"{path} is damaged")
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error})") from error


def built(folder: Path) -> Path:
    """The library in the cache folder, compiled if it is not there yet. Raises BuildError."""
    compiler = find_compiler()
    path = _path_in(folder, compiler)
    with _writing(folder):
        if path.exists():
            return path
        if (said := _failed_before(path)) is not None:
            raise BuildError(f"{said} (earlier today; `tinychat doctor --cache --clear` forgets it)")
    try:
        compile_library(path, compiler, folder)
    except CompilerError as error:
        with contextlib.suppress(OSError):
            path.with_suffix(FAILED).write_text(str(error), "utf-8")
        raise
    with contextlib.suppress(OSError):
        _clear_old(folder)
    return path


class CompilerError(BuildError):
    """A compiler that does not compile the sources."""


def _failed_before(path: Path) -> str | None:
    """What the compiler of this library said less than a day ago, of the same sources."""
    mark = path.with_suffix(FAILED)
    try:
        is_new = time.time() - mark.stat().st_mtime < FAILED_SECONDS
        return mark.read_text("utf-8", "replace") if is_new else None
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _writing(folder: Path) -> Generator[None, None, None]:
    """What keeps files from being read and written there becomes a BuildError."""
    try:
        yield
    except OSError as error:
        why = f"{folder} cannot be used: {error.strerror or error}"
        raise BuildError(f"{why}; TINYCHAT_CACHE may name another folder") from error


def _clear_old(folder: Path) -> None:
    """Remove what was made of other sources or by other compilers a month ago and more, and what was cut off then."""
    before = time.time() - KEPT_SECONDS
    for path in (path for path in folder.iterdir() if path.suffix in {".o", ".so", FAILED}):
        with contextlib.suppress(OSError):  # another process clears as well
            if path.stat().st_mtime < before:
                path.unlink()


def waits_for_compiler(folder: Path) -> bool:
    """Whether `built` is going to compile, which takes a minute or so."""
    try:
        path = None if installed() else _path_in(folder, find_compiler())
        return path is not None and not path.exists() and _failed_before(path) is None
    except (BuildError, OSError):
        return False


def _path_in(folder: Path, compiler: Sequence[str]) -> Path:
    return folder / f"cpu-{_digest([*_source_bytes(), *_setting(compiler)])}.so"


def find_compiler() -> list[str]:
    """CXX, or the first C++ compiler in PATH. Raises BuildError where there is none."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"no C++ compiler was found ({', '.join(COMPILERS)})")


def compile_library(path: Path, compiler: Sequence[str], objects: Path, flags: Sequence[str] = ()) -> None:
    """Compile every source and link them; objects of the same source, headers and flags are taken from `objects`.

    Raises BuildError.
    """
    for folder in (path.parent, objects):
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    headers = [header.read_bytes() for header in sorted(SOURCES.glob("*.h"))]
    setting = [*headers, *_setting(compiler), *(flag.encode() for flag in flags)]
    common = [*compiler, *FLAGS, *flags]

    def compiled(source: Path) -> Path:
        out = objects / f"{source.stem}-{_digest([source.read_bytes(), *setting])}.o"
        if not out.exists():
            _run([*common, "-c", str(source)], out)
        return out

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        parts = [str(part) for part in pool.map(compiled, sorted(SOURCES.glob("*.cpp")))]
        parts.append(str(_digest_object(common, objects)))
    _run([*common, *LINK_FLAGS, *parts], path)


def source_digest() -> str:
    """What the sources hash to; a library of these sources says the same."""
    return _digest(_source_bytes())


def digest_of(path: Path) -> str:
    """The digest of the sources that a library was made from; empty for what is no library of ours."""
    return path.read_bytes().partition(MARK)[2][:DIGEST_LENGTH].decode("ascii", "replace")


def _digest_object(common: Sequence[str], objects: Path) -> Path:
    """A function that returns the mark and the digest, compiled."""
    head = 'extern "C" __attribute__((visibility("default"))) const char* tc_source_digest(void)'
    text = f'{head} {{ return "{MARK.decode()}{source_digest()}"; }}\n'
    out = objects / f"digest-{_digest([text.encode(), *_setting(common)])}.o"
    if not out.exists():
        with _writing(objects), tempfile.TemporaryDirectory(dir=objects) as folder:
            source = Path(folder) / "digest.cpp"
            source.write_text(text)
            _run([*common, "-c", str(source)], out)
    return out


def _run(command: Sequence[str], out: Path) -> None:
    """Run a compiler that writes `out`, which appears whole or not at all. Raises BuildError."""
    with _writing(out.parent):
        handle, name = tempfile.mkstemp(dir=out.parent, suffix=out.suffix)
        os.close(handle)
    try:
        done = _ran([*command, "-o", name])
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            killed = done.returncode < 0 or shutil.disk_usage(out.parent).free == 0
            kind = BuildError if killed else CompilerError
            why = " | ".join(said[:SHOWN_LINES]) or f"exit code {done.returncode}"
            raise kind(f"{command[0]} cannot compile the CPU kernels: {why}")
        with _writing(out.parent):
            Path(name).chmod(0o755)
            with Path(name).open("rb") as file:
                os.fsync(file.fileno())  # so that after a power cut it is whole or not there
            Path(name).replace(out)
    finally:
        Path(name).unlink(missing_ok=True)


def _ran(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error


@functools.cache
def _version(compiler: tuple[str, ...]) -> bytes:
    return _ran([*compiler, "--version"]).stdout.encode()


def _setting(compiler: Sequence[str]) -> list[bytes]:
    words = [*compiler, *FLAGS, *LINK_FLAGS, sys.platform]
    return [_version(tuple(compiler)), *(word.encode() for word in words)]


def _source_bytes() -> list[bytes]:
    paths = [path for path in sorted(SOURCES.iterdir()) if path.suffix in {".h", ".cpp"}]
    return [part for path in paths for part in (path.name.encode(), path.read_bytes())]


def _digest(parts: Sequence[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:DIGEST_LENGTH]
