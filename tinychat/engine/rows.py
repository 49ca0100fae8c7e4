"""One sequence of a batch while it is answered: its prompt, what draws and ends it, and what has come of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tinychat.core import FinishReason, GeneratedText, Request
from tinychat.engine.detokenizer import Detokenizer
from tinychat.engine.sampler import Sampler, make_sampler
from tinychat.engine.stopping import Stopping
from tinychat.errors import CapacityError, TinychatError
from tinychat.inputs.processor import Prompt


class Reader(Protocol):
    """What makes a prompt of a request: tinychat.inputs.processor.Processor, or a tokenizer alone."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def stop_ids(self) -> Collection[int]: ...
    @property
    def stop_strings(self) -> Sequence[str]: ...
    def __call__(self, request: Request, /) -> Prompt: ...


@dataclass
class Row:
    """`ids` are the prompt's and the answer's, without its EOS; `words` the prompt's without image placeholders.

    `asked` is what was given: it has the id.

    A row has ended where `reason` is set, or `error`: then it had no token to draw.
    """

    asked: Any
    prompt: Prompt
    chooser: Sampler
    stopping: Stopping
    detokenizer: Detokenizer
    words: list[int]
    adapter: int = 0
    wants_prompt_logprobs: bool = False
    ids: list[int] = field(init=False)
    read: int = field(init=False)
    skipped: int = 0
    prompt_logprobs: tuple[float, ...] = ()
    text: list[str] = field(default_factory=list[str])
    tail: str = ""
    reason: FinishReason | None = None
    error: TinychatError | None = None

    def __post_init__(self) -> None:
        self.ids = list(self.prompt.ids)
        self.read = len(self.ids)

    @classmethod
    def open(cls, reader: Reader, request: Request, prompt: Prompt, context: int, device: torch.device) -> Row:
        """Raises CapacityError where the prompt leaves no room in the context for an answer."""
        room = context - len(prompt.ids)
        if room < 1:
            raise CapacityError(
                f"the prompt has {len(prompt.ids)} tokens, the context holds {context} with an answer",
                "clear or undo some turns, use fewer pictures, or start with a larger --context",
            )
        detokenizer = Detokenizer(reader.tokenizer)
        stopping = Stopping(request.stopping, reader.stop_ids, reader.stop_strings, detokenizer, room)
        words = text_ids(prompt)
        chooser = make_sampler(request.sampling, words, device)
        wants_logprobs = request.sampling.prompt_logprobs
        return cls(request, prompt, chooser, stopping, detokenizer, words, wants_prompt_logprobs=wants_logprobs)

    @property
    def id(self) -> Any:
        return self.asked.id

    @property
    def generated(self) -> list[int]:
        """The answer's tokens."""
        return self.stopping.token_ids

    @property
    def remaining(self) -> int:
        """Tokens that the answer may still have."""
        return self.stopping.limit - len(self.generated)

    @property
    def ended(self) -> bool:
        return self.reason is not None or self.error is not None

    def push(self, token: int) -> str:
        """Take the next token; the text that became certain with it."""
        step = self.stopping.push(token)
        if step.reason != "eos":
            self.ids.append(token)
            self.text.append(step.text)
        if step.text:
            self.read = len(self.ids)
        if step.reason is not None:
            self.end(step.reason)
        return step.text

    def end(self, reason: FinishReason) -> None:
        """No token comes any more; what was held back of the text is its tail."""
        last = self.stopping.finish(reason)
        self.tail, self.reason = last.text, last.reason or reason
        self.text.append(last.text)
        self.read = len(self.ids)

    def finished(self) -> GeneratedText | None:
        """The whole answer, once it has ended."""
        if self.reason is None:
            return None
        return GeneratedText("".join(self.text), len(self.generated), self.skipped, self.reason, self.chooser.seed)


def text_ids(prompt: Prompt) -> list[int]:
    """The prompt's ids without image placeholders."""
    inside = {i for slot in prompt.slots for i in range(slot.start, slot.end)}
    return [token for i, token in enumerate(prompt.ids) if i not in inside]
