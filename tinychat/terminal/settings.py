"""What /set can change: fields of SamplingParams and StoppingParams by name, with how each is read from a word."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from tinychat.core import StoppingParams
from tinychat.errors import UsageError
from tinychat.session import Session


@dataclass(frozen=True, slots=True)
class Setting:
    """How a value is read, and what `off` stands for where the setting can be off."""

    read: Callable[[str], Any]
    off: tuple[Any, ...] = ()
    kind: str = "a number"


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(word)
    return number


def _number(off: float) -> Setting:
    return Setting(_finite, off=(off,), kind="a number or off")


def _count(off: int | None) -> Setting:
    return Setting(int, off=(off,), kind="a whole number or off")


SETTINGS: dict[str, Setting] = {
    "temperature": Setting(_finite),
    "top_k": _count(0),
    "top_p": _number(1.0),
    "min_p": _number(0.0),
    "typical_p": _number(1.0),
    "repetition_penalty": _number(1.0),
    "frequency_penalty": _number(0.0),
    "presence_penalty": _number(0.0),
    "seed": _count(None),
    "max_new_tokens": _count(None),
    "stop": Setting(lambda word: (word,), off=((),), kind="a text or off"),
}
_STOPPING = frozenset(field.name for field in fields(StoppingParams))


def change(session: Session, name: str, word: str) -> None:
    """Set one of SETTINGS from a word. Raises UsageError that names it, and changes nothing then."""
    value = _read(name, known(name), word)
    if name in _STOPPING:
        session.stopping = replace(session.stopping, **{name: value})
    else:
        session.sampling = replace(session.sampling, **{name: value})


def current(session: Session) -> list[tuple[str, str]]:
    """The settings by name with their present values."""
    return [(name, _shown(_value(session, name))) for name in SETTINGS]


def known(name: str) -> Setting:
    """The setting of that name. Raises UsageError with the nearest one."""
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, 1, 0.5)
        remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(SETTINGS)}"
        raise UsageError(f"there is no setting {name!r}", remedy)
    return SETTINGS[name]


def _read(name: str, setting: Setting, word: str) -> Any:
    if word == "off" and setting.off:
        return setting.off[0]
    try:
        return setting.read(word)
    except ValueError as error:
        raise UsageError(f"{name} cannot be {word!r}", f"give {setting.kind}") from error


def _value(session: Session, name: str) -> Any:
    return getattr(session.stopping if name in _STOPPING else session.sampling, name)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "off"
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
