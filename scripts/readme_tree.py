"""Rewrites the tree of files in README.md; every comment in it is the first line of the file itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- tree: written by scripts/check --fix -->", "<!-- end of tree -->"
FOLDERS = ("tinychat", "awq", "kernels", "scripts", "tests")
CLOSED = {  # shown as one line: what is below mirrors something else, or is data
    "tests": "mirror the source",
    "tinychat/assets": "the embedded models and their sample pictures",
    "kernels/tinychat_kernels/csrc/cpu": "the CPU kernels in C++17: a plain C interface, instruction sets at run time",
    "kernels/tinychat_kernels/csrc/cuda": "the CUDA kernels: raw pointers, no torch header, PTX in device.cuh alone",
    "kernels/emu": "runs the CUDA kernels on a CPU, for tests; never shipped",
}
WIDTH, LONGEST = 26, 110


def ignored(path: Path) -> bool:
    return any(name.startswith((".", "__pycache__")) or name.endswith((".egg-info", ".so")) for name in path.parts)


def files(root: Path) -> list[Path]:
    """Paths of the source files, relative to the root, sorted."""
    paths = (path.relative_to(root) for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
    return sorted(path for path in paths if not ignored(path))


def summary(path: Path) -> str:
    """The first line that says what a file is for; empty where it does not say it."""
    if path.suffix in {".json", ".png", ".safetensors", ".typed"}:
        return ""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    skipped = "#" if path.suffix == ".md" else "#!"
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith(skipped))
    return re.sub(r"^(#+|//|/\*+)\s*", "", next(lines, "")).strip().removesuffix(".")


def children(paths: list[Path], folder: Path) -> list[Path]:
    """What lies directly in a folder: its files first, then its sub-folders."""
    depth = len(folder.parts)
    below = {Path(*path.parts[: depth + 1]) for path in paths if path.parts[:depth] == folder.parts}
    return sorted(below, key=lambda path: (path not in paths, path))


def shortened(comment: str, room: int) -> str:
    """The first sentence; of a longer one the clauses that fit."""
    sentence = comment.partition(". ")[0]
    if len(sentence) <= room:
        return sentence
    ends = [match.start() for match in re.finditer(r"[:;,] ", sentence[:room])] or [room]
    return sentence[: ends[-1]]


def row(name: str, depth: int, comment: str) -> str:
    left = f"{'  ' * depth}{name}"
    return f"{left:<{WIDTH}} {shortened(comment, LONGEST - WIDTH)}" if comment else left


def rows(root: Path, paths: list[Path], folder: Path) -> Iterator[str]:
    depth = len(folder.parts) - 1
    init = folder / "__init__.py"
    comment = CLOSED.get(folder.as_posix()) or (summary(root / init) if init in paths else "")
    yield row(f"{folder.name}/", depth, comment)
    if folder.as_posix() in CLOSED:
        return
    for path in children(paths, folder):
        if path not in paths:
            yield from rows(root, paths, path)
        elif path.name not in {"__init__.py", "py.typed"}:
            yield row(path.name, depth + 1, summary(root / path))


def tree(root: Path) -> str:
    paths = files(root)
    present = [Path(folder) for folder in FOLDERS if any(path.parts[0] == folder for path in paths)]
    return "\n".join(line for folder in present for line in rows(root, paths, folder))


def with_tree(readme: str, drawn: str) -> str:
    """The README with its tree replaced. Raises ValueError where the marks are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n```\n{drawn}\n```\n{END}{after}"


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(with_tree(path.read_text("utf-8"), tree(ROOT)), "utf-8")


if __name__ == "__main__":
    main()
