"""Drawing the events of one answer: progress until the first word, the words as they come, statistics at the end."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TextIO

from tinychat.core import Event, Failed, Finished, Progress, Started, Token
from tinychat.terminal.clean import clean_line, put
from tinychat.terminal.painting import MarkdownPainter, Painter, PlainPainter, WholePainter
from tinychat.terminal.progress import Indicator, make_indicator


def print_answer(
    events: Iterable[Event], *, out: TextIO, err: TextIO, plain: bool = False, stream: bool = True
) -> Finished | Failed:
    """Print an answer: words to `out` as they come or (not `stream`) at once, progress and failure to `err`."""
    painter = make_painter(out, plain=plain)
    end = draw(events, painter if stream else WholePainter(painter), make_indicator(err, is_plain(err, plain)))
    if isinstance(end, Failed):
        put(err, f"error: {sentence(end)}\n")
    return end


def draw(events: Iterable[Event], painter: Painter, indicator: Indicator) -> Finished | Failed:
    """Draw all events and return the last; painter and indicator are left in order whatever happens."""
    end: Finished | Failed | None = None
    reading: Progress | None = None
    try:
        for event in events:
            if isinstance(event, Started):
                reading = Progress(event.request_id, "prefill", event.cached_tokens, event.prompt_tokens)
            elif isinstance(event, Finished | Failed):
                end = event
            _draw_event(event, reading, painter, indicator)
    finally:
        indicator.stop()
        painter.end()
    if end is None:
        raise RuntimeError("an answer ended without Finished or Failed")
    return end


def _draw_event(event: Event, reading: Progress | None, painter: Painter, indicator: Indicator) -> None:
    """`reading` is what begins with Started and, where there are pictures, again when the last one was seen."""
    if isinstance(event, Started) or (isinstance(event, Progress) and _is_last_picture(event)):
        event = reading or event
    if isinstance(event, Progress):
        indicator.show(event)
    elif isinstance(event, Token | Finished):
        text = event.text if isinstance(event, Token) else event.tail
        if text:
            indicator.stop()
            painter.feed(text)


def _is_last_picture(progress: Progress) -> bool:
    return progress.stage == "vision" and progress.done == progress.total


def make_painter(stream: TextIO, *, plain: bool) -> Painter:
    """Markdown on a terminal that can draw, the raw text elsewhere."""
    return PlainPainter(stream) if is_plain(stream, plain) else MarkdownPainter(stream)


def is_plain(stream: TextIO, plain: bool = False) -> bool:
    """Whether to draw nothing on the stream: asked for, NO_COLOR, a dumb terminal, or no terminal."""
    dumb = os.environ.get("TERM", "dumb").lower() in ("", "dumb", "unknown")
    return plain or dumb or bool(os.environ.get("NO_COLOR")) or not stream.isatty()


def sentence(failed: Failed) -> str:
    """A failure in one line: what, and what to do."""
    return clean_line(f"{failed.message}; {failed.remedy}" if failed.remedy else failed.message)


def count(number: int, noun: str) -> str:
    """A number of things: `1 token`, `1,234 tokens`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def stats_line(finished: Finished, context: int) -> str:
    """Tokens, tokens a second, the parts of the time to the first token, and how full the context is."""
    usage, timings = finished.usage, finished.timings
    parts = (("pictures", timings.image_s), ("vision", timings.vision_s), ("prefill", timings.prefill_s))
    split = " + ".join(f"{name} {seconds:.2f}" for name, seconds in parts if seconds)
    used = usage.prompt_tokens + usage.completion_tokens
    return " · ".join(
        (
            f"{count(usage.completion_tokens, 'token')}{_rate(timings.decode_tps)}",
            f"prompt {usage.prompt_tokens:,} (pictures {usage.image_tokens:,}, cached {usage.cached_tokens:,})"
            + _rate(timings.prefill_tps),
            f"first token {timings.ttft_s:.2f} s" + (f" ({split})" if split else ""),
            f"context {used:,} of {context:,}",
        )
    )


def _rate(tokens_a_second: float) -> str:
    return f" at {tokens_a_second:,.1f}/s" if tokens_a_second else ""
