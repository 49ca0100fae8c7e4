"""From tokens to text, token by token: the pieces add up to what the tokenizer makes of all the ids at once.

Each token decodes a window of the last few ids, never the whole answer, and sends what is new and certain of its text.
Not certain are a U+FFFD at the end (the beginning of a character, in byte-level BPE) and a run of byte tokens `<0xE2>`
until another token ends it: one wrong byte turns the whole run into U+FFFD, in Llama's byte fallback.
"""

from __future__ import annotations

import re
from typing import Literal, Protocol

Kind = Literal["text", "byte", "silent"]

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# A character has four bytes at most: a window of this many tokens holds all of an unfinished one, and text before it.
WINDOW = 8
# So many byte tokens without another between them are sent character by character.
LONGEST_RUN = 64


class Tokenizer(Protocol):
    """The part of transformers' PreTrainedTokenizerBase that is used here."""

    def decode(
        self, token_ids: list[int], /, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str | list[str]: ...

    def convert_ids_to_tokens(self, ids: list[int], /) -> str | list[str]: ...


class Detokenizer:
    """The text of one answer. `push` each token, `flush` at the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kinds: dict[int, Kind] = {}
        self._window: list[int] = []
        self._sent = 0
        self._run = 0

    @property
    def window(self) -> int:
        """How many of the newest tokens are decoded again for the next one."""
        return len(self._window)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; special tokens have none."""
        kind = self._kind(token_id)
        if kind == "silent":
            return ""
        self._window.append(token_id)
        self._run = self._run + 1 if kind == "byte" else 0
        if self._run:
            return self._split_run() if self._run > LONGEST_RUN else ""
        piece = self._send(_certain(self._decode(self._window)))
        if len(self._window) >= 2 * WINDOW:
            self._window = self._window[-WINDOW:]
            self._sent = len(_certain(self._decode(self._window)))
        return piece

    def flush(self) -> str:
        """What was held back, as the tokenizer decodes it; ready for another answer."""
        piece = self._send(self._decode(self._window))
        self._window, self._sent, self._run = [], 0, 0
        return piece

    def _send(self, text: str) -> str:
        piece, self._sent = text[self._sent :], len(text)
        return piece

    def _split_run(self) -> str:
        """Sends a long run up to its last whole character, which stays as the context of what follows."""
        size = len(self._window)
        end = next((end for end in range(size, size - 4, -1) if self._is_whole(0, end)), size)
        piece = self._send(self._decode(self._window[:end]))
        start = next((start for start in range(end - 1, end - 5, -1) if self._is_whole(start, end)), end - 1)
        self._sent = len(self._decode(self._window[start:end]))
        self._window = self._window[start:]
        self._run = len(self._window)
        return piece

    def _is_whole(self, start: int, end: int) -> bool:
        return not self._decode(self._window[start:end]).endswith(REPLACEMENT)

    def _kind(self, token_id: int) -> Kind:
        kind = self._kinds.get(token_id)
        if kind is None:
            kind = self._kinds[token_id] = self._find_kind(token_id)
        return kind

    def _find_kind(self, token_id: int) -> Kind:
        # Twice, since a space alone at the beginning is stripped.
        if not self._decode([token_id, token_id]):
            return "silent"
        (token,) = self._tokenizer.convert_ids_to_tokens([token_id])
        return "byte" if BYTE_TOKEN.fullmatch(token) else "text"

    def _decode(self, ids: list[int]) -> str:
        return _decode(self._tokenizer, ids, skip_special_tokens=True)


def _certain(text: str) -> str:
    return text.removesuffix(REPLACEMENT)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """What one token adds amid a text, its space before it included; a special token's name, U+FFFD for a part."""
    once, twice = (_decode(tokenizer, [token_id] * count, skip_special_tokens=False) for count in (1, 2))
    return twice[len(once) :]


def _decode(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)
