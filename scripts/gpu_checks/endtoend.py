"""Stage endtoend: tokens a second of whole decoders with random weights, beside transformers in float16.

Decoding is what a user gets: a graph of the whole step, the token drawn on the device, one synchronization a token.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch

from gpu_checks import peers
from gpu_checks.decoders import Shape, cache_of, decoder_of, weight_bytes
from gpu_checks.machine import Machine, copy_bandwidth
from gpu_checks.store import Json, Store
from gpu_checks.sweeps import shapes
from tinychat.layers.cuda_decoder import CudaDecoder

STAGE = "endtoend"
DEPTHS = (512, 4096)
PROMPTS = (512, 2048)
TOKENS, DRY_TOKENS = 64, 3
WARM = 4
HEADS = ("int8", "4-bit", "float")
SECONDS, COMPILE_SECONDS = 150.0, 240.0  # of a model, at most


def run(machine: Machine, store: Store) -> None:
    """Every model with an 8-bit head, the largest with other ones, and transformers."""
    copied = store.get(STAGE, "copy", lambda: {"bytes_per_second": copy_bandwidth(machine)})
    for shape in shapes(machine):
        for head in HEADS if shape is shapes(machine)[0] else HEADS[:1]:
            store.get(STAGE, f"{shape.name}, {head} head", partial(ours, machine, copied, shape, head), SECONDS)
            machine.forget()
        eager = partial(peers.eager, machine, shape)
        store.get(STAGE, f"{shape.name}, transformers float16", eager, SECONDS, ours=False)
        machine.forget()
    static = partial(peers.static, machine, shapes(machine)[0])
    store.get(STAGE, f"{shapes(machine)[0].name}, transformers float16 compiled", static, COMPILE_SECONDS, ours=False)


def ours(machine: Machine, copy: Json, shape: Shape, head: str) -> Json:
    """Seconds a token at some depths beside the time that its bytes take to copy, and prompts' tokens a second."""
    decoder = decoder_of(machine, shape, head)
    weights = weight_bytes(decoder)
    found: Json = {"weight_bytes": weights, "decode": [], "prefill": []}
    for rows, depth in ((1, 20), (2, 20)) if machine.dry else ((1, DEPTHS[0]), (1, DEPTHS[1]), (8, DEPTHS[0])):
        seconds = decode(machine, decoder, shape, rows, depth)
        keys = 4 * rows * depth * shape.kv_heads * shape.head_dim * shape.layers
        floor = (weights + keys) / copy["bytes_per_second"]
        row = {"rows": rows, "depth": depth, "seconds": seconds, "tokens_per_second": rows / seconds}
        found["decode"].append({**row, "of_roofline": floor / seconds})
    for length in (20,) if machine.dry else PROMPTS:
        seconds = prefill(machine, decoder, shape, length)
        found["prefill"].append({"tokens": length, "seconds": seconds, "tokens_per_second": length / seconds})
    found["engine"] = _engine(machine, decoder, shape)
    if not machine.dry:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(machine.device)
        torch.cuda.reset_peak_memory_stats(machine.device)
    return found


def _engine(machine: Machine, decoder: CudaDecoder, shape: Shape) -> Json:
    """What the engine makes of it, where the packages that it needs are installed."""
    try:
        from gpu_checks import talking
    except ImportError as error:
        return {"missing": str(error)}
    return talking.answer(machine, decoder, shape)


def decode(machine: Machine, decoder: Any, shape: Shape, rows: int, depth: int) -> float:
    """Seconds of a step after `depth` tokens, the median."""
    count = DRY_TOKENS if machine.dry else TOKENS
    cache = cache_of(machine, shape, rows, depth + count + WARM, depth)
    tokens, spent = list(range(1, rows + 1)), []
    for _ in range(count + WARM):
        begun = time.perf_counter()
        tokens, _ = decoder.draw(tokens, cache, [0.0] * rows, [0.0] * rows)
        spent.append(time.perf_counter() - begun)
        cache.advance(1)
    return statistics.median(spent[WARM:])


def prefill(machine: Machine, decoder: Any, shape: Shape, length: int) -> float:
    """Seconds of a prompt of so many embeddings, in chunks of 512 as the engine has them."""
    cache = cache_of(machine, shape, 1, length)
    embeds = machine.numbers(1, length, shape.hidden)

    def read() -> None:
        at = 0
        for piece in embeds.split(512, dim=1):
            decoder.forward(piece, cache, [at], "last")
            at += piece.shape[1]

    return machine.eager(read)
