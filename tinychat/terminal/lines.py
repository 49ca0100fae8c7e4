"""From typed lines to a question: when more lines are to come, and what of them is only notation."""

from __future__ import annotations

import re

_BLOCK = '"""'
_CONTINUATION = re.compile(r"(?<!\\)((?:\\\\)*)\\\n")


def is_open(text: str) -> bool:
    """Whether the text goes on: it ends in a lone backslash, or its block of three quotes is not closed."""
    if is_block_start(text):
        return not text.rstrip().endswith(_BLOCK) or len(text.strip()) < 2 * len(_BLOCK)
    backslashes = len(text) - len(text.rstrip("\\"))
    return backslashes % 2 == 1


def is_block_start(text: str) -> bool:
    """Whether the text begins a block of three quotes, in which nothing is a command or a path."""
    return text.lstrip().startswith(_BLOCK)


def unwrap(text: str) -> str:
    """The words without the notation: quotes of a block, backslashes before line breaks."""
    if is_block_start(text):
        return text.strip().removeprefix(_BLOCK).removesuffix(_BLOCK).strip("\n")
    return _CONTINUATION.sub(r"\1\n", text)
