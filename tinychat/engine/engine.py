"""The engine: requests in, events out. `Scheduler.step` is the life of them all, a step at a time.

Rows of the KV cache outlive their requests: the next prompt re-uses the longest prefix that one of them shares with it,
pictures included, so a conversation's turn computes only what is new, and taking turns back costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tinychat.core import Event, Failed, Finished, Request
from tinychat.engine.causal_lm import CausalLM
from tinychat.engine.scheduler import CHUNK, Scheduler
from tinychat.errors import TinychatError, UsageError

CONTEXT = 4096


class Engine:
    """Answers requests with a model and its processor, up to `rows` together.

    `context` tokens hold a prompt and its answer; a prompt is read in pieces of `chunk` tokens, of fewer while others
    are answered; `kv_tokens` bounds what all rows hold; `speculate` tokens are guessed for one alone.
    """

    def __init__(
        self, model: Any, processor: Any, *, context: int | None = None, chunk: int = CHUNK, load_s: float = 0.0,
        rows: int = 1, kv_tokens: int | None = None, speculate: int = 0,
    ) -> None:  # fmt: skip
        self.context = context or min(processor.config.text.max_position_embeddings, CONTEXT)
        self.model = model
        self.processor = processor
        lm = CausalLM.from_model(model, processor, self.context)
        lm.speculate = speculate
        self.scheduler = Scheduler(lm, rows=rows, chunk=chunk, kv_tokens=kv_tokens, load_s=load_s)
        self._going: set[str] = set()
        self._cancelled = False

    @property
    def cached_tokens(self) -> int:
        """Tokens in the KV cache now."""
        return self.scheduler.held_tokens

    def reset(self) -> None:
        """Forget the cached conversations."""
        self.scheduler.forget()

    def cancel(self) -> None:
        """End the running answers after their current token; safe from a signal handler or another thread."""
        going = tuple(self._going)
        self._cancelled = not going
        for request_id in going:
            self.scheduler.cancel(request_id)

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Answer the requests, taken as there is room for them. One that fails yields Failed; the others go on.

        With one row the answers come in order; with more their events are mixed. `cancel` counts from this call on,
        even before the first event is asked for.
        """
        self._cancelled = False
        return self._run(iter(requests))

    def _run(self, requests: Iterator[Request]) -> Iterator[Event]:
        if self._going:
            raise UsageError("the engine is answering already", "read that to its end, or close it")
        try:
            while True:
                yield from self._submit(requests)
                if not self._going:
                    return
                for event in self.scheduler.step():
                    if isinstance(event, Finished | Failed):
                        self._going.discard(event.request_id)
                    yield event
        finally:
            left, self._going = self._going, set()
            for request_id in left:
                self.scheduler.drop(request_id)

    def _submit(self, requests: Iterator[Request]) -> Iterator[Event]:
        """Hand in as many as there are rows."""
        while len(self._going) < self.scheduler.rows and (request := next(requests, None)) is not None:
            try:
                self.scheduler.submit(request)
            except TinychatError as error:
                yield Failed(request.id, error.message, error.remedy, error.exit_code)
                continue
            self._going.add(request.id)
            if self._cancelled:
                self._cancelled = False
                self.scheduler.cancel(request.id)
