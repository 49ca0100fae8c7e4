"""Where a request's time goes."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tinychat.core import Timings


@dataclass
class Clock:
    """Seconds spent in each stage of a request, from when it was begun with."""

    started: float = field(default_factory=time.perf_counter)
    spent: dict[str, float] = field(default_factory=dict[str, float])
    first_token: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Generator[None, None, None]:
        """Add the time inside the block to a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begun)

    def add(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    def token(self) -> None:
        """Note when the first token came."""
        self.first_token = self.first_token or time.perf_counter() - self.started

    def timings(self, load_s: float, prefilled: int, decoded: int) -> Timings:
        """The split, with tokens a second; `decoded` counts the tokens after the first."""
        image, vision, prefill, decode = (
            self.spent.get(name, 0.0) for name in ("image", "vision", "prefill", "decode")
        )
        return Timings(
            load_s=load_s,
            image_s=image,
            vision_s=vision,
            prefill_s=prefill,
            decode_s=decode,
            ttft_s=self.first_token,
            prefill_tps=prefilled / prefill if prefill else 0.0,
            decode_tps=decoded / decode if decode else 0.0,
        )
