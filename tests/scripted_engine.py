"""An engine that says what a test tells it to: the API of tinychat.engine.Engine without a model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tinychat.core import Event, Failed, Finished, FinishReason, Progress, Request, Started, Timings, Token, Usage


@dataclass
class ScriptedEngine:
    """Answers with the scripted texts in order, a piece a token, the last one again and again.

    A script that is a Failed is the answer itself. `delay` seconds pass before each token.
    """

    scripts: list[str | Failed] = field(default_factory=lambda: ["It is a red circle."])
    context: int = 2048
    delay: float = 0.0
    finish_reason: FinishReason = "eos"
    requests: list[Request] = field(default_factory=list)
    cancelled: bool = False

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        for request in requests:
            self.cancelled = False
            script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
            self.requests.append(request)
            if isinstance(script, Failed):
                yield script
            else:
                yield from self._answer(request, script)

    def cancel(self) -> None:
        self.cancelled = True

    def _answer(self, request: Request, script: str) -> Iterator[Event]:
        images = sum(len(message.images) for message in request.messages)
        prompt = 10 * len(request.messages) + 64 * images
        yield Started(request.id, prompt, 64 * images, 0)
        for done in range(images):
            yield Progress(request.id, "images", done, images)
            yield Progress(request.id, "vision", done + 1, images)
        yield Progress(request.id, "prefill", prompt, prompt)
        said: list[str] = []
        for piece in pieces(script):
            if self.cancelled:
                break
            time.sleep(self.delay)
            said.append(piece)
            yield Token(request.id, len(said), piece, -0.1)
        reason = "cancelled" if self.cancelled else self.finish_reason
        yield Finished(
            request.id,
            "".join(said),
            "",
            tuple(range(1, len(said) + 1)),
            reason,
            Usage(prompt, 64 * images, 0, len(said)),
            Timings(vision_s=0.2, prefill_s=0.1, decode_s=0.5, ttft_s=0.3, prefill_tps=200.0, decode_tps=20.0),
            request.sampling.seed,
        )


def pieces(text: str) -> list[str]:
    """The text in parts of three characters, so that words and escape sequences are split."""
    return [text[i : i + 3] for i in range(0, len(text), 3)]
