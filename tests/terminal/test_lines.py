from __future__ import annotations

import pytest

from tinychat.terminal.lines import is_block_start, is_open, unwrap


@pytest.mark.parametrize("text", ["a\\", "a\\\nb\\", "\\\\\\", '"""', '"""a', '""" a\nb', '""""', '"""a\n\n'])
def test_more_is_to_come(text: str) -> None:
    assert is_open(text)


@pytest.mark.parametrize("text", ["", "a", "a\\\\", "a\\\nb", '""""""', '"""a"""', '"""a\nb\n"""', 'say """a'])
def test_nothing_is_to_come(text: str) -> None:
    assert not is_open(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\\\nb", "a\nb"),
        ("a\\\\\nb", "a\\\\\nb"),
        ("a\nb", "a\nb"),
        ('"""\n/clear\n/home/x.png\n"""', "/clear\n/home/x.png"),
        ('"""a"""', "a"),
        ('""""""', ""),
    ],
)
def test_the_notation_is_taken_away(text: str, words: str) -> None:
    assert unwrap(text) == words


def test_a_block_is_known_by_its_start() -> None:
    assert is_block_start(' """x')
    assert not is_block_start('x """')
