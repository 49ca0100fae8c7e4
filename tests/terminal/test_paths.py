from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tinychat.terminal.paths import Found, escape, find_pictures, resolve, split_paths


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "my cat's (1).png"
    path.touch()
    return path


@pytest.fixture
def dog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "dog.JPG"
    path.touch()
    return path


def written(path: Path) -> list[str]:
    """The ways in which terminals hand over a dragged file."""
    text = str(path)
    return [text, shlex.quote(text), f'"{text}"', escape(text), path.as_uri(), "'" + text.replace("'", "'\\''") + "'"]


def test_a_dragged_file_alone_is_a_picture(cat: Path) -> None:
    for text in written(cat):
        assert find_pictures(text) == Found("", (cat,)), text
        assert find_pictures(f"  {text} ") == Found("", (cat,)), text


def test_a_dragged_file_before_a_question_is_staged_and_the_rest_asked(cat: Path) -> None:
    for text in written(cat):
        assert find_pictures(f"{text} what is this?") == Found("what is this?", (cat,)), text


def test_a_dragged_file_inside_a_question(cat: Path) -> None:
    for text in written(cat):
        assert find_pictures(f"what is {text} about, please?") == Found("what is about, please?", (cat,)), text


def test_several_files_in_one_line(cat: Path, dog: Path) -> None:
    for text in written(cat):
        assert find_pictures(f"{text} {shlex.quote(str(dog))}").paths == (cat, dog), text


@pytest.mark.parametrize("text", ["dog.JPG", "./dog.JPG", "~/dog.JPG", "'dog.JPG'", '"./dog.JPG"'])
def test_relative_and_home_paths(dog: Path, text: str) -> None:
    assert [path.resolve() for path in find_pictures(f"describe {text}.").paths] == [dog]
    assert [path.resolve() for path in find_pictures(text).paths] == [dog]


def test_punctuation_after_a_name_is_not_part_of_it(dog: Path) -> None:
    assert find_pictures("is (dog.JPG), or ./dog.JPG?").paths == (Path("dog.JPG"), Path("dog.JPG"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/no/such.png what is this?", "/no/such.png"),
        ("look: ./none.jpeg!", "./none.jpeg"),
        ("'/no/such one.png' ?", "/no/such one.png"),
        ("/no/such", "/no/such"),
        ("/no/such\\ one.png", "/no/such\\ one.png"),
        ("none.png", "none.png"),
        (r"C:\pics\cat.png what is it", r"C:\pics\cat.png"),
        ("https://example.org/cat.png", "https://example.org/cat.png"),
        ("see https://example.org/cat.png", "https://example.org/cat.png"),
    ],
)
def test_a_path_to_no_file_is_told(text: str, shown: str) -> None:
    found = find_pictures(text)
    assert (found.missing, found.paths) == ((shown,), ())


@pytest.mark.parametrize(
    "text",
    [
        "what is 1/2 of 3?",
        "and/or, either/or",
        "it's /usr/bin/python that fails",
        'don\'t "quote" me',
        "a lone ' quote and a \\ backslash\\",
        "`/no/such.png` is what I mean",
        "100 km/h .",
        "",
        " ",
        "'",
    ],
)
def test_words_stay_words(text: str) -> None:
    assert find_pictures(text) == Found(text.strip())


def test_an_apostrophe_before_a_path_does_not_hide_it(cat: Path) -> None:
    assert find_pictures(f"what's in {cat}").paths == (cat,)
    assert find_pictures(f"what's in {cat} that isn't 'odd'?").paths == (cat,)
    assert find_pictures(f"what's in './no cat.png' and {cat}").missing == ("./no cat.png",)


def test_a_bare_name_of_no_file_stays_a_word_and_is_mentioned() -> None:
    assert find_pictures("call it cat.png?") == Found("call it cat.png?", mentioned=("cat.png",))


def test_a_line_that_is_any_file_is_taken(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.touch()
    assert find_pictures(str(notes)).paths == (notes,)
    assert find_pictures(f"read {notes}").paths == ()


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (r"C:\Users\me\cat.png", "/mnt/c/Users/me/cat.png"),
        (r'"D:\my cat.png"', "/mnt/d/my cat.png"),
        ("c:/a.png", "/mnt/c/a.png"),
        ("file:///C:/a%20b.png", "/mnt/c/a b.png"),
        (r"\\wsl.localhost\Ubuntu\home\me\a.png", "/home/me/a.png"),
        (r"\\wsl$\Ubuntu\home\me\a.png", "/home/me/a.png"),
        ("file://host/a%25.png", "/a%.png"),
        ("~nobody-at-all/a.png", "~nobody-at-all/a.png"),
    ],
)
def test_other_spellings(text: str, path: str) -> None:
    assert resolve(text) == Path(path)


def test_split_paths_of_a_command(cat: Path, dog: Path) -> None:
    assert split_paths(str(cat)) == (cat,)
    for text in written(cat)[1:]:
        assert split_paths(f" {text}  dog.JPG ") == (cat, Path("dog.JPG"))
    assert split_paths("") == ()


def test_a_text_of_several_lines_keeps_them(cat: Path) -> None:
    assert find_pictures(f"{cat}\nfirst\n\nsecond").text.strip() == "first\n\nsecond"


NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
def test_any_name_is_found_as_any_terminal_writes_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.png"
    assume(len(path.name.encode()) < 255)
    path.touch()
    text = str(path)
    for shown in (shlex.quote(text), escape(text), path.as_uri()):
        assert find_pictures(shown).paths == (path,)
        found = find_pictures(f"{shown} what is this?")
        assert (found.paths, found.text) == ((path,), "what is this?")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text(st.sampled_from("/\\'\"~ .pngC:()\n"), max_size=40))
def test_no_text_breaks_it(text: str) -> None:
    find_pictures(text)
    split_paths(text)
