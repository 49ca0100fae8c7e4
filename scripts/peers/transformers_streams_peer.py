"""transformers' generate with a padded batch, of random bfloat16 weights."""

from __future__ import annotations

import torch

from peers.protocol import Facts, serve, timed, token_ids
from peers.transformers_peer import Transformers

PROMPT = 32


class Padded(Transformers):
    """A model that answers a batch."""

    def facts(self) -> Facts:
        told = super().facts()
        return Facts(told.version, None, ("streams",), told.notes)

    @torch.inference_mode()
    def run(self, kind: str, tokens: int, depth: int) -> float:
        ids = torch.tensor(list(token_ids(depth * PROMPT, self.setup.shape.vocab_size))).view(depth, PROMPT)
        count = tokens // depth
        return timed(
            lambda: self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
            )  # fmt: skip
        )


if __name__ == "__main__":
    serve(Padded)
