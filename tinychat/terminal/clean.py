"""What may reach a terminal: printable text, line breaks and tabs, nothing that moves it, colours it or reorders it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TextIO

_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f"
_BIDI = "\u202a-\u202e\u2066-\u2069"
_DROPPED = re.compile(f"[{_CONTROLS}{_BIDI}]")
_LINE_ENDS = re.compile("[\u2028\u2029]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """The text without C0, C1, DEL and bidi overrides; line breaks and tabs stay.

    Each character is judged alone, so clean(a + b) == clean(a) + clean(b), whatever the tokens split.
    """
    text = _LINE_ENDS.sub("\n", _DROPPED.sub("", text))
    return _SURROGATES.sub("\ufffd", text)


def clean_line(text: str) -> str:
    """The text as one line: for names and paths, where even a line break would forge a message of ours."""
    return " ".join(clean(text).split())


def shown_name(path: str | Path) -> str:
    """The last part of a path, fit to be printed."""
    return clean_line(Path(path).name) or "picture"


def put(stream: TextIO, text: str) -> None:
    """Write and flush; what the stream's encoding cannot hold becomes a question mark."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()
