"""One registry of ops: a backend says whether it can run here and why not; falling back is visible, never silent."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tinychat_kernels.errors import KernelError

ORDER = ("cpu", "ref")  # from the fastest to the plainest
OPS = ("w4_linear", "w8a8_linear", "linear")


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend's state on this machine; `reason` says why it is off, or what it runs on."""

    name: str
    available: bool
    reason: str


def backends() -> list[Backend]:
    """Every known backend, in the order of preference. The first call may compile kernels."""
    return [Backend(name, *_state(name)) for name in ORDER]


def asked() -> str | None:
    """What TINYCHAT_BACKEND says. Raises KernelError where it names no backend."""
    name = os.environ.get("TINYCHAT_BACKEND") or None
    if name is not None and name not in ORDER:
        raise KernelError(f"there is no backend {name!r}; known are {', '.join(ORDER)}: see `tinychat doctor`")
    return name


def chosen() -> Backend:
    """The backend for a model on this machine's CPU: the one that TINYCHAT_BACKEND asks for, or the first that runs.

    Raises KernelError where the one asked for does not run.
    """
    name = asked()
    found = next(backend for backend in backends() if (name in (None, backend.name)) and (name or backend.available))
    if not found.available:
        raise KernelError(f"the backend {found.name} is off: {found.reason}: see `tinychat doctor`")
    return found


def pick(op: str, backend: str | None = None) -> Callable[..., Any]:
    """The function of an op: of the backend named, of the one TINYCHAT_BACKEND asks for, or of the first that runs.

    Weights are packed for one backend: a layer names the one that its own are for.
    """
    wanted = backend or asked()
    names = [wanted] if wanted else [state.name for state in backends() if state.available]
    for name in names if op in OPS else ():
        if (function := getattr(_module(name), op, None)) is not None:
            return function
    raise KernelError(f"no backend has an op {op!r}: see `tinychat doctor`")


def _state(name: str) -> tuple[bool, str]:
    """Whether a backend runs here, and on what or why not."""
    return (True, "plain torch, on any device") if name == "ref" else _module(name).available()


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tinychat_kernels.{name}")
