from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinychat.terminal.blocks import Blocks


def blocks_of(text: str) -> list[str]:
    blocks = Blocks()
    finished = [block for line in text.splitlines(keepends=True) for block in blocks.push(line)]
    return [*finished, *blocks.close()]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("a\nb\n\nc\n", ["a\nb\n", "c\n"]),
        ("# one\n## two\ntext\n# three\n", ["# one\n", "## two\n", "text\n", "# three\n"]),
        ("a\n```py\nx\n\ny\n```\nb\n", ["a\n", "```py\nx\n\ny\n```\n", "b\n"]),
        ("````\n```\n# no heading\n````\n", ["````\n```\n# no heading\n````\n"]),
        ("~~~\n```\n~~~\n", ["~~~\n```\n~~~\n"]),
        ("```\nnever closed\n", ["```\nnever closed\n"]),
        ("- a\n\n- b\n\n  more of b\n\nend\n", ["- a\n\n- b\n\n  more of b\n\n", "end\n"]),
        ("1. do:\n   ```\n   x\n\n   ```\n2. then\n\nend\n", ["1. do:\n   ```\n   x\n\n   ```\n2. then\n\n", "end\n"]),
        ("1. do:\n```\nx\n\n```\n", ["1. do:\n", "```\nx\n\n```\n"]),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n\n> quote\n", ["| a | b |\n|---|---|\n| 1 | 2 |\n", "> quote\n"]),
        ("#hashtag\n-not a list\n\nb\n", ["#hashtag\n-not a list\n", "b\n"]),
        ("\n\n \n", []),
    ],
)
def test_blocks_end_where_markdown_ends_them(text: str, blocks: list[str]) -> None:
    assert blocks_of(text) == blocks


def test_open_code_can_be_cut() -> None:
    blocks = Blocks()
    assert blocks.cut() is None
    for line in ("```py\n", "a\n", "b\n"):
        blocks.push(line)
    assert blocks.cut() == "```py\na\nb\n```\n"
    assert blocks.open == ["```py\n"]
    assert blocks.cut() is None
    blocks.push("c\n")
    assert blocks.push("```\n") == ["```py\nc\n```\n"]


def test_an_open_list_is_cut_before_its_last_item() -> None:
    blocks = Blocks()
    for line in ("1. a\n", "   - x\n"):
        blocks.push(line)
    assert blocks.cut() is None
    for line in ("2. b\n", "   ```\n", "   3. no item\n"):
        blocks.push(line)
    assert blocks.cut() == "1. a\n   - x\n"
    assert blocks.open == ["2. b\n", "   ```\n", "   3. no item\n"]
    assert blocks.cut() is None


def test_a_paragraph_cannot_be_cut() -> None:
    blocks = Blocks()
    blocks.push("a\n")
    blocks.push("b\n")
    assert blocks.cut() is None


@given(st.lists(st.sampled_from(["a\n", "\n", "# h\n", "- i\n", "  c\n", "```\n", "  ```\n", "~~~~\n", "1. x\n"])))
def test_no_line_is_lost_but_blank_ones(lines: list[str]) -> None:
    assert "".join(blocks_of("".join(lines))).replace("\n", "") == "".join(lines).replace("\n", "")
