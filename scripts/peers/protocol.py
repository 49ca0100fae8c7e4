"""How the benchmark talks with a program: one JSON object a line, an answer for each, over stdin and stdout.

The first object opens the program (`Setup`), its answer is `Facts`; every further one is a task, `{"kind", "tokens",
"depth"}`, and its answer `{"tokens", "seconds"}`. What goes wrong answers `{"error"}`. Runs in any environment: the
standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

Json = dict[str, Any]


@dataclass(frozen=True)
class Decoder:
    """The sizes of a Llama decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def linears(self) -> list[tuple[str, int, int]]:
        """A layer's linears: name, outputs, inputs."""
        wide, inner, kv = self.hidden_size, self.intermediate_size, self.kv_heads * self.head_dim
        return [
            ("q", wide, wide), ("k", kv, wide), ("v", kv, wide), ("o", wide, wide),
            ("gate", inner, wide), ("up", inner, wide), ("down", wide, inner),
        ]  # fmt: skip

    def linear_bytes(self, a_weight: float, head: float) -> int:
        """Bytes of all linears, of so many bytes a weight in the layers and in the head."""
        layer = sum(rows * columns for _, rows, columns in self.linears)
        return round(self.layers * layer * a_weight + self.vocab_size * self.hidden_size * head)


@dataclass(frozen=True)
class Tower:
    """The sizes of a CLIP tower, whose last layer but one goes through two linears to the decoder."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    image_size: int
    patch_size: int

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Setup:
    """What a program is opened with: the decoder's sizes, threads, the most tokens of context, a folder of files that
    are made before, the program's own options, and for tasks with pictures the tower's sizes."""

    shape: Decoder
    threads: int
    context: int
    folder: str
    options: Json = field(default_factory=dict)
    tower: Tower | None = None

    @classmethod
    def of(cls, given: Json) -> Setup:
        """What `asdict` made of one."""
        shape, tower = Decoder(**given.pop("shape")), given.pop("tower")
        return cls(shape, **given, tower=None if tower is None else Tower(**tower))


@dataclass(frozen=True)
class Facts:
    """What a program says of itself; `bytes_per_token` are the weights that a token reads."""

    version: str
    bytes_per_token: int | None
    kinds: tuple[str, ...]
    notes: str = ""


class Program(Protocol):
    """A program that was opened."""

    def facts(self) -> Facts: ...

    def run(self, kind: str, tokens: int, depth: int) -> float:
        """Seconds that the task takes; what the task does not consist of is done outside of them."""
        ...


def serve(open_program: Callable[[Setup], Program]) -> None:
    """Answer until stdin ends. What libraries print to stdout goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    program: Program | None = None
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if program is None:
                program = open_program(Setup.of(asked))
                answer = asdict(program.facts())
            else:
                answer = {"tokens": asked["tokens"], "seconds": program.run(**asked)}
        except Exception as error:  # noqa: BLE001 - any failure of a peer is an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def timed(calls: Callable[[], object], least: float = 0.0) -> float:
    """Seconds a call, of so many calls that they take `least` seconds together."""
    count, started = 0, time.perf_counter()
    while not count or time.perf_counter() - started < least:
        calls()
        count += 1
    return (time.perf_counter() - started) / count


def token_ids(count: int, vocab_size: int) -> Iterator[int]:
    """Tokens of no meaning, the same for every program."""
    state = 1
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        yield state // 2**8 % vocab_size
