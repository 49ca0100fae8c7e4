"""One registry of ops: a backend says whether it can run here and why not; falling back is visible, never silent."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tinychat_kernels.errors import KernelError, SettingError

ORDER = ("cuda", "autoawq", "cpu", "ref")  # from the fastest to the plainest
SERVES = {"cuda": ("cuda", "autoawq", "ref"), "cpu": ("cpu", "ref")}  # a kind of device -> its backends, in order
PLAINEST = ("ref",)
OPS = ("w4_linear", "w8a8_linear", "linear")


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend's state on this machine; `reason` says why it is off, or what it runs on."""

    name: str
    available: bool
    reason: str


def backends() -> list[Backend]:
    """Every known backend, in the order of preference. The first call may compile kernels."""
    return [_described(name) for name in ORDER]


def _described(name: str) -> Backend:
    try:
        return Backend(name, *_state(name))
    except SettingError as error:
        return Backend(name, False, str(error))


def asked() -> str | None:
    """What TINYCHAT_BACKEND says. Raises SettingError where it names no backend."""
    name = os.environ.get("TINYCHAT_BACKEND") or None
    if name is not None and name not in ORDER:
        raise SettingError(
            f"there is no backend {name!r}; known are {', '.join(ORDER)}: see `tinychat doctor`", "TINYCHAT_BACKEND"
        )
    return name


def chosen(device: str = "cpu") -> Backend:
    """The backend for a model on a kind of device: the one that TINYCHAT_BACKEND asks for, or the first that runs.

    Raises KernelError where the one asked for does not run, or not there; SettingError for a wrong variable.
    """
    name, serving = asked(), SERVES.get(device, PLAINEST)
    if name is not None and name not in serving:
        kinds = " and ".join(kind for kind, names in SERVES.items() if name in names)
        raise KernelError(f"the backend {name} runs on {kinds}, the model is on {device}: see `tinychat doctor`")
    if name is None:
        return next(state for known in serving if (state := Backend(known, *_state(known))).available)
    found = Backend(name, *_state(name))
    if not found.available:
        raise KernelError(f"the backend {name} is off: {found.reason}: see `tinychat doctor`")
    return found


def why_not(backend: str) -> str | None:
    """Why a backend is not taken where it serves: it is off, or TINYCHAT_BACKEND asks for another; None: it is."""
    name = asked()
    if name is not None:
        return None if name == backend else f"TINYCHAT_BACKEND asks for {name}"
    state = Backend(backend, *_state(backend))
    return None if state.available else f"{backend} is off: {state.reason}"


def fallback(device: str = "cpu") -> str | None:
    """Why models on a kind of device run on ref that has faster backends; None where they do not, or ref was asked for.

    Raises SettingError for a wrong variable.
    """
    if asked() is not None:
        return None
    reasons = [why_not(name) for name in SERVES.get(device, PLAINEST)[:-1]]
    return None if None in reasons else "; ".join(filter(None, reasons)) or None


def pick(op: str, backend: str | None = None, device: str = "cpu") -> Callable[..., Any]:
    """The function of an op: of the backend named, or of the first on this kind of device that has it and runs.

    TINYCHAT_BACKEND may ask for one. Weights are packed for one backend: a layer names the one that its own are for.
    """
    wanted = backend or asked()
    names = (wanted,) if wanted else SERVES.get(device, PLAINEST)
    for name in names if op in OPS else ():
        running = wanted is not None or _state(name)[0]
        if running and (function := getattr(_module(name), op, None)) is not None:
            return function
    raise KernelError(f"no backend has an op {op!r}: see `tinychat doctor`")


def _state(name: str) -> tuple[bool, str]:
    """Whether a backend runs here, and on what or why not."""
    return (True, "plain torch, on any device") if name == "ref" else _module(name).available()


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tinychat_kernels.{name}")
