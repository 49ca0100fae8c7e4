from __future__ import annotations

import io
import unicodedata

import pyte
from hypothesis import example, given
from hypothesis import strategies as st

from tinychat.terminal.clean import clean, clean_line, put, shown_name

NASTY = st.text(
    st.sampled_from("\x1b\x9b\x9d\x07\x00\x7f\x85\r\n\t[]0;mHJ?1049h\\P_^X \u202e\u2066\ud800é"), max_size=40
)
ANY = st.text() | NASTY


@given(ANY)
@example("\x1b]0;title\x07\x9b2J\x1b[31mred\x1b[0m\u202eevil\r")
def test_no_control_and_no_override_is_left(text: str) -> None:
    for character in clean(text):
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"), repr(character)
        assert unicodedata.bidirectional(character) not in (
            "RLO",
            "LRO",
            "RLE",
            "LRE",
            "PDF",
            "RLI",
            "LRI",
            "FSI",
            "PDI",
        )


@given(ANY, ANY)
def test_it_does_not_matter_where_a_text_is_split(first: str, second: str) -> None:
    assert clean(first + second) == clean(first) + clean(second)


@given(st.text(st.characters(blacklist_categories=("Cc", "Cs", "Cf", "Zl", "Zp"))))
def test_plain_text_stays(text: str) -> None:
    assert clean(f"{text}\n\t{text}") == f"{text}\n\t{text}"


def test_what_joins_letters_and_emoji_stays() -> None:
    text = "\N{WOMAN}\u200d\N{PERSONAL COMPUTER} \u05d0\u200f \u0645\u200c\u0646"
    assert clean(text) == text


@given(NASTY)
def test_a_terminal_obeys_none_of_it(text: str) -> None:
    screen = pyte.Screen(40, 10)
    mode, charset = set(screen.mode), screen.charset
    pyte.Stream(screen).feed(clean(text))
    assert (screen.title, screen.icon_name, screen.mode, screen.charset) == ("", "", mode, charset)
    assert screen.cursor.attrs == screen.default_char


@given(ANY)
def test_a_name_is_one_line(text: str) -> None:
    assert len(f"[{clean_line(text)}]".splitlines()) == 1


def test_the_name_of_a_path() -> None:
    assert shown_name("/tmp/\x1b]0;x\x07cat\n.png") == "]0;xcat .png"
    assert shown_name("/") == "picture"


def test_put_replaces_what_the_encoding_cannot_hold() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    put(stream, "caf\u00e9\n")
    assert raw.getvalue() == b"caf?\n"
