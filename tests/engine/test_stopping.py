"""Stopping: which text is certain, and for which reason an answer ends."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.generation import StopStringCriteria

from tinychat.core import StoppingParams
from tinychat.engine.detokenizer import Detokenizer
from tinychat.engine.stopping import Step, StopMatcher, Stopping, borders
from tinychat.errors import UsageError

EOS = 0


class Pieces:
    """A text source where token n is the n-th piece; `tail` is what it holds back."""

    def __init__(self, *pieces: str, tail: str = "") -> None:
        self.pieces = ("</s>", *pieces)
        self.tail = tail

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        tail, self.tail = self.tail, ""
        return tail


def answer(pieces, params=None, *, stop_ids=(EOS,), stop_strings=(), ids=None, room=100, tail=""):
    """(texts of the tokens, tail, reason, token ids) of an answer that is cancelled where nothing ends it."""
    params = params or StoppingParams()
    stopping = Stopping(params, stop_ids, stop_strings, Pieces(*pieces, tail=tail), room)
    texts, reason = [], None
    for token in ids or range(1, len(pieces) + 1):
        step = stopping.push(token)
        texts.append(step.text)
        if reason := step.reason:
            break
    end = stopping.finish(reason or "cancelled")
    return texts, end.text, end.reason, stopping.token_ids


def first_match(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that ends first, the longest of those: by trying everything."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


letters = st.text("ab.", min_size=1, max_size=5)
places = st.lists(st.integers(0, 40), max_size=12)


@given(st.text("ab.", max_size=40), places, st.lists(letters, max_size=3), st.booleans())
@example("aaab", [1, 2, 3], ["aab"], False)
@example("abab.abab", [3], ["abab.", "b.a"], False)
def test_matcher_finds_what_trying_everything_finds(text, cuts, stops, include):
    matcher = StopMatcher(stops, include)
    match = first_match(text, stops)
    certain = text if match is None else text[: match[1] if include else match[0]]
    shown = ""
    for piece in split(text, cuts):
        shown += matcher.push(piece)
        assert certain.startswith(shown)
    assert matcher.matched == (match is not None)
    assert shown + matcher.flush() == certain


@given(st.text("ab.", max_size=40), letters)
def test_no_more_is_held_back_than_needed(text, stop):
    matcher, shown = StopMatcher([stop]), ""
    for end, char in enumerate(text, 1):
        shown += matcher.push(char)
        if matcher.matched:
            break
        beginnings = [n for n in range(len(stop)) if text[:end].endswith(stop[:n])]
        assert len(shown) == end - max(beginnings)


@given(st.text("ab", min_size=1, max_size=12))
def test_borders_are_the_longest(pattern):
    for size, border in enumerate(borders(pattern), 1):
        prefix = pattern[:size]
        assert border == max(n for n in range(size) if prefix[:n] == prefix[size - n :])


@given(st.lists(st.integers(0, 7), min_size=1, max_size=12), st.sampled_from(["ab", "b a", "aab", "a.b"]))
@example([0, 0, 0, 1], "aab")
def test_the_token_that_ends_is_the_one_transformers_finds(ids, stop):
    stopping = Stopping(StoppingParams(stop=(stop,)), (), (), Decoded(TOKENIZER), room=100)
    criterion = StopStringCriteria(TOKENIZER, [stop])
    for end in range(1, len(ids) + 1):
        reason = stopping.push(LETTERS[ids[end - 1]]).reason
        theirs = bool(criterion(torch.tensor([stopping.token_ids]), None)[0])
        assert (reason == "stop") == theirs
        if theirs:
            return


class Decoded:
    """One token, one piece: fit for tokens that are whole characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def push(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id])

    def flush(self) -> str:
        return ""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("a", "b"), ("b", "Ġ"), ("a", "a"), ("ab", ".")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZER = byte_tokenizer()
LETTERS = [TOKENIZER.convert_tokens_to_ids(word) for word in ("a", "b", ".", "Ġ", "ab", "bĠ", "aa", "ab.")]


def test_a_stop_string_that_ends_inside_a_token_is_cut():
    assert answer(["abc ", "ST", "OP. and"], StoppingParams(stop=("STOP",))) == (
        ["abc ", "", ""],
        "",
        "stop",
        [1, 2, 3],
    )


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["ab", "c STOP. more"], "STOP", "abc "),
        (["ab", "c STOP."], "STOP.", "abc "),
        (["aS", "TO", "Pb"], "STOP", "a"),
        (["S", "T", "O", "P"], "STOP", ""),
        (["aa", "ab"], "aab", "a"),
        (["a", "a", "a", "b"], "aab", "a"),
        (["abab", "abc"], "ababc", "ab"),
        (["x\n", "\n", "y"], "\n\n", "x"),
        (["你", "好STOP"], "好ST", "你"),
    ],
)
def test_a_stop_string_in_a_token_over_three_tokens_or_overlapping_itself_is_cut(pieces, stop, shown):
    texts, tail, reason, _ = answer(pieces, StoppingParams(stop=(stop,)))
    assert ("".join(texts), tail, reason) == (shown, "", "stop")


