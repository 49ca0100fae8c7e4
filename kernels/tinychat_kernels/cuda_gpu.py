"""A GPU that launches kernels: on torch's current stream, from machine code made for it at first use."""

from __future__ import annotations

import functools
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from tinychat_kernels import cuda_build
from tinychat_kernels.cpu import cache_folder
from tinychat_kernels.cuda_build import Target
from tinychat_kernels.cuda_compilers import Compiler, find_compiler
from tinychat_kernels.cuda_driver import FREE_SHARED, driver, word
from tinychat_kernels.cuda_linear import defines
from tinychat_kernels.cuda_ops import Argument, Grid
from tinychat_kernels.errors import BuildError, KernelError


class Gpu:
    """The launcher of one device: `gpu(unit, entry, grid, block, shared, *arguments)`, as cuda_ops.Launch has it.

    A launch reads nothing back and may be captured in a CUDA graph, once the same entry has run outside of one.
    """

    def __init__(self, index: int, target: Target, compiler: Compiler | BuildError) -> None:
        self.index = index
        self.target = target
        self.compiler = compiler
        self._modules: dict[tuple[str, tuple[str, ...]], int] = {}
        self._functions: dict[str, int] = {}
        self._shared: dict[int, int] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def processors(self) -> int:
        """Streaming multiprocessors."""
        return torch.cuda.get_device_properties(self.index).multi_processor_count

    @property
    def made_by(self) -> str:
        """What compiles, or that nothing does."""
        return "cached machine code" if isinstance(self.compiler, BuildError) else self.compiler.name

    def __call__(
        self, unit: str, entry: str, grid: Grid, block: int | tuple[int, ...], shared: int, *args: Argument
    ) -> None:
        wrong = next((a for a in args if isinstance(a, torch.Tensor) and a.get_device() != self.index), None)
        if wrong is not None:
            raise KernelError(f"{entry} runs on cuda:{self.index}, a tensor of it is on {wrong.device}")
        stream = torch.cuda.current_stream(self.index).cuda_stream
        threads = (block,) if isinstance(block, int) else block
        with driver().on(self.index):
            function = self._function(unit, entry, shared)
            driver().launch(
                function, grid, (*threads, *(1,) * (3 - len(threads))), shared, stream, [word(a) for a in args]
            )

    def load(self, unit: str) -> int:
        """The module of a whole unit, compiled if need be. Raises BuildError, KernelError."""
        with self._lock, driver().on(self.index):
            return self._module(unit, ())

    def _function(self, unit: str, entry: str, shared: int) -> int:
        function = self._functions.get(entry)
        if function is None:
            with self._lock:
                function = self._functions[entry] = driver().function(self._module(unit, defines(entry)), entry)
        if shared > self._shared.get(function, FREE_SHARED):
            driver().raise_shared(function, shared)
            self._shared[function] = shared
        return function

    def _module(self, unit: str, limits: tuple[str, ...]) -> int:
        """Of the entries that these defines limit a unit to: a model needs few of them."""
        if (unit, limits) not in self._modules:
            target = replace(self.target, defines=(*self.target.defines, *limits))
            self._modules[unit, limits] = self._loaded(unit, target)
        return self._modules[unit, limits]

    def _loaded(self, unit: str, target: Target) -> int:
        """A module; machine code of the cache that does not load is made once more."""
        folder = cache_folder()
        try:
            return driver().load(cuda_build.cubin(unit, target, folder, self.compiler))
        except BuildError:
            raise
        except KernelError:
            if not cuda_build.forget(unit, target, folder):
                raise
        return driver().load(cuda_build.cubin(unit, target, folder, self.compiler))


@functools.cache
def gpu(index: int) -> Gpu:
    """The launcher of torch's CUDA device of this number. Raises KernelError where the kernels cannot run on it."""
    if reason := why_none():
        raise KernelError(reason)
    arch = cuda_build.arch_of(torch.cuda.get_device_capability(index))
    newest, like = driver().version[0], int((torch.version.cuda or "0").partition(".")[0])
    try:
        compiler: Compiler | BuildError = find_compiler(newest, like, arch)
    except BuildError as error:
        compiler = error
    return Gpu(index, Target(arch), compiler)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a model's GPU torch's current one for a while; nothing where it is none, or torch finds no GPU."""
    found = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if found else nullcontext()


def why_none() -> str | None:
    """Why there is no CUDA device to launch on; None where torch finds one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return f"torch finds no CUDA device; it is built for CUDA {torch.version.cuda}"
    return None
