"""The keys that tinychat/docs/json.md promises, and those that an object has."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import tinychat

DOCUMENT = Path(tinychat.__file__).parent / "docs/json.md"


def promised(title: str) -> dict[str, str]:
    """Key -> type of the table under that title."""
    section = DOCUMENT.read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {row[0]: row[1] for row in rows[2:]}


def flat(found: dict[str, Any], leaves: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by the keys of the document: `usage.prompt_tokens` for what lies in an object."""
    for key, value in found.items():
        if isinstance(value, dict) and prefix + key not in leaves:
            yield from flat(value, leaves, f"{prefix}{key}.")
        else:
            yield prefix + key, value


FITS = {
    "string": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) is float,
    "bool": lambda value: type(value) is bool,
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
    "spread": lambda value: list(value) == ["median", "min", "max"] and value["min"] <= value["median"] <= value["max"],
    "[int]": lambda value: all(type(item) is int for item in value),
    "[string]": lambda value: all(isinstance(item, str) for item in value),
    "[object]": lambda value: all(isinstance(item, dict) for item in value),
}


def check(found: dict[str, Any], *titles: str) -> None:
    """The object has the keys of these tables, no others, and values of their types."""
    types = {key: kind for title in titles for key, kind in promised(title).items()}
    values = dict(flat(found, types))
    assert sorted(values) == sorted(types)
    wrong = [key for key, value in values.items() if not any(FITS[kind](value) for kind in types[key].split(" or "))]
    assert not wrong
