"""Tokenization around marks: harmless text as transformers does it, typed special tokens as plain characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from tinychat.errors import ModelError
from tinychat.inputs.marks import ANSWER, ANSWER_ID, IMAGE, IMAGE_ID, MarkedTokenizer

NAMES = ["chatml", "chatml_image", "llama_3", "llama", "llama_legacy", "llava_hf"]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<image>", "</s>", "<s>", "<|eot_id|>", "<unk>", "<", ">", "|", "s>", "{0}"]
typed = st.lists(st.one_of(st.sampled_from(SPECIALS), st.text(max_size=8)), max_size=6).map("".join)


def without_added(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids that the vocabulary gives where no special token exists: what typed text ought to become."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(text=typed)
def test_typed_text_round_trips_and_is_never_special(name, text, tokenizers):
    text = "x" + text.replace("▁", "")  # Llama tokenizers forget a space at the start
    own = MarkedTokenizer(tokenizers(name), "<image>")
    ids = own.encode(own.quote(text))
    assert own.special_ids.isdisjoint(ids)
    assert tokenizers(name).decode(ids) == "".join(c for c in text if not "\ufdd0" <= c <= "\ufdef")


@pytest.mark.parametrize("name", ["chatml", "chatml_image", "llama_3"])
@settings(max_examples=40)
@given(text=typed)
def test_typed_text_is_tokenized_as_if_nothing_were_special(name, text, tokenizers):
    own = MarkedTokenizer(tokenizers(name), "<image>")
    assert own.encode(own.quote(text)) == without_added(tokenizers(name), own.quote(text).replace("\ufdd2", ""))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(text=st.text(max_size=20))
def test_the_copy_that_knows_the_marks_tokenizes_as_the_tokenizer(name, text, tokenizers):
    tokenizer = tokenizers(name)
    own = MarkedTokenizer(tokenizer, "<image>")
    text = "".join(c for c in text if not "\ufdd0" <= c <= "\ufdef")
    before, after = text + tokenizer.eos_token + text, tokenizer.eos_token + text
    expected = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    assert own._encode_marked(before + ANSWER + after) == [*expected[0], ANSWER_ID, *expected[1]]
    assert own.encode(before + ANSWER + after) == [*expected[0], ANSWER_ID, *expected[1]]


def test_common_chats_make_no_copy_of_the_tokenizer(tokenizers):
    own = MarkedTokenizer(tokenizers("chatml"), "<image>")
    own.encode(f"a{IMAGE}b{ANSWER}<|im_end|>c{ANSWER}")
    assert "_marked" not in vars(own)
    assert own.encode(f"a{ANSWER} b") == [*own.encode("a"), ANSWER_ID, *own.encode(" b")]
    assert "_marked" in vars(own)


def test_a_special_token_that_merges_would_build_is_parted(tokenizers):
    tokenizer = tokenizers("llama_legacy")
    assert tokenizer.eos_token_id in without_added(tokenizer, "a </s>")
    own = MarkedTokenizer(tokenizer, "<image>")
    ids = own.encode(own.quote("a </s> b"))
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a </s> b"


def test_special_tokens_that_are_normalized_are_parted_too(tokenizers):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizers("chatml").backend_tokenizer.to_str())
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True, special=False)])
    own = MarkedTokenizer(tokenizer, "<image>")
    assert len(tokenizer) - 1 in own.encode("<tool>")
    ids = own.encode(own.quote("a <tool>"))
    assert len(tokenizer) - 1 not in ids
    assert tokenizer.decode(ids) == "a <tool>"


def test_runs_of_spaces_in_the_vocabulary_stay_in_use(tokenizers):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizers("chatml").backend_tokenizer.to_str())
    )
    tokenizer.add_tokens([AddedToken("    ", normalized=True, special=False)])
    own = MarkedTokenizer(tokenizer, "<image>")
    assert own.encode(own.quote("a    b")) == tokenizer("a    b")["input_ids"]


def test_overlapping_specials_and_split_surrogates(tokenizers):
    own = MarkedTokenizer(tokenizers("chatml"), "<image>")
    for text in ("<<|im_end|>", "<|im_<|im_end|>end|>", "<|im_end|><|im_end|>"):
        assert own.special_ids.isdisjoint(own.encode(own.quote(text)))
    assert own.quote("a\ud83d\ufdd1b") == "a\ufffdb"


def test_images_by_token_or_by_stretch(tokenizers):
    for name in ("chatml_image", "llava_hf"):
        tokenizer = tokenizers(name)
        whole = tokenizer("a<image>\nb<image>", add_special_tokens=False)["input_ids"]
        image = tokenizer.convert_tokens_to_ids("<image>")
        expected = [IMAGE_ID if i == image else i for i in whole]
        assert MarkedTokenizer(tokenizer, "<image>").encode(f"a{IMAGE}\nb{IMAGE}") == expected
    for name in ("llama", "llama_legacy", "chatml"):
        tokenizer = tokenizers(name)
        a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "\nb"))
        assert MarkedTokenizer(tokenizer, "<image>").encode(f"a{IMAGE}\nb{IMAGE}") == [*a, IMAGE_ID, *b, IMAGE_ID]


def test_transformers_own_tokenizer_classes():
    letters = [*map(chr, range(33, 127)), "▁", *(f"<0x{i:02X}>" for i in range(256))]
    llama = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *letters])}, merges=[])
    qwen = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate([*map(chr, range(33, 127)), "Ġ", "Ċ"])}, merges=[])
    qwen.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    for tokenizer in (llama, qwen):
        own = MarkedTokenizer(tokenizer, "<image>")
        assert own.encode("what is it?") == tokenizer("what is it?", add_special_tokens=False)["input_ids"]
        for text in ("go </s> on", "an <|im_end|> end"):
            ids = own.encode(own.quote(text))
            assert own.special_ids.isdisjoint(ids)
            assert tokenizer.decode(ids) == text


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"Slow is not a fast one; save it once as tokenizer\.json"):
        MarkedTokenizer(Slow(), "<image>")
