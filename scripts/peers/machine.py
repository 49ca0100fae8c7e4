"""The machine itself as a program: `read` gives bytes a second from memory, `int8` operations a second.

A small C++ library, compiled for this very CPU when it is opened. Both are what a kernel could reach at best.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from peers.protocol import Facts, Setup, serve

SOURCE = Path(__file__).with_suffix(".cpp")
BUFFER = 2**30
TURNS = 30_000_000  # about 0.1 s


class Machine:
    """A buffer larger than any cache."""

    def __init__(self, setup: Setup) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise RuntimeError("no C++ compiler was found")
        library = Path(setup.folder) / "machine.so"
        native = "-mcpu=native" if os.uname().machine == "aarch64" else "-march=native"
        options = ["-O3", native, "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(library)], check=True, stdout=subprocess.DEVNULL)
        self.lib = ctypes.CDLL(str(library))
        self.lib.make_buffer.restype = ctypes.c_void_p
        self.lib.make_buffer.argtypes = [ctypes.c_size_t]
        self.lib.read_seconds.restype = ctypes.c_double
        self.lib.read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.lib.int8_per_second.restype = ctypes.c_double
        self.lib.int8_per_second.argtypes = [ctypes.c_int, ctypes.c_long]
        self.threads = setup.threads
        self.buffer = self.lib.make_buffer(BUFFER)
        if not self.buffer:
            raise RuntimeError(f"{BUFFER} bytes could not be taken")

    def facts(self) -> Facts:
        return Facts("read 1 GiB; vpdpbusd, sdot or vpmaddubsw in registers", None, ("read", "int8"))

    def run(self, kind: str, tokens: int, depth: int) -> float:
        """Seconds for `tokens` bytes or operations."""
        if kind == "read":
            best = min(self.lib.read_seconds(self.buffer, BUFFER, self.threads) for _ in range(3))
            return tokens * best / BUFFER
        speed = self.lib.int8_per_second(self.threads, TURNS)
        if not speed:
            raise RuntimeError("there is no int8 test for this CPU")
        return tokens / speed


if __name__ == "__main__":
    serve(Machine)