def test_a_newline_at_the_end_is_no_match_where_the_stop_text_is_not():
    texts, tail, reason, _ = answer(["abc STO", "\n"], StoppingParams(stop=("STOP",)))
    assert ("".join(texts) + tail, reason) == ("abc STO\n", "cancelled")
    assert answer(["abc STOP", "\n"], StoppingParams(stop=("STOP",)))[:3] == (["abc "], "", "stop")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UsageError) as caught:
        StoppingParams(stop=("a", ""))
    assert caught.value.message == "a stop string is empty"


@given(
    st.text("ab .é😀\n", max_size=25), st.lists(st.text("ab .é😀\n", min_size=1, max_size=3), min_size=1, max_size=3)
)
@example("ab😀b", ["😀"])
def test_with_a_detokenizer_the_text_ends_where_the_first_stop_string_begins(text, stops):
    ids = TOKENIZER.encode(text)
    stopping, shown, reason = Stopping(StoppingParams(stop=tuple(stops)), (), (), Detokenizer(TOKENIZER), 100), "", None
    for token in ids:
        step = stopping.push(token)
        shown += step.text
        if reason := step.reason:
            break
    end = stopping.finish(reason or "cancelled")
    match = first_match(text, stops)
    assert shown + end.text == (text if match is None else text[: match[0]])
    assert end.reason == ("cancelled" if match is None else "stop")
    if match is not None:
        needed = next(n for n in range(len(ids) + 1) if first_match(TOKENIZER.decode(ids[:n]), stops))
        assert len(stopping.token_ids) == needed


def test_include_stop_shows_it_and_nothing_after():
    params = StoppingParams(stop=("STOP",), include_stop=True)
    assert answer(["abc ", "ST", "OP. and"], params) == (["abc ", "ST", "OP"], "", "stop", [1, 2, 3])


def test_the_longest_of_stop_strings_that_end_together_is_cut():
    assert answer(["x\n", "###"], StoppingParams(stop=("###", "\n###"))) == (["x", ""], "", "stop", [1, 2])


@pytest.mark.parametrize("stop", ["a.c", "(x", "[0-9]+", "\n", "$", "^a", "\\d"])
def test_regex_metacharacters_are_plain_characters(stop):
    assert answer(["12abc d", "e" + stop + "f"], StoppingParams(stop=(stop,)))[0] == ["12abc d", "e"]
    assert answer(["12abc d", "e"], StoppingParams(stop=(stop,)))[2] == "cancelled"


def test_what_was_held_back_is_flushed():
    for ids, reason in (([1, 2], "cancelled"), ([1, 2, EOS], "eos")):
        texts, tail, end, token_ids = answer(["a", "ST"], StoppingParams(stop=("STOP",)), ids=ids)
        assert ("".join(texts), tail, end, token_ids) == ("a", "ST", reason, [1, 2])
    assert answer(["a", "ST"], StoppingParams(stop=("STOP",), max_new_tokens=2))[1:3] == ("ST", "length")


def test_text_that_the_detokenizer_held_back_is_flushed_and_searched():
    assert answer(["a"], tail="\ufffd") == (["a"], "\ufffd", "cancelled", [1])
    params = StoppingParams(stop=("a\n",), max_new_tokens=1)
    assert answer(["xa"], params, tail="\nb") == (["x"], "", "stop", [1])


def test_several_eos_ids():
    for eos in (0, 3):
        assert answer(["a", "b", "c"], ids=[1, 2, eos], stop_ids=(0, 3)) == (["a", "b", ""], "", "eos", [1, 2])


def test_an_eos_alone_is_an_empty_answer():
    assert answer(["a"], ids=[EOS]) == ([""], "", "eos", [])


def test_without_an_eos_id_only_the_length_and_stop_strings_end():
    params = StoppingParams(max_new_tokens=3)
    assert answer(["a"], params, ids=[EOS, 1, EOS, 1], stop_ids=()) == (["</s>", "a", "</s>"], "", "length", [0, 1, 0])


def test_an_eos_on_the_last_allowed_token_is_an_eos():
    params = StoppingParams(max_new_tokens=2)
    assert answer(["a"], params, ids=[1, EOS])[2:] == ("eos", [1])
    assert answer(["a"], params, ids=[1, 1, EOS])[2:] == ("length", [1, 1])


def test_a_stop_string_on_the_last_allowed_token_is_a_stop():
    assert answer(["a", "b"], StoppingParams(max_new_tokens=2, stop=("b",)))[2] == "stop"


def test_ignore_eos_leaves_the_users_stop_strings():
    params = StoppingParams(ignore_eos=True, stop=("c",), max_new_tokens=9)
    texts, _, reason, ids = answer(["a", "b", "c"], params, ids=[1, EOS, 2, 3], stop_strings=("b",))
    assert (texts, reason, ids) == (["a", "</s>", "b", ""], "stop", [1, EOS, 2, 3])


def test_the_templates_stop_strings_count():
    assert answer(["a", "</s>b"], stop_strings=("</s>",)) == (["a", ""], "", "stop", [1, 2])


@pytest.mark.parametrize(("limit", "room", "count"), [(None, 3, 3), (2, 3, 2), (9, 3, 3)])
def test_the_room_bounds_the_length(limit, room, count):
    texts, tail, reason, ids = answer(["a"] * 9, StoppingParams(max_new_tokens=limit), room=room)
    assert (texts, tail, reason, len(ids)) == (["a"] * count, "", "length", count)


def test_a_step_without_an_end():
    assert Stopping(StoppingParams(), [EOS], (), Pieces("a"), 5).push(1) == Step("a")
