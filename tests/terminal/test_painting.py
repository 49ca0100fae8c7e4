from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal.emulator import Emulator

from tinychat.terminal import markdown
from tinychat.terminal.painting import Area, MarkdownPainter, PlainPainter, WholePainter

ANSWER = """\
# What I see

A *red* circle and a **blue** square.
A second line with <image> in it.

- one
- two

  more of two
- three

1. do:
```python
def f(x):
    return x + 1
```
| a | b |
|---|---|
| 1 | 2 |

The [end](http://x.example).
"""

DRAWN = [
    "What I see",
    "",
    "A red circle and a blue square.",
    "A second line with <image> in it.",
    "",
    " • one",
    " • two",
    "   more of two",
    " • three",
    "",
    " 1 do:",
    "",
    "def f(x):",
    "    return x + 1",
    "",
    " a  b",
    " ────",
    " 1  2",
    "",
    "The end (http://x.example).",
]


def paint(text: str, step: int, terminal: Emulator | None = None) -> Emulator:
    terminal = terminal or Emulator()
    painter = MarkdownPainter(terminal, terminal.size)
    for start in range(0, len(text), step):
        painter.feed(text[start : start + step])
    painter.end()
    return terminal


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_markdown_is_drawn_the_same_however_it_is_split(step: int) -> None:
    assert paint(ANSWER, step).lines() == DRAWN


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_code_longer_than_the_screen_has_every_line_once(step: int) -> None:
    code = [f"line {number}" for number in range(50)]
    text = "\n".join(["Here:", "", "```", *code, "```", "Done."])
    assert paint(text, step).lines() == ["Here:", "", *code, "", "Done."]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_list_longer_than_the_screen_has_every_item_once(step: int) -> None:
    items = [f"{number}. item *{number}*\n   more of it" for number in range(1, 40)]
    drawn = paint("\n".join([*items, "", "Done."]), step).lines()
    assert [line.split()[-1] for line in drawn if "item" in line] == [str(number) for number in range(1, 40)]
    assert sum("more of it" in line for line in drawn) == 39
    assert drawn[-2:] == ["", "Done."]
    assert "*" not in "".join(drawn)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_paragraph_longer_than_the_screen_has_every_word_once(step: int) -> None:
    words = " ".join(f"word{number}" for number in range(300))
    drawn = paint(f"# First\n{words}\n\n*after*", step).lines()
    assert drawn[0] == "First"
    assert drawn[-2:] == ["", "after"]
    assert "".join(drawn[1:-1]).replace(" ", "") == words.replace(" ", "")


def test_wide_characters_are_erased_to_the_last_row() -> None:
    assert paint("日本語の文" * 30 + "\n\nend", 1).lines()[-2:] == ["", "end"]
    assert "".join(paint("日本語の文" * 30, 1).lines()) == "日本語の文" * 30


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a b", "\n", "\n\n", "# h\n", "- i\n", "```\n", "x" * 70, "\t", "日", "*b* "]), max_size=40
    )
)
def test_the_split_never_matters(parts: list[str]) -> None:
    text = "".join(parts)
    small = [paint(text, step, Emulator(40, 200)).lines() for step in (1, 5, 10_000)]
    assert small[0] == small[1] == small[2]


def test_each_block_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    render = markdown.render

    def counting(console, block, width):  # type: ignore[no-untyped-def]
        parsed.append(block)
        return render(console, block, width)

    monkeypatch.setattr(markdown, "render", counting)
    text = "A paragraph of some words.\n\n" * 40
    paint(text, 3)
    assert sum(map(len, parsed)) <= len(text)
    assert len(parsed) == 40


def test_what_is_written_grows_no_faster_than_the_answer() -> None:
    def written(paragraphs: int) -> int:
        return len(paint("some words in a line\n" * 5 + "\n" + "more words\n\n" * paragraphs, 1).getvalue())

    assert written(80) - written(40) == written(120) - written(80)


def test_escapes_in_an_answer_are_not_obeyed() -> None:
    terminal = paint("a\x1b]0;owned\x07b \x1b[2J `\x1b[31mc` &#8238;d &#27;[1m\n\n```\n\x9b2J\x1b[0m\n```\n", 1)
    assert terminal.screen.title == ""
    assert terminal.lines()[0].startswith("a]0;ownedb [2J [31mc d")
    assert "\u202e" not in terminal.getvalue()


def test_a_link_is_shown_by_its_address_and_not_hidden() -> None:
    terminal = paint("[bank](http://evil.example)", 1)
    assert terminal.lines() == ["bank (http://evil.example)"]
    assert "\x1b]8" not in terminal.getvalue()


def test_a_resize_in_the_middle_loses_nothing() -> None:
    terminal = Emulator(60, 14)
    painter = MarkdownPainter(terminal, terminal.size)
    painter.feed("first words of a paragraph ")
    terminal.screen.resize(14, 30)
    painter.feed("and its end\n\n*next*")
    painter.end()
    assert "".join(terminal.lines()).replace(" ", "") == "firstwordsofaparagraphanditsendnext"


def test_nothing_is_drawn_for_nothing() -> None:
    assert paint("", 1).getvalue() == ""
    assert paint("\n\n \n", 1).lines() == []


def test_an_area_breaks_lines_before_the_last_column() -> None:
    area = Area(6, 10)
    assert area.draw("abcdefg") == "abcde\nfg"
    assert area.draw("\th") == "   \n h"
    assert area.erase() == "\r\x1b[2A\x1b[J"
    assert area.erase() == ""


def test_plain_is_the_text_without_controls_and_ends_its_line() -> None:
    out = io.StringIO()
    painter = PlainPainter(out)
    for piece in ("**a**", "\x1b", "[31m", "\n", "b"):
        painter.feed(piece)
    painter.end()
    painter.end()
    assert out.getvalue() == "**a**[31m\nb\n"


def test_whole_waits_for_the_end() -> None:
    out = io.StringIO()
    painter = WholePainter(PlainPainter(out))
    painter.feed("a")
    assert out.getvalue() == ""
    painter.feed("b")
    painter.end()
    assert out.getvalue() == "ab\n"
