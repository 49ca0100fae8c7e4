"""One registry of ops: a backend says whether it can run here and why not; falling back is visible, never silent."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tinychat_kernels.errors import KernelError

ORDER = ("ref",)  # from the fastest to the plainest
OPS = ("w4_linear", "w8a8_linear")


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend's state on this machine; `reason` says why it is off, or what it runs on."""

    name: str
    available: bool
    reason: str


def backends() -> list[Backend]:
    """Every known backend, in the order of preference."""
    return [Backend("ref", True, "plain torch, on any device")]


def pick(op: str, backend: str | None = None) -> Callable[..., Any]:
    """The function of an op: from the backend asked for, from TINYCHAT_BACKEND, or the first that has it."""
    asked = backend or os.environ.get("TINYCHAT_BACKEND") or None
    if asked is not None and asked not in ORDER:
        raise KernelError(f"there is no backend {asked!r}; known are {', '.join(ORDER)}: see `tinychat doctor`")
    for name in ([asked] if asked else ORDER) if op in OPS else ():
        if (function := getattr(_module(name), op, None)) is not None:
            return function
    raise KernelError(f"no backend has an op {op!r}: see `tinychat doctor`")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tinychat_kernels.{name}")
