"""Signatures as the documents write them."""

from __future__ import annotations

import inspect
from typing import Any


def bare(function: Any) -> str:
    """A signature without self and annotations."""
    given = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for name, p in given.parameters.items() if name != "self"]
    return str(given.replace(parameters=plain, return_annotation=given.empty))
