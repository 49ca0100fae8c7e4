"""One Markdown block as styled text. What rich makes of it is cleaned again: `&#8238;` in an answer is a character."""

from __future__ import annotations

from typing import TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment, Segments
from rich.syntax import Syntax

from tinychat.terminal.clean import clean

_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class _PlainHeading(Heading):
    """A heading at the left, without a box."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _PlainCode(CodeBlock):
    """Code without padding, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True, background_color="default")


class _Answer(Markdown):
    elements = {
        **Markdown.elements,
        "heading_open": _PlainHeading,
        "fence": _PlainCode,
        "code_block": _PlainCode,
    }


def make_console(stream: TextIO) -> Console:
    """A console for a stream that is known to be a terminal."""
    return Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)


def render(console: Console, block: str, width: int) -> str:
    """Markdown -> coloured text that ends a line. Line breaks stay, HTML is text, links tell their address."""
    answer = _Answer("", hyperlinks=False)
    answer.parsed = _PARSER.parse(block)
    for token in answer.parsed:
        for child in token.children or ():
            child.type = "hardbreak" if child.type == "softbreak" else child.type
    segments = console.render(answer, console.options.update(width=width))
    cleaned = [Segment(clean(segment.text), segment.style) for segment in segments if not segment.control]
    with console.capture() as capture:
        console.print(Segments(_without_trailing_space(cleaned)), end="")
    return capture.get().strip("\n") + "\n"


def _without_trailing_space(segments: list[Segment]) -> list[Segment]:
    """The segments without the blanks with which rich fills its lines."""
    kept: list[Segment] = []
    for line in Segment.split_lines(segments):
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        kept += [*line, Segment.line()]
    return kept
