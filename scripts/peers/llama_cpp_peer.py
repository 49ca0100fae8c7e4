"""llama.cpp, by the low-level functions of llama-cpp-python: what its own llama-bench calls, without its sampling.

Options: `file`, a .gguf in the folder; `flash`, whether flash attention is forced on or off (None: as it chooses).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from peers.protocol import Facts, Setup, serve, timed, token_ids

BATCH = 512  # llama-bench's micro batch


class LlamaCpp:
    """A model, and a context of its own that is cut back to the depth asked for."""

    def __init__(self, setup: Setup) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.lib: Any = llama_cpp
        self.setup = setup
        self.path = Path(setup.folder) / setup.options["file"]
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(self.path).encode(), params)
        if not self.model:
            raise RuntimeError(f"{self.path} was not loaded")
        self.context = llama_cpp.llama_init_from_model(self.model, self._context_params())
        if not self.context:
            raise RuntimeError("no context was made")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.filled = 0

    def _context_params(self) -> Any:
        params, setup = self.lib.llama_context_default_params(), self.setup
        params.n_ctx, params.n_batch, params.n_ubatch = setup.context, 4 * BATCH, BATCH
        params.n_threads = params.n_threads_batch = setup.threads
        if (flash := setup.options.get("flash")) is not None:
            params.flash_attn_type = int(flash)
        return params

    def facts(self) -> Facts:
        system = self.lib.llama_print_system_info().decode()
        return Facts(
            f"llama-cpp-python {self.lib.__version__}", streamed_bytes(self.path), ("decode", "prefill"), system.strip()
        )

    def run(self, kind: str, tokens: int, depth: int) -> float:
        self._fill(depth)
        ids = list(token_ids(tokens, self.setup.shape.vocab_size))
        seconds = timed(lambda: self._decode_each(ids) if kind == "decode" else self._feed(ids))
        self._cut(depth)
        return seconds

    def _fill(self, depth: int) -> None:
        if self.filled > depth:
            self._cut(depth)
        if self.filled < depth:
            self._feed(list(token_ids(depth, self.setup.shape.vocab_size))[self.filled :])
        self.filled = depth

    def _cut(self, depth: int) -> None:
        if not self.lib.llama_memory_seq_rm(self.memory, 0, depth, -1):
            raise RuntimeError("the context could not be cut")
        self.filled = depth

    def _decode_each(self, ids: list[int]) -> None:
        for token in ids:
            self._submit([token])

    def _feed(self, ids: list[int]) -> None:
        for start in range(0, len(ids), 4 * BATCH):
            self._submit(ids[start : start + 4 * BATCH])

    def _submit(self, ids: list[int]) -> None:
        """Only the last token's logits are computed, as in llama-bench."""
        array = (ctypes.c_int32 * len(ids))(*ids)
        if code := self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(ids))):
            raise RuntimeError(f"llama_decode answered {code}")
        self.lib.llama_synchronize(self.context)


def streamed_bytes(path: Path) -> int:
    """Bytes of the tensors that a token reads whole: all but the embeddings, which are the head's where it has none."""
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


if __name__ == "__main__":
    serve(LlamaCpp)
