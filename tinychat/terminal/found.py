"""The pictures that a search has found: a table on a terminal, lines of score, tab and path elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO, TextIO

from tinychat.terminal.answers import is_plain
from tinychat.terminal.clean import clean_line, put


def write_paths(hits: Sequence[tuple[float, str]], out: BinaryIO) -> None:
    """Paths as they are, each ended by NUL, the best first."""
    out.write(b"".join(os.fsencode(path) + b"\0" for _, path in hits))
    out.flush()


def draw_found(hits: Sequence[tuple[float, str]], out: TextIO, plain: bool = False) -> None:
    """Scores and paths, the best first; the paths are cleaned of what a terminal would obey."""
    lines = [(f"{score:.3f}", clean_line(path)) for score, path in hits]
    if is_plain(out, plain):
        put(out, "".join(f"{score}\t{path}\n" for score, path in lines))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("score", justify="right")
    table.add_column("picture", overflow="fold")
    for score, path in lines:
        table.add_row(score, Text(path))
    Console(file=out).print(table)
