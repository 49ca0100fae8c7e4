"""What models are compared on: dialogues about pictures, and text, that none of them was calibrated on.

`demo` is the demo generator's held-out split, for models trained on its other splits. `plain` are generated pictures
with everyday questions and a small English text, for models that know the world.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from tinychat.core import Image, Message, Request, StoppingParams, Text
from tinychat.errors import UsageError
from tinychat.eval import prose
from tinychat.eval.demo import sample_at
from tinychat.eval.demo.dialogues import template_words
from tinychat.eval.tasks import messages, png
from tinychat.inputs.processor import Processor

Kind = Literal["text", "pictures"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SEED = 1  # the demo tasks ask samples of seed 0
ANSWER_TOKENS = 48
OPEN_QUESTIONS = (
    "Describe the picture in one sentence.",
    "What do you see in this picture?",
    "List the things in the picture and their colours.",
    "Is there any text in the picture? If so, what does it say?",
)


@dataclass(frozen=True, slots=True)
class Item:
    """Something to read and continue; where `reads_prompt`, the prompt's own text is predicted as well. `answer` is
    the right one, where there is only one."""

    kind: Kind
    request: Request
    reads_prompt: bool = False
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Heldout:
    """A set by its name: its items, so many of each kind, and its text for perplexity.

    Without a text it is the right answers that perplexity is about: a demo model learns to predict nothing else.
    """

    name: str
    samples: int
    items: Callable[[int], Iterator[Item]]
    text: str | None


def heldout(name: str) -> Heldout:
    """The set of that name. Raises UsageError where there is none."""
    if name not in SETS:
        raise UsageError(f"there is no held-out set {name!r}", f"the sets are {', '.join(SETS)}")
    return SETS[name]


def speaks_demo(processor: Processor) -> bool:
    """Whether the vocabulary is that of the generated dialogues: its long tokens are their words, and no others."""
    known = template_words()
    special = set(processor.tokenizer.get_added_vocab())
    tokens = (token for token in processor.tokenizer.get_vocab() if token not in special)
    words = {token.strip("\u0120\u2581 ").lower() for token in tokens if token.strip("\u0120\u2581 ").isalpha()}
    long = {word for word in words if len(word) > 3}
    return bool(long) and bool(processor.tokens_per_image) and len(long - known) <= len(long) // 20


def fingerprint(items: Iterable[Item]) -> str:
    """sha256 of what is asked, words and pictures."""
    digest = hashlib.sha256()
    for item in items:
        request = item.request
        for part in (*request.parts, *(part for message in request.messages for part in message.parts)):
            digest.update(part.text.encode() if isinstance(part, Text) else part.data or b"")
            digest.update(b"\0")
        digest.update((item.answer or "").encode())
    return digest.hexdigest()


def _asked(name: str, turns: tuple[Message, ...]) -> Request:
    return Request(name, turns, stopping=StoppingParams(max_new_tokens=ANSWER_TOKENS))


def _demo_items(samples: int) -> Iterator[Item]:
    """The last question of held-out dialogues, what was said before as it should have been."""
    for pictures, kind in enumerate(KINDS):  # none, or one
        for index in range(samples):
            drawn = sample_at("heldout", index, SEED, pictures)
            last = len(drawn.turns) - 1
            yield Item(kind, _asked(f"{kind} {index}", messages(drawn, last)), answer=drawn.turns[last].answer)


def _plain_items(samples: int) -> Iterator[Item]:
    """Paragraphs to read and continue, and pictures to describe."""
    stopping = StoppingParams(max_new_tokens=ANSWER_TOKENS)
    for index, paragraph in enumerate(prose.paragraphs()[:samples]):
        yield Item("text", Request(f"text {index}", parts=(Text(paragraph),), stopping=stopping), reads_prompt=True)
    for index in range(samples):
        picture = png(sample_at("heldout", index, SEED, 1).pictures[0])
        question = OPEN_QUESTIONS[index % len(OPEN_QUESTIONS)]
        yield Item("pictures", _asked(f"pictures {index}", (Message("user", (Image(data=picture), Text(question))),)))


SETS = {
    "demo": Heldout("demo", 64, _demo_items, None),
    "plain": Heldout("plain", 16, _plain_items, prose.joined()),
}
