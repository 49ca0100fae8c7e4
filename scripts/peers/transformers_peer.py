"""transformers' Llama: of random bfloat16 weights, or, with the option `checkpoint`, a 4-bit folder by GPTQModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from peers.protocol import Facts, Setup, serve, timed, token_ids


class Transformers:
    """A model, and a cache that is cut back to the depth asked for."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        torch.manual_seed(0)
        self.setup = setup
        self.model: Any = self._quantized() if "checkpoint" in setup.options else self._random()
        self.model.eval()
        self.cache: Any = None
        self.filled = 0

    def _random(self) -> Any:
        shape = self.setup.shape
        config = transformers.LlamaConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=16384,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        try:
            return transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)

    def _quantized(self) -> Any:
        folder = Path(self.setup.folder) / self.setup.options["checkpoint"]
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")

    def facts(self) -> Facts:
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        read = sum(tensor.nbytes for name, tensor in tensors if "embed_tokens" not in name)
        version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        linears = {type(module).__name__ for module in self.model.modules() if "Linear" in type(module).__name__}
        return Facts(version, read, ("decode", "prefill"), f"linears: {', '.join(sorted(linears))}")

    @torch.inference_mode()
    def run(self, kind: str, tokens: int, depth: int) -> float:
        self._fill(depth)
        ids = torch.tensor([list(token_ids(tokens, self.setup.shape.vocab_size))])
        steps = ids.split(1, dim=1) if kind == "decode" else (ids,)
        seconds = timed(lambda: [self._feed(step) for step in steps])
        self._cut(depth)
        return seconds

    def _feed(self, ids: torch.Tensor) -> None:
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values

    def _fill(self, depth: int) -> None:
        if self.filled > depth:
            self._cut(depth)
        if self.filled < depth:
            ids = list(token_ids(depth, self.setup.shape.vocab_size))[self.filled :]
            for piece in torch.tensor([ids]).split(512, dim=1):
                self._feed(piece)
        self.filled = depth

    def _cut(self, depth: int) -> None:
        """A cache of none is a new one: `crop` differs between versions."""
        if depth:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :depth], layer.values[:, :, :depth]
        else:
            self.cache = None
        self.filled = depth


if __name__ == "__main__":
    serve(Transformers)
