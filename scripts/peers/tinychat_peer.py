"""Ourselves, as the engine runs a model: `prefill` and `decode` of the one that the loader makes of a folder.

Options: `checkpoint`, the name of the model's folder; `exact` and `head` as --exact and --head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peers.protocol import Facts, Setup, serve, timed, token_ids
from tinychat import __version__, load
from tinychat.engine.engine import CHUNK
from tinychat.engine.prefill import running
from tinychat.layers.head import PackedHead
from tinychat.layers.linear import QuantLinear
from tinychat.placement import Placement
from tinychat_kernels import registry
from tinychat_kernels.cpu import Packed

ROWS = 4


class Tinychat:
    """A model, and a cache that is cut back to the depth asked for."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self.setup = setup
        source = load.open_source(Path(setup.folder) / setup.options["checkpoint"])
        exact, head = bool(setup.options.get("exact")), setup.options.get("head", "int8")
        placement = Placement(device="cpu", exact=exact, head=head, threads=setup.threads)
        self.model: Any = load.assemble(source, placement)
        self.cache: Any = self.model.make_cache(1, setup.context)
        with running():
            ids = torch.tensor(list(token_ids(setup.context, setup.shape.vocab_size)))
            self.embeds = self.model.embed(ids, (), ())

    def facts(self) -> Facts:
        tensors = [*self.model.llm.named_parameters(), *self.model.llm.named_buffers()]
        read = sum(tensor.nbytes for name, tensor in tensors if "embed_tokens" not in name)
        packed = [module.packed for module in self.model.modules() if isinstance(module, QuantLinear | PackedHead)]
        read += sum(one.blocks.nbytes for one in packed if isinstance(one, Packed))
        head = "8-bit head" if isinstance(self.model.llm.lm_head, PackedHead) else "float head"
        backend = registry.chosen()
        notes = f"backend {backend.name}: {backend.reason}; {head}"
        return Facts(f"tinychat {__version__}", read, ("decode", "prefill", "linears", "rows"), notes)

    def run(self, kind: str, tokens: int, depth: int) -> float:
        with running():
            return getattr(self, f"_{kind}")(tokens, depth)

    def _decode(self, tokens: int, depth: int) -> float:
        self._fill(depth)
        steps = [torch.tensor([[token]]) for token in token_ids(tokens, self.setup.shape.vocab_size)]
        return timed(lambda: [self.model.decode(step, self.cache) for step in steps])

    def _prefill(self, tokens: int, depth: int) -> float:
        self._fill(depth)
        return timed(lambda: self._feed(depth, depth + tokens))

    def _rows(self, tokens: int, depth: int) -> float:
        """`tokens` tokens in all, of four sequences that are decoded together."""
        ids = list(token_ids(tokens, self.setup.shape.vocab_size))
        steps = torch.tensor(ids[: tokens // ROWS * ROWS]).view(-1, ROWS, 1)
        cache = self.model.make_cache(ROWS, len(steps))
        return timed(lambda: [self.model.decode(step, cache) for step in steps])

    def _linears(self, tokens: int, depth: int) -> float:
        """Every linear of the decoder once, for so many tokens; the head for one."""
        shape = self.setup.shape
        inputs = {width: torch.randn(tokens, width) for width in (shape.hidden_size, shape.intermediate_size)}
        linears = [m for m in self.model.llm.model.modules() if isinstance(m, QuantLinear)]
        last = inputs[shape.hidden_size][:1]
        return timed(lambda: ([m(inputs[m.in_features]) for m in linears], self.model.llm.logits(last)), 0.5)

    def _fill(self, depth: int) -> None:
        self.cache.truncate(min(depth, self.cache.lengths[0]))
        self._feed(self.cache.lengths[0], depth)

    def _feed(self, start: int, end: int) -> None:
        """In the engine's chunks."""
        for at in range(start, end, CHUNK):
            self.model.prefill(self.embeds[:, at : min(at + CHUNK, end)], self.cache, self.cache.lengths[0])


if __name__ == "__main__":
    serve(Tinychat)
