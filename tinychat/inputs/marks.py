"""Marks in a rendered prompt, and its tokenization: the tokenizer's own, but words typed by people are never special.

A mark is one of Unicode's noncharacters (U+FDD0..U+FDEF), which are dropped from all text that comes in:
ANSWER and IMAGE stand for token ids and for a picture. CUT hides a special token's string inside text and is gone
before the text is split into words; BREAK, where that does not suffice, parts the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from tinychat.errors import ModelError

ANSWER, IMAGE, CUT, BREAK = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
ANSWER_ID, IMAGE_ID = -1, -2  # what `MarkedTokenizer.encode` gives for them: no vocabulary has these ids

_RESERVED = re.compile("[\ufdd0-\ufdef]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL_SHAPE = re.compile(r"<\S+>|\[\S+\]")


class FastTokenizer(Protocol):
    """What we use of a transformers fast tokenizer (whose own attributes are too dynamic for a type checker)."""

    is_fast: bool
    chat_template: Any
    pad_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: list[int]
    added_tokens_decoder: Mapping[int, AddedToken]
    backend_tokenizer: Tokenizer

    def __call__(self, text: str, **options: Any) -> Mapping[str, list[int]]: ...
    def __len__(self) -> int: ...
    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...
    def get_vocab(self) -> dict[str, int]: ...
    def get_added_vocab(self) -> dict[str, int]: ...
    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any: ...


class MarkedTokenizer:
    """A tokenizer over strings with marks. What the marks do not touch is tokenized exactly as `tokenizer` does."""

    def __init__(self, tokenizer: FastTokenizer, image_token: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise ModelError(f"the tokenizer {kind} is not a fast one", "save it once as tokenizer.json")
        added = tokenizer.added_tokens_decoder
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.image_token_id = next((i for i, token in added.items() if token.content == image_token), None)
        self.special_ids = frozenset(i for i, token in added.items() if _is_control(token, image_token))
        control = [token for token in added.values() if _is_control(token, image_token)]
        self._typed = _typed_pattern(control, image_token)
        exact = [re.escape(token.content) for token in control if not token.normalized]
        self._special_first = re.compile(f"{'|'.join(exact)}|$")

    def quote(self, text: str) -> str:
        """Text by a person, so marked that nothing in it can become a special token or a mark."""
        clean = _SURROGATE.sub("\ufffd", _RESERVED.sub("", text))
        return self._typed.sub(lambda match: match[0] + CUT, clean)

    def encode(self, text: str) -> list[int]:
        """Token ids of a marked string, without BOS; ANSWER_ID and IMAGE_ID stand where the marks stood.

        A picture's surroundings follow the model's own habit: where its image token is in the vocabulary the whole
        string is tokenized with it, elsewhere (VILA-1.5, LLaVA) each stretch between pictures by itself.
        """
        if self.image_token_id is not None:
            ids = self._encode(text.replace(IMAGE, self.image_token))
            return [IMAGE_ID if i == self.image_token_id else i for i in ids]
        first, *others = (self._encode(stretch) for stretch in text.split(IMAGE))
        return first + [i for ids in others for i in (IMAGE_ID, *ids)]

    def _encode(self, text: str) -> list[int]:
        """The tokenizer itself suffices where nothing is cut and a special token follows each answer."""
        first, *others = text.split(ANSWER)
        if CUT in text or not all(self._special_first.match(after) for after in others):
            return self._encode_marked(text)
        ids = self._encode_plain(first)
        return ids + [i for after in others for i in (ANSWER_ID, *self._encode_plain(after))]

    def _encode_plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_marked(self, text: str) -> list[int]:
        encoding = self._marked.encode(text, add_special_tokens=False)
        while merged := list(self._merged_cuts(text, encoding.ids, encoding.offsets)):
            for at in merged:
                text = text[:at] + BREAK + text[at + 1 :]
            encoding = self._marked.encode(text, add_special_tokens=False)
        answer = self._marked.token_to_id(ANSWER)
        return [ANSWER_ID if i == answer else i for i in encoding.ids]

    def _merged_cuts(self, text: str, ids: Iterable[int], offsets: Iterable[tuple[int, int]]) -> Iterator[int]:
        """Cuts inside a special token that came about after all: by merges, or matched in the normalized text."""
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            if token_id in self.special_ids:
                yield from (at for at in range(start, end) if text[at] == CUT)

    @cached_property
    def _marked(self) -> Tokenizer:
        """A copy that knows the marks. Special tokens are looked for before its normalizer removes the cuts.

        Made when first needed: with a vocabulary of 128k it takes a quarter of a second and some 100 MB.
        """
        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        normalizer, pre_tokenizer = copy.normalizer, copy.pre_tokenizer
        copy.normalizer = normalizers.Sequence([normalizers.Replace(CUT, ""), *([normalizer] if normalizer else [])])
        split = pre_tokenizers.Split(BREAK, "removed")
        copy.pre_tokenizer = pre_tokenizers.Sequence([split, *([pre_tokenizer] if pre_tokenizer else [])])
        copy.add_special_tokens([AddedToken(ANSWER, normalized=False, special=True)])
        return copy


def _is_control(token: AddedToken, image_token: str) -> bool:
    """Special tokens, and added ones that look like it (<tool_call>); not the runs of spaces of some vocabularies."""
    return token.special or token.content == image_token or bool(_CONTROL_SHAPE.fullmatch(token.content))


def _typed_pattern(control: Iterable[AddedToken], image_token: str) -> re.Pattern[str]:
    """The first character of every control string, overlapping ones too."""
    strings = {token.content for token in control} | {image_token}
    cuttable = "|".join(re.escape(text) for text in strings if len(text) > 1)
    return re.compile(f"(?={cuttable or '(?!)'}).", re.DOTALL)
