"""Compiling the kernels: what is compiled again and what not, and the sentences where it cannot be done."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tinychat_kernels import build, cpu
from tinychat_kernels.errors import BuildError

KERNEL = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer(void) { return ANSWER; }\n'
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small sources in place of the kernels."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cpp").write_text(KERNEL)
    (folder / "other.cpp").write_text("int other() { return 0; }\n")
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.delenv("CXX", raising=False)
    return folder


def answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


@needs_compiler
def test_a_changed_source_is_compiled_again_and_nothing_else(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = build.built(cache)
    assert answer(first) == 42 and build.digest_of(first) == build.source_digest()
    objects = {path: path.stat().st_mtime_ns for path in cache.glob("other-*.o")}
    assert build.built(cache) == first
    (sources / "answer.cpp").write_text(KERNEL.replace("ANSWER", "ANSWER + 1"))
    second = build.built(cache)
    assert second != first and answer(second) == 43
    assert {path: path.stat().st_mtime_ns for path in cache.glob("other-*.o")} == objects
    (sources / "answer.h").write_text("#define ANSWER 7\n")
    assert answer(build.built(cache)) == 8
    assert len(list(cache.glob("other-*.o"))) == 2
    assert not list(cache.glob("tmp*"))


@needs_compiler
def test_what_is_a_month_old_goes_when_something_new_is_compiled(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old = build.built(cache)
    foreign, cut_off = cache / "notes.txt", cache / "tmpabc.so"
    for path in (foreign, cut_off):
        path.write_text("")
    for path in cache.iterdir():
        month_ago = time.time() - build.KEPT_SECONDS - 60
        os.utime(path, (month_ago, month_ago))
    assert build.built(cache) == old and cut_off.exists()
    (sources / "answer.h").write_text("#define ANSWER 43\n")
    new = build.built(cache)
    assert answer(new) == 43 and foreign.exists()
    left = sorted(path.name.partition("-")[0] for path in cache.iterdir())
    assert left == ["answer", "cpu", "digest", "notes.txt", "other"]


@needs_compiler
def test_a_library_of_other_sources_is_not_taken(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    assert build.installed() is None
    beside = tmp_path / build.LIBRARY
    build.compile_library(beside, build.find_compiler(), tmp_path / "objects")
    assert build.installed() == beside
    (sources / "answer.h").write_text("#define ANSWER 43\n")
    assert build.installed() is None
    beside.unlink()
    beside.write_bytes(b"no library")
    assert build.installed() is None


@needs_compiler
def test_several_may_compile_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.built(tmp_path / "cache"), range(4)))
    assert [answer(path) for path in paths] == [42]


def test_no_compiler_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found \(c\+\+, g\+\+, clang\+\+\)"):
        build.built(tmp_path / "cache")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler does not run: "):
        build.built(tmp_path / "cache")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler.py"
    script.write_text("import sys\nsys.exit('' if '--version' in sys.argv else 'x.cpp:1: error: not today')\n")
    monkeypatch.setenv("CXX", f"{sys.executable} {script}")
    with pytest.raises(BuildError, match=r"cannot compile the CPU kernels: x.cpp:1: error: not today$"):
        build.built(tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [build.FAILED]


@needs_compiler
def test_an_error_in_a_source_is_quoted(sources: Path, tmp_path: Path) -> None:
    (sources / "answer.cpp").write_text("int broken( { }\n")
    with pytest.raises(BuildError, match=r"cannot compile the CPU kernels: .*answer.cpp:1:.* error: "):
        build.built(tmp_path / "cache")


def test_a_backend_without_a_library_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "installed", lambda: None)
    cpu._tried.cache_clear()
    try:
        assert cpu.available() == (False, "no C++ compiler was found (c++, g++, clang++)")
    finally:
        cpu._tried.cache_clear()


@needs_compiler
def test_where_there_is_a_compiler_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ran, reason = cpu.available()
    assert ran, reason


# Folders and files that do not work


@needs_compiler
@pytest.mark.parametrize("folder", ["/dev/null/kernels", "/proc/kernels"])
def test_a_folder_that_cannot_be_written_is_a_sentence(folder: str) -> None:
    with pytest.raises(BuildError, match=rf"^{folder} cannot be used: .*; TINYCHAT_CACHE may name another folder$"):
        build.load(Path(folder))
    build.waits_for_compiler(Path(folder))


def test_a_process_tries_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []

    def load(folder: Path) -> tuple[Path, ctypes.CDLL]:
        tried.append(folder)
        raise BuildError("not today")

    monkeypatch.setattr(build, "load", load)
    cpu._tried.cache_clear()
    try:
        assert cpu.available() == cpu.available() == (False, "not today")
    finally:
        cpu._tried.cache_clear()
    assert len(tried) == 1


@needs_compiler
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_library_that_is_cut_off_is_compiled_anew(tmp_path: Path, size: int) -> None:
    path = build.built(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    found, loaded = build.load(tmp_path)
    assert found == path and loaded.answer() == 42


@needs_compiler
def test_what_a_compiler_cannot_compile_is_remembered_for_a_day(sources: Path, tmp_path: Path) -> None:
    (sources / "answer.cpp").write_text("int broken( { }\n")
    with pytest.raises(BuildError, match=r"answer.cpp:1:"):
        build.built(tmp_path)
    for made in tmp_path.glob("*.o"):
        made.unlink()
    assert not build.waits_for_compiler(tmp_path)
    sentence = r"answer.cpp:1:.*\(earlier today; `tinychat doctor --cache --clear` forgets it\)$"
    with pytest.raises(BuildError, match=sentence):
        build.built(tmp_path)
    assert not list(tmp_path.glob("*.o"))  # nothing was tried
    mark = next(tmp_path.glob("*.failed"))
    yesterday = time.time() - build.FAILED_SECONDS - 60
    os.utime(mark, (yesterday, yesterday))
    with pytest.raises(BuildError, match=r"answer.cpp:1:[^(]*$"):
        build.built(tmp_path)
    (sources / "answer.cpp").write_text(KERNEL)
    assert answer(build.built(tmp_path)) == 42


def test_a_compiler_that_was_killed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler.py"
    script.write_text("import os, sys\nif '--version' not in sys.argv:\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("CXX", f"{sys.executable} {script}")
    with pytest.raises(BuildError, match="cannot compile the CPU kernels: exit code -9$"):
        build.built(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
