"""torch's own linears: bfloat16, int8 with dynamic activations, or 4 bit in groups of 128. Options: `kind`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peers.protocol import Facts, Setup, serve, timed

Linear = Callable[[Tensor], Tensor]
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 128}
INPUT = {"bf16": torch.bfloat16, "int8": torch.float32, "int4": torch.bfloat16}


def bf16(rows: int, columns: int) -> Linear:
    weight = torch.randn(rows, columns).bfloat16()
    return lambda x: nn.functional.linear(x, weight)


def int8(rows: int, columns: int) -> Linear:
    """Deprecated there, and still the fastest int8 that torch has."""
    plain = nn.Sequential(nn.Linear(columns, rows, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)


def int4(rows: int, columns: int) -> Linear:
    words = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(words, 1)
    scales = torch.rand(columns // 128, rows, 2).bfloat16() * 0.01
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales)


KINDS: dict[str, Callable[[int, int], Linear]] = {"bf16": bf16, "int8": int8, "int4": int4}


class TorchLinears:
    """All linears of a model, each with weights of its own."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        torch.manual_seed(0)
        self.setup, self.kind = setup, setup.options["kind"]
        make, shape = KINDS[self.kind], setup.shape
        self.layers = [[(make(r, c), c) for _, r, c in shape.linears] for _ in range(shape.layers)]
        self.head = (make(shape.vocab_size, shape.hidden_size), shape.hidden_size)

    def facts(self) -> Facts:
        size = BYTES[self.kind]
        return Facts(f"torch {torch.__version__}", self.setup.shape.linear_bytes(size, size), ("linears",))

    @torch.inference_mode()
    def run(self, kind: str, tokens: int, depth: int) -> float:
        shape = self.setup.shape
        inputs = {width: self._input(tokens, width) for width in (shape.hidden_size, shape.intermediate_size)}
        last = self._input(1, shape.hidden_size)

        def layers(some: list[list[tuple[Linear, int]]]) -> None:
            for layer in some:
                for linear, width in layer:
                    linear(inputs[width])

        layers(self.layers[:1])
        if tokens > 1:
            return shape.layers * timed(lambda: layers(self.layers[:1]), 0.3) + timed(lambda: self.head[0](last))
        return timed(lambda: (layers(self.layers), self.head[0](last)), 0.5)

    def _input(self, rows: int, width: int) -> Tensor:
        return torch.randn(rows, width).to(INPUT[self.kind])


if __name__ == "__main__":
    serve(TorchLinears)
