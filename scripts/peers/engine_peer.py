"""Our engine, whole: requests in, events out. Kinds of tasks, with `depth` streams that have `tokens` tokens in all:

streams: all at once; after: one after another; stall: the longest wait between two tokens of a stream while a prompt of
`depth` tokens is read; filter, concatenate: of a batch of eight rows with a context of `depth` tokens each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peers.protocol import Facts, Setup, serve, timed
from tinychat import __version__, load
from tinychat.core import Failed, Request, StoppingParams, Text, Token
from tinychat.engine.batch import CausalLMBatch
from tinychat.engine.engine import Engine
from tinychat.engine.rows import Row
from tinychat.inputs.processor import Prompt
from tinychat.placement import Placement
from tinychat_kernels import cpu

ROWS = 8
PROMPT = 32  # tokens of a stream's prompt
SPOKEN = 24  # tokens of a stream before another's prompt comes


class Streams:
    """A model, and an engine of eight rows."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        options = {**setup.options, "device": "cpu", "threads": setup.threads}
        folder = Path(setup.folder) / options.pop("checkpoint")
        ready = load.load_folder(folder, Placement(**options), context=setup.context, rows=ROWS)
        self.setup = setup
        self.engine = Engine(ready.model, ready.processor, context=ready.context, rows=ROWS)
        self.asked = 0

    def facts(self) -> Facts:
        kinds = ("streams", "after", "stall", "filter", "concatenate")
        return Facts(f"tinychat {__version__}", None, kinds, f"backend cpu: {cpu.available()[1]}")

    def run(self, kind: str, tokens: int, depth: int) -> float:
        self.engine.reset()
        return getattr(self, f"_{kind}")(tokens, depth)

    def _streams(self, tokens: int, streams: int) -> float:
        asked = [self._request(PROMPT, tokens // streams) for _ in range(streams)]
        return timed(lambda: self._answer(iter(asked)))

    def _after(self, tokens: int, streams: int) -> float:
        asked = [self._request(PROMPT, tokens // streams) for _ in range(streams)]
        return timed(lambda: [self._answer(iter([one])) for one in asked])

    def _stall(self, tokens: int, depth: int) -> float:
        talking, moments = self._request(PROMPT, 10 * SPOKEN + depth // 8), list[float]()
        long, scheduler = self._request(depth, 2), self.engine.scheduler
        scheduler.submit(talking)
        while scheduler.busy:
            for event in scheduler.step():
                if isinstance(event, Token) and event.request_id == talking.id:
                    moments.append(time.perf_counter())
                if isinstance(event, Token) and event.request_id == long.id:
                    scheduler.drop(talking.id)
            if len(moments) == SPOKEN:
                scheduler.submit(long)
        gaps = [after - before for before, after in zip(moments, moments[1:], strict=False)]
        return max(gaps[SPOKEN:])

    def _filter(self, tokens: int, depth: int) -> float:
        batch = self._batch(range(ROWS), depth)
        return timed(lambda: batch.filter([row.id for row in batch.rows[1:]]), least=0.2)

    def _concatenate(self, tokens: int, depth: int) -> float:
        whole = self._batch(range(ROWS), depth)
        parts = [whole.select([row]) for row in range(ROWS)]
        return timed(lambda: CausalLMBatch.concatenate(parts), least=0.2)

    def _batch(self, rows: range, depth: int) -> CausalLMBatch:
        """Rows of one pool, with so many tokens each."""
        model, reader = self.engine.scheduler.lm.model, self.engine.scheduler.lm.reader
        past: Any = model.make_cache(len(rows), depth + 8)
        past.lengths = [depth - 1] * len(rows)
        prompts = (Prompt(tuple(range(depth))) for _ in rows)
        opened = (Row.open(reader, self._request(1, 4), prompt, depth + 8, model.device) for prompt in prompts)
        return CausalLMBatch(0, tuple(opened), past)

    def _request(self, prompt: int, tokens: int) -> Request:
        """One of its own words, so that nothing of it is in the cache."""
        self.asked += 1
        words, reader = f"{self.asked} " + "word " * prompt, self.engine.scheduler.lm.reader
        count = len(reader(Request("count", parts=(Text(words),))).ids)
        return Request(
            f"r{self.asked}", parts=(Text(words),), truncate=min(prompt, count),
            stopping=StoppingParams(tokens, ignore_eos=True),
        )  # fmt: skip

    def _answer(self, requests: Iterator[Request]) -> None:
        for event in self.engine.run(requests):
            if isinstance(event, Failed):
                raise RuntimeError(event.message)


if __name__ == "__main__":
    serve(Streams)
