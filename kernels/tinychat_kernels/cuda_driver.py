"""The CUDA driver through its C interface: cubins become modules, and entries of theirs are launched.

A GPU's primary context is used, which is torch's. Nothing here waits for the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Iterator, Sequence

from torch import Tensor

from tinychat_kernels.errors import KernelError

LIBRARY = "libcuda.so.1"
SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
FREE_SHARED = 48 * 1024  # bytes a block that need not be asked for
FUNCTIONS = (
    "cuInit", "cuDriverGetVersion", "cuGetErrorString", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent",
    "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute",
    "cuLaunchKernel",
)  # fmt: skip


class Driver:
    """The driver's functions; every one of them raises KernelError with its reason."""

    def __init__(self, path: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise KernelError(f"the CUDA driver does not load: {error}") from error
        if missing := [name for name in FUNCTIONS if not hasattr(self._library, name)]:
            raise KernelError(f"the CUDA driver {path} has no {missing[0]}")
        self._do("cuInit", ctypes.c_uint(0))

    @functools.cached_property
    def version(self) -> tuple[int, int]:
        """The CUDA version that the driver runs."""
        number = ctypes.c_int()
        self._do("cuDriverGetVersion", ctypes.byref(number))
        return number.value // 1000, number.value % 1000 // 10

    @functools.cache  # noqa: B019  # a driver lives as long as the process
    def context(self, device: int) -> int:
        """The primary context of a device, which stays."""
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        self._do("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        return context.value or 0

    @contextlib.contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Make a device's context this thread's for a while."""
        wanted, current = self.context(device), ctypes.c_void_p()
        self._do("cuCtxGetCurrent", ctypes.byref(current))
        if current.value == wanted:
            yield
            return
        self._do("cuCtxPushCurrent_v2", ctypes.c_void_p(wanted))
        try:
            yield
        finally:
            self._do("cuCtxPopCurrent_v2", ctypes.byref(current))

    def load(self, cubin: bytes) -> int:
        """A module in the current context."""
        module = ctypes.c_void_p()
        self._do("cuModuleLoadData", ctypes.byref(module), cubin)
        return module.value or 0

    def function(self, module: int, name: str) -> int:
        """An entry of a module, whose blocks may have as much shared memory as `raise_shared` says."""
        function = ctypes.c_void_p()
        self._do("cuModuleGetFunction", ctypes.byref(function), ctypes.c_void_p(module), name.encode(), said=name)
        return function.value or 0

    def raise_shared(self, function: int, size: int) -> None:
        """Let blocks have so many bytes of dynamic shared memory: above 48 KiB that has to be asked for."""
        self._do("cuFuncSetAttribute", ctypes.c_void_p(function), ctypes.c_int(SHARED_ATTRIBUTE), ctypes.c_int(size))

    def launch(
        self, function: int, grid: Sequence[int], block: Sequence[int], shared: int, stream: int, words: Sequence[int]
    ) -> None:
        """Put a launch on a stream; words are the arguments' bits, as `word` gives them."""
        count = len(words)
        values = (ctypes.c_uint64 * count)(*words)
        first = ctypes.addressof(values)
        places = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))  # the driver reads what a type has
        self._do(
            "cuLaunchKernel", ctypes.c_void_p(function), *map(ctypes.c_uint, grid), *map(ctypes.c_uint, block),
            ctypes.c_uint(shared), ctypes.c_void_p(stream), places, None,
        )  # fmt: skip

    def _do(self, name: str, *arguments: object, said: str = "") -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(ctypes.c_int(result), ctypes.byref(text))
            reason = (text.value or b"no text").decode()
            raise KernelError(f"{name} {said + ' ' if said else ''}failed: {reason} (CUDA error {result})")


@functools.cache
def driver() -> Driver:
    """The driver of this machine. Raises KernelError where there is none."""
    return Driver()


def word(argument: Tensor | int | float | None) -> int:
    """The bits of an argument: an address, a C int, a C float. Raises KernelError for an int of more than 32 bits."""
    if argument is None:
        return 0
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    if not -(2**31) <= argument < 2**31:
        raise KernelError(f"the argument {argument} of a kernel is no 32-bit int")
    return argument & 0xFFFFFFFF
