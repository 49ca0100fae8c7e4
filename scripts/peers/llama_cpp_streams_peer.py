"""llama.cpp with many sequences in a batch, as the slots of its server are decoded: prompts first, then a token each.

The likeliest token is taken, as its server's greedy sampler does. Options: those of llama_cpp_peer.
"""

from __future__ import annotations

from typing import Any

from peers.llama_cpp_peer import BATCH, LlamaCpp
from peers.protocol import Facts, serve, timed, token_ids

SLOTS = 8
PROMPT = 32


class Slots(LlamaCpp):
    """A model, and a context of eight sequences."""

    def _context_params(self) -> Any:
        params = super()._context_params()
        params.n_seq_max, params.n_ctx, params.kv_unified = SLOTS, SLOTS * self.setup.context, False
        return params

    def facts(self) -> Facts:
        told = super().facts()
        return Facts(told.version, None, ("streams",), told.notes)

    def run(self, kind: str, tokens: int, depth: int) -> float:
        self.lib.llama_memory_clear(self.memory, True)
        return timed(lambda: self._answer(depth, tokens // depth))

    def _answer(self, streams: int, tokens: int) -> None:
        ids = list(token_ids(streams * PROMPT, self.setup.shape.vocab_size))
        prompts = [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(streams)]
        every = [(token, at, slot) for slot, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        newest = self._decode(every, PROMPT)
        for step in range(1, tokens):
            newest = self._decode([(token, PROMPT + step - 1, slot) for slot, token in enumerate(newest)], 1)

    def _decode(self, tokens: list[tuple[int, int, int]], each: int) -> list[int]:
        """(token, position, slot) of all, `each` of a slot -> the likeliest token after the last one of every slot."""
        batch = self.lib.llama_batch_init(max(len(tokens), BATCH), 0, 1)
        last = [i for i in range(len(tokens)) if i % each == each - 1]
        for i, (token, position, slot) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, i % each == each - 1
            batch.seq_id[i][0] = slot
        batch.n_tokens = len(tokens)
        if code := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode answered {code}")
        found = [self._likeliest(i) for i in last]
        self.lib.llama_batch_free(batch)
        return found

    def _likeliest(self, row: int) -> int:
        import numpy

        logits = self.lib.llama_get_logits_ith(self.context, row)
        return int(numpy.ctypeslib.as_array(logits, (self.setup.shape.vocab_size,)).argmax())


if __name__ == "__main__":
    serve(Slots)
