"""The runtime: text and pictures -> tokens -> text. Public names are imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinychat.core import (
        Event,
        Failed,
        Finished,
        Image,
        Message,
        Progress,
        Request,
        SamplingParams,
        Started,
        StoppingParams,
        Text,
        Timings,
        Token,
        Usage,
    )
    from tinychat.engine.engine import Engine
    from tinychat.errors import CapacityError, FormatError, MediaError, ModelError, TinychatError, UsageError
    from tinychat.load import load_model
    from tinychat.models.vila_llama import VilaLlamaForCausalLM
    from tinychat.session import Session

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "FormatError",
    "Image",
    "MediaError",
    "Message",
    "ModelError",
    "Progress",
    "Request",
    "SamplingParams",
    "Session",
    "Started",
    "StoppingParams",
    "Text",
    "Timings",
    "TinychatError",
    "Token",
    "Usage",
    "UsageError",
    "VilaLlamaForCausalLM",
    "load_model",
]

_HOMES = {
    "Engine": "tinychat.engine.engine",
    "Session": "tinychat.session",
    "VilaLlamaForCausalLM": "tinychat.models.vila_llama",
    "load_model": "tinychat.load",
}


def _home(name: str) -> str:
    return _HOMES.get(name, "tinychat.errors" if name.endswith("Error") else "tinychat.core")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'tinychat' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_home(name)), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
