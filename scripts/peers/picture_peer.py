"""Ourselves with a picture: the tower alone, and everything from pixels to the first token.

Options: `checkpoint`, the name of the model's folder; `exact`, `head` and `tower` as the flags of these names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peers.protocol import Facts, Setup, serve, timed, token_ids
from tinychat import __version__, load
from tinychat.engine.prefill import running
from tinychat.placement import Placement


class Picture:
    """A model, and a picture of noise."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        options = {**setup.options, "device": "cpu", "threads": setup.threads}
        source = load.open_source(Path(setup.folder) / options.pop("checkpoint"))
        self.setup = setup
        self.model: Any = load.assemble(source, Placement(**options))
        self.pixels = noise(setup)

    def facts(self) -> Facts:
        held = "in one call, 8 bits" if self.model.vision_tower.one_call else f"by modules, {self.model.dtype}"
        return Facts(f"tinychat {__version__}", None, ("encode", "picture"), f"tower {held}")

    def run(self, kind: str, tokens: int, depth: int) -> float:
        with running():
            return timed(lambda: self.model.vision_tower(self.pixels)) if kind == "encode" else self._answer(tokens)

    def _answer(self, tokens: int) -> float:
        """Seconds from pixels to the first token, behind a picture and so many tokens."""
        assert self.setup.tower is not None
        image = self.setup.tower.image_tokens
        ids = torch.tensor([0] * image + list(token_ids(tokens, self.setup.shape.vocab_size)))
        cache = self.model.make_cache(1, len(ids) + 1)

        def first_token() -> int:
            features = self.model.encode_images(self.pixels)
            return int(self.model.prefill(self.model.embed(ids, [(0, image)], list(features)), cache, 0).argmax())

        return timed(first_token)


def noise(setup: Setup) -> Tensor:
    """Pixels `[1, 3, H, W]`, the same for every program."""
    assert setup.tower is not None
    side = setup.tower.image_size
    return torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    serve(Picture)
