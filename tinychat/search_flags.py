"""The flags of `tinychat search`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer

from tinychat.errors import UsageError
from tinychat.flags import AsJson, Plain


@dataclass(frozen=True)
class SearchFlags:
    """Which pictures are looked through, for what, with which model."""

    folder: Annotated[str | None, typer.Argument(metavar="DIR", help="The folder of pictures.")] = None
    words: Annotated[
        list[str], typer.Argument(metavar="[QUERY]", help="What the pictures show; without it DIR is indexed only.")
    ] = field(default_factory=list)
    like: Annotated[
        str | None, typer.Option(metavar="PICTURE", help="Find pictures like this one; with QUERY: like both.")
    ] = None
    top: Annotated[int, typer.Option("--top", "-n", help="Pictures to show.", min=1)] = 10
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A CLIP or SigLIP model: a folder or a hub id.",
            show_default="the embedded one, which knows drawn shapes only",
        ),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="a GPU where there is one")
    ] = None
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32.", show_default="fp32 on a CPU, fp16 on a GPU")
    ] = None
    batch: Annotated[int, typer.Option(help="Pictures computed at once.", min=1, max=1024)] = 16
    recursive: Annotated[bool, typer.Option("--recursive/--no-recursive", help="Look into folders below DIR.")] = True
    index: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where the index is kept.", show_default="in the cache folder")
    ] = None
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Forget the index and look at every picture anew.")] = False
    print0: Annotated[
        bool, typer.Option("--print0", "-0", help="Print paths only, as they are, each ended by NUL: for xargs -0.")
    ] = False
    plain: Plain = False
    json: AsJson = False

    def __post_init__(self) -> None:
        if self.folder is None:
            raise UsageError("a folder is needed", 'write tinychat search DIR "what it shows"')
        if self.print0 and self.json:
            raise UsageError("both --print0 and --json are given", "give one of the two")
        if self.print0 and not self.words and self.like is None:
            raise UsageError("--print0 prints what was found, and nothing is looked for", "add a QUERY or --like")
        if self.words and not self.query:
            raise UsageError(
                "the query is empty", 'write what the pictures show, as in tinychat search DIR "a red car"'
            )

    @property
    def query(self) -> str:
        """The words as one text; "" where there are none."""
        return " ".join(" ".join(self.words).split())
