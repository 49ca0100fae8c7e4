"""Who is answered when: requests wait, are read in pieces, decoded together, and leave; `step` does a bit of all that.

Nobody's answer stalls: while rows are decoded, a prompt is read in small pieces between their tokens. KV memory is a
pool of rows, counted in tokens; a row that has ended keeps its own until another one needs it, so that what goes on
with the same words reads only what is new.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tinychat.core import Event, Failed, Finished, Generation, Progress, Request, Started, Token, Usage
from tinychat.engine.batch import CausalLMBatch
from tinychat.engine.causal_lm import CHUNK, CausalLM, draw
from tinychat.engine.clock import Clock
from tinychat.engine.prefill import Filling, last_tokens, reads_whole, running
from tinychat.engine.rows import Row
from tinychat.engine.slots import Slot, Slots
from tinychat.errors import CapacityError, TinychatError, UsageError

BETWEEN = 64  # tokens of a prompt that are read between the tokens of others


@dataclass(eq=False)
class Task:
    """A request on its way: with a row once its prompt is made, with a slot while it is read (`filling`) or decoded."""

    request: Request
    order: int
    clock: Clock = field(default_factory=Clock)
    opened: Row | None = None
    slot: Slot | None = None
    filling: Filling | None = None
    cached: int = 0
    read: int = 0
    started: bool = False

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def row(self) -> Row:
        assert self.opened is not None
        return self.opened

    @property
    def rank(self) -> tuple[int, int]:
        """The smallest goes first."""
        return -self.request.priority, self.order

    @property
    def overdue(self) -> bool:
        deadline = self.request.deadline
        return deadline is not None and time.perf_counter() - self.clock.started > deadline

    @property
    def keys(self) -> list[Hashable]:
        """One for each token of the prompt and the answer: equal prefixes have equal KV."""
        return [*self.row.prompt.keys(), *self.row.generated]


class Scheduler:
    """Answers up to `rows` requests together, each within the model's context; up to `queue` more may wait.

    A prompt is read in pieces of `chunk` tokens, of `between` while others are decoded. `kv_tokens` bounds the tokens
    of all rows together (None: what the pool holds): where they do not suffice, the row that matters least waits again,
    and is read anew later. One thread owns it; `cancel` may be called from any.
    """

    def __init__(
        self, lm: CausalLM, *, rows: int = 1, chunk: int = CHUNK, between: int = BETWEEN, queue: int | None = None,
        kv_tokens: int | None = None, load_s: float = 0.0,
    ) -> None:  # fmt: skip
        if min(rows, chunk, between) < 1:
            sizes = f"{rows} rows, chunks of {chunk} and {between} tokens are asked for"
            raise UsageError(sizes, "give 1 or more of each")
        self.lm = lm
        self.rows = rows
        self.chunk = chunk
        self.between = min(between, chunk)
        self.queue = queue
        self.kv_tokens = kv_tokens or rows * lm.context
        self.load_s = load_s
        self.preempted = 0
        self._slots = Slots(rows, lambda: lm.model.make_cache(rows, lm.context))
        self._waiting: list[Task] = []
        self._reading: deque[Task] = deque()
        self._decoding: dict[Any, Task] = {}
        self._batch: CausalLMBatch | None = None
        self._cancelled: set[str] = set()
        self._submitted = 0

    # What comes in.

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn. Raises UsageError for a known id, CapacityError for a full queue."""
        if any(task.id == request.id for task in self._tasks()):
            raise UsageError(f"request {request.id!r} is being answered", "give every request an id of its own")
        if self.queue is not None and self._going + len(self._waiting) >= self.rows + self.queue:
            message = f"{self._going} requests are being answered and {len(self._waiting)} wait already"
            raise CapacityError(message, "try again later")
        self._cancelled.discard(request.id)  # one of before that had this id
        self._submitted += 1
        self._waiting.append(Task(request, self._submitted))

    def cancel(self, request_id: str) -> None:
        """End an answer after its current token; from any thread."""
        self._cancelled.add(request_id)

    def drop(self, request_id: str) -> None:
        """Forget a request, of which no event comes any more; between two steps."""
        for task in [task for task in self._tasks() if task.id == request_id]:
            self._withdraw(task)

    def forget(self) -> None:
        """Empty the rows that nobody uses."""
        self._slots.forget(self._slots.tokens)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._reading or self._decoding)

    @property
    def held_tokens(self) -> int:
        """Tokens in the KV pool, those of ended rows included."""
        return self._slots.tokens + self._used()

    def _tasks(self) -> Iterator[Task]:
        yield from self._waiting
        yield from self._reading
        yield from self._decoding.values()

    # One step.

    def step(self) -> Iterator[Event]:
        """Cut off, take in, read a piece, decode a token each: the events as they come. To be exhausted."""
        yield from self._cut_off()
        yield from self._take_in()
        yield from self._read()
        yield from self._cut_off()
        yield from self._decode()

    def _cut_off(self) -> Iterator[Event]:
        """End what was cancelled, or is overdue."""
        cancelled = set(self._cancelled)
        self._cancelled -= cancelled
        for task in [task for task in self._tasks() if task.id in cancelled or task.overdue]:
            self._withdraw(task)
            if task.started:
                task.row.end("cancelled")
                yield self._finished(task)
            elif task.id in cancelled:
                yield Finished(task.id, "", "", (), "cancelled", Usage(0, 0, 0, 0), self._timings(task, 0, 0), None)
            else:
                deadline = f"its deadline of {task.request.deadline} s passed before it was begun with"
                yield _failed(task, CapacityError(deadline, "give a later one, or send fewer requests at once"))

    def _take_in(self) -> Iterator[Event]:
        """Give rows of the pool to those that wait, the most urgent first."""
        while self._waiting:
            task = min(self._waiting, key=lambda task: task.rank)
            try:
                self._open(task)
                if (slot := self._slot_for(task)) is None:
                    return
                self._begin(task, slot)
            except TinychatError as error:
                self._withdraw(task)
                yield _failed(task, error)
                continue
            if not task.started:
                task.started, task.cached, prompt = True, len(task.keys) - self._left(task), task.row.prompt
                yield Started(task.id, len(prompt.ids), prompt.image_tokens, task.cached)

    def _open(self, task: Task) -> None:
        """Make its prompt and its row, the first time."""
        if task.opened is None:
            prompt, request = self.lm.reader(task.request), task.request
            if request.truncate is not None:
                prompt = last_tokens(prompt, request.truncate)
            if len(prompt.ids) >= self.kv_tokens < self.lm.context:
                held = f"the prompt has {len(prompt.ids)} tokens, all rows together hold {self.kv_tokens}"
                raise CapacityError(held, "use fewer pictures or words, or allow more KV memory")
            context = min(self.lm.context, self.kv_tokens)
            task.opened = Row.open(self.lm.reader, request, prompt, context, self.lm.device)

    def _begin(self, task: Task, slot: Slot) -> None:
        """Read it from where the slot's tokens end; what was answered before it had to wait is read as well."""
        self._waiting.remove(task)
        row, task.slot = task.row, slot
        prompt = replace(row.prompt, ids=tuple(row.ids))
        task.filling = Filling(
            self.lm.model, prompt, slot.cache, row.wants_prompt_logprobs and not row.generated, len(row.prompt.ids)
        )
        self._reading.append(task)

    def _read(self) -> Iterator[Event]:
        """A picture, or pieces of prompts: of those whose turn it is, as many tokens as a step may read."""
        left = self.between if self._decoding else self.chunk
        while self._reading and left > 0 and not self._cancelled:
            task = self._reading[0]
            assert task.filling is not None
            before, sees = task.filling.computed, bool(task.filling.unseen)
            try:
                yield from self._look(task, task.filling) if sees else self._fill(task, task.filling, left)
            except TinychatError as error:
                self._withdraw(task)
                yield _failed(task, error)
                return
            self._reading.rotate(-1 if task in self._reading else 0)  # others have their turn
            left -= left if sees else task.read - before

    def _look(self, task: Task, filling: Filling) -> Iterator[Event]:
        """The next of a prompt's pictures."""
        slots = sum(slot.end > task.cached for slot in filling.prompt.slots)
        done = slots - len(filling.unseen)
        yield Progress(task.id, "images", done, slots)
        if task.id in self._cancelled:
            return
        with task.clock.stage("image"), running():
            pixels = self.lm.pixels(filling.prompt, filling.unseen[0])
        with task.clock.stage("vision"):
            filling.look(pixels)
        yield Progress(task.id, "vision", done + 1, slots)

    def _fill(self, task: Task, filling: Filling, most: int) -> Iterator[Event]:
        """The next piece of a prompt; after the last one its row is decoded with the others."""
        with task.clock.stage("prefill"):
            logits = filling.read(most)
            task.read = filling.computed
        yield Progress(task.id, "prefill", filling.computed, len(filling.prompt.ids))
        if logits is not None and task.id not in self._cancelled:
            yield from self._join(task, filling, logits)

    def _join(self, task: Task, filling: Filling, logits: Tensor) -> Iterator[Event]:
        """Draw the first token of a prompt's answer."""
        new = CausalLMBatch(0, (task.row,), filling.cache)
        prompt = None if filling.logprobs is None else filling.logprobs.values
        made = self.lm.advance(new, draw(new.rows, logits[None]), [prompt])
        batch = new if self._batch is None else CausalLMBatch.concatenate([self._batch, new])
        self._reading.remove(task)
        self._decoding[task.id], self._batch, task.filling = task, batch, None
        if task.slot is not None:
            task.slot.cache = filling.cache.select([])  # the batch alone keeps what was read
        yield from self._deliver(made)

    def _decode(self) -> Iterator[Event]:
        """A token for every row."""
        while self._batch is not None and not self._fits(self._next_tokens(self._batch)):
            self._preempt(self._least())
        if self._batch is None:
            return
        begun, going = time.perf_counter(), [self._decoding[row.id] for row in self._batch.rows]
        try:
            made, _ = self.lm.generate_token(self._batch)
        except TinychatError as error:
            if isinstance(error, CapacityError) and len(going) > 1:
                self._preempt(self._least())  # memory ran out: fewer rows may do
                return
            for task in going:
                self._withdraw(task)
                yield _failed(task, error)
            return
        for task in going:
            task.clock.add("decode", time.perf_counter() - begun)
        yield from self._deliver(made)

    def _deliver(self, made: Sequence[Generation]) -> Iterator[Event]:
        """The events of some rows' tokens; rows that have ended leave the batch."""
        for generation in made:
            task = self._decoding[generation.request_id]
            task.clock.token()
            yield from _tokens(task.row, generation)
        for task in [task for task in self._decoding.values() if task.row.ended]:
            self._withdraw(task)
            yield self._finished(task) if task.row.error is None else _failed(task, task.row.error)

    def _finished(self, task: Task) -> Finished:
        row, answer = task.row, tuple(task.row.generated)
        assert row.reason is not None
        count = len(row.prompt.ids)
        return Finished(
            task.id,
            text="".join(row.text),
            tail=row.tail,
            token_ids=answer,
            finish_reason=row.reason,
            usage=Usage(count, row.prompt.image_tokens, task.cached, len(answer)),
            timings=self._timings(task, count - task.cached, max(len(answer) - 1, 0)),
            seed=row.chooser.seed,
            prompt_logprobs=row.prompt_logprobs,
        )

    def _timings(self, task: Task, prefilled: int, decoded: int) -> Any:
        return task.clock.timings(self.load_s, prefilled, decoded)

    # KV memory.

    def _used(self) -> int:
        """Tokens of the rows that are read or decoded."""
        read = sum(task.filling.computed for task in self._reading if task.filling is not None)
        past = None if self._batch is None else self._batch.past_key_values
        return read + (0 if past is None else sum(past.lengths))

    def _left(self, task: Task) -> int:
        """Tokens of a prompt that are to be read."""
        return 0 if task.filling is None else len(task.filling.prompt.ids) - task.filling.computed

    def _next_tokens(self, batch: CausalLMBatch) -> int:
        """Tokens that a step adds at most."""
        return len(batch) if len(batch) > 1 else 1 + self.lm.speculate

    def _fits(self, more: int) -> bool:
        """Whether so many tokens more fit; what nobody uses makes way for them."""
        over = self.held_tokens + more - self.kv_tokens
        return over <= 0 or self._slots.forget(over) == 0

    def _slot_for(self, task: Task) -> Slot | None:
        """A row of the pool, and memory beside the others: less urgent ones wait again for it. None: not yet."""
        others = [*self._reading, *self._decoding.values()]
        kept = [one for one in others if one.request.priority >= task.request.priority]
        promised = sum(self._held(one) + self._left(one) for one in kept)
        needed = len(task.row.ids) + self.between  # or it would soon have to wait again
        if len(kept) == self.rows or (kept and promised + needed > self.kv_tokens):
            return None
        while not len(self._slots):
            self._preempt(self._least())
        anew = task.row.wants_prompt_logprobs or reads_whole(self.lm.model)
        slot = self._slots.take([] if anew else task.keys[:-1])
        while not self._fits(needed + sum(map(self._left, self._reading))) and self._going > len(kept):
            self._preempt(self._least())
        return slot

    @property
    def _going(self) -> int:
        """Rows that are read or decoded."""
        return len(self._reading) + len(self._decoding)

    def _held(self, task: Task) -> int:
        """Tokens of a row that is read or decoded."""
        return task.filling.computed if task.filling is not None else len(task.row.ids)

    def _least(self) -> Task:
        """The one that matters least of those that are read or decoded."""
        return max((*self._reading, *self._decoding.values()), key=lambda task: task.rank)

    def _preempt(self, task: Task) -> None:
        """Out of the batch, back to those that wait; what it has said is read again with its prompt."""
        self._withdraw(task)
        self._waiting.append(task)
        self.preempted += 1

    def _withdraw(self, task: Task) -> None:
        """Out of where it is. What its row of the pool holds stays there for who goes on with it."""
        if task in self._waiting:
            self._waiting.remove(task)
        if task in self._reading:
            self._reading.remove(task)
        if task.slot is None:
            return
        cache = task.slot.cache
        if self._decoding.pop(task.id, None) is not None and self._batch is not None:
            place = self._batch.requests_idx_mapping[task.row.id]
            cache = self._batch.select([place]).past_key_values or cache
            others = [i for i in range(len(self._batch)) if i != place]
            self._batch = self._batch.select(others) if others else None
        self._slots.give_back(task.slot, cache, task.keys)
        task.slot, task.filling = None, None


def _tokens(row: Row, generation: Generation) -> Iterator[Event]:
    """A Token event for each token but an EOS."""
    made = generation.next_tokens
    columns = (made.ids, made.texts, made.logprobs, made.processed_logprobs, made.top)
    tokens = [Token(generation.request_id, *values) for values in zip(*columns, strict=True)]
    yield from tokens[: len(tokens) - (row.reason == "eos")]


def _failed(task: Task, error: TinychatError) -> Failed:
    return Failed(task.id, error.message, error.remedy, error.exit_code)
