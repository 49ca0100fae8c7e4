"""The detokenizer: its pieces add up to tokenizer.decode, for any ids, in two families of tokenizers."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinychat.engine.detokenizer import WINDOW, Detokenizer, token_text

LINES = [
    "The quick brown fox jumps over the lazy dog, doesn't it?  Two  spaces.",
    "How many red squares are there? There are three red squares and one blue circle.",
    "naïve café, größer, 漢字とかな, 漢字 漢字, 😀 👩‍👩‍👧 end",
]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken("<image>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return wrap(backend)


def llama() -> PreTrainedTokenizerFast:
    """Llama 2's parts: Prepend and Replace, BPE with byte fallback, and a decoder that strips one leading space."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(LINES[:2], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = trained.to_str()
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained.get_vocab(), "▁▁", "\ufffd"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(pair) for pair in json.loads(model)["model"]["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(backend)


def metaspace() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    return wrap(backend)


TOKENIZERS = {"byte_level": byte_level(), "llama": llama(), "metaspace": metaspace()}
each = pytest.mark.parametrize("name", TOKENIZERS)


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@each
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_pieces_add_up_for_any_ids(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=60))
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)


@each
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_pieces_add_up_for_broken_bytes_among_spaces_and_special_tokens(name, data):
    tokenizer = TOKENIZERS[name]
    chosen = ["<0xE2>", "<0x82>", "<0xAC>", "<0xF0>", "<0x0A>", "<0x20>", "â", "Ĥ", "¬", "ð", "Ġ", "▁", "▁▁", "\ufffd"]
    vocab = tokenizer.get_vocab()
    few = [vocab[word] for word in [*chosen, *SPECIAL, "<image>"] if word in vocab] + [len(tokenizer) + 1]
    ids = data.draw(st.lists(st.sampled_from(few), max_size=60))
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)


@each
@given(text=st.text(max_size=60))
@example("  two leading spaces")
@example("ab 😀ok")
@example("👩‍👩‍👧👩‍👩‍👧 漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢漢 x")
@settings(deadline=None, max_examples=100)
def test_pieces_add_up_for_any_text(name, text):
    tokenizer = TOKENIZERS[name]
    ids = encode(tokenizer, text)
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)


@pytest.mark.parametrize("name", ["byte_level", "llama"])
def test_no_piece_shows_a_part_of_a_character(name):
    tokenizer = TOKENIZERS[name]
    text = "x 😀 ok 龘 größer"
    parts = pieces(tokenizer, encode(tokenizer, text))
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_words_are_sent_as_soon_as_they_are_complete():
    tokenizer = TOKENIZERS["llama"]
    ids = encode(tokenizer, "red squares are there")
    parts = pieces(tokenizer, ids)
    assert parts[0] == decode(tokenizer, ids[:1])
    assert all(parts[:-1])
    assert parts[-1] == ""


@each
def test_special_tokens_have_no_text_and_hide_no_space(name):
    tokenizer = TOKENIZERS[name]
    special = tokenizer.convert_tokens_to_ids(SPECIAL)
    words = encode(tokenizer, "red") + special * WINDOW + encode(tokenizer, " red squares")
    assert "".join(pieces(tokenizer, words)) == decode(tokenizer, words)
    assert pieces(tokenizer, special) == [""] * (len(special) + 1)


def test_an_unfinished_character_is_flushed_as_the_tokenizer_decodes_it():
    for name in ("byte_level", "llama"):
        tokenizer = TOKENIZERS[name]
        ids = encode(tokenizer, "ok 😀")[:-1]
        parts = pieces(tokenizer, ids)
        assert "\ufffd" not in "".join(parts[:-1])
        assert parts[-1].startswith("\ufffd")
        assert "".join(parts) == decode(tokenizer, ids)


@each
@pytest.mark.parametrize("text", ["😀ok", "👩‍👩‍👧", "é", "👩‍👩‍👧 and 😀"])
def test_an_answer_that_begins_with_an_emoji_sequence_is_whole_however_short_the_prompt(name, text):
    """No piece depends on a prompt: the window of a new answer begins empty."""
    tokenizer = TOKENIZERS[name]
    ids = encode(tokenizer, text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == decode(tokenizer, ids)
    assert name == "metaspace" or ("".join(parts) == text and not any("\ufffd" in part for part in parts))


def test_a_tokens_own_text_has_its_space_and_a_special_one_its_name():
    for name, spaced in (("byte_level", "Ġred"), ("llama", "▁red"), ("metaspace", "▁red")):
        tokenizer = TOKENIZERS[name]
        assert token_text(tokenizer, tokenizer.convert_tokens_to_ids(spaced)) == " red"
        assert token_text(tokenizer, tokenizer.convert_tokens_to_ids("</s>")) == "</s>"
    llama = TOKENIZERS["llama"]
    assert token_text(llama, llama.convert_tokens_to_ids("<0xE2>")) == "\ufffd"
    assert token_text(llama, llama.convert_tokens_to_ids("▁▁")) == "  "


@each
def test_a_tokens_own_text_is_what_it_adds_amid_a_text(name):
    tokenizer = TOKENIZERS[name]
    before = encode(tokenizer, "red")
    for token in range(len(tokenizer)):
        if decode(tokenizer, [token]) and "\ufffd" not in decode(tokenizer, [token]):
            added = decode(tokenizer, [*before, token]).removeprefix(decode(tokenizer, before))
            assert token_text(tokenizer, token) == added


def test_a_detokenizer_is_ready_again_after_its_flush():
    tokenizer = TOKENIZERS["llama"]
    detokenizer, ids = Detokenizer(tokenizer), encode(tokenizer, "red 😀")
    for _ in range(2):
        assert "".join([*(detokenizer.push(token) for token in ids), detokenizer.flush()]) == "red 😀"


class Counting:
    """A tokenizer that notes how many ids it is asked to decode."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.sizes: list[int] = []

    def decode(self, ids, **options):
        self.sizes.append(len(ids))
        return self.tokenizer.decode(ids, **options)

    def convert_ids_to_tokens(self, token):
        return self.tokenizer.convert_ids_to_tokens(token)


@each
@pytest.mark.parametrize("kind", ["random", "bytes", "one"])
def test_the_work_a_token_is_bounded(name, kind):
    tokenizer, choose = Counting(TOKENIZERS[name]), random.Random(0)
    highest = {"random": len(TOKENIZERS[name]), "bytes": 250, "one": 1}[kind]
    ids = [choose.randrange(highest) for _ in range(3000)]
    for _ in pieces(tokenizer, ids):
        pass
    assert max(tokenizer.sizes) <= 100
    assert sum(tokenizer.sizes) <= 40 * len(ids)


def test_a_long_run_of_bytes_is_sent_on_the_way():
    tokenizer = TOKENIZERS["llama"]
    text = "".join(chr(0x0F40 + i % 30) + "é😀"[i % 2] for i in range(150)) + " red"
    ids = encode(tokenizer, text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text
    assert sum(map(bool, parts)) > 8
    assert not any("\ufffd" in part for part in parts)


def test_a_long_run_of_wrong_bytes_is_sent_on_the_way():
    tokenizer = TOKENIZERS["llama"]
    ids = tokenizer.convert_tokens_to_ids(["<0x80>"]) * 300 + encode(tokenizer, "red")
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids) == "\ufffd" * 300 + " red"
