"""OpenVINO's 4-bit linears: u4 weights in groups of 128, decompressed as its own compressed models say it.

Options: `dynamic`, the size of the groups in which activations become int8 (0: they stay floats); `precision`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
from openvino import opset13 as ops  # pyright: ignore[reportMissingImports]

from peers.protocol import Facts, Setup, serve, timed

GROUP = 128


class OpenVino:
    """One model of all linears for a token, and one of a single layer for many."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.draw = np.random.default_rng(0)
        self.kept: list[Any] = []  # the constants share these arrays' memory
        self.core = openvino.Core()
        self.whole = self._compiled(setup.shape.layers, head=True)
        self.layer = self._compiled(1, head=False)
        self.head = self._compiled(0, head=True)

    def facts(self) -> Facts:
        a_weight = 0.5 + 2.5 / GROUP
        dynamic, precision = self.setup.options["dynamic"], self.setup.options["precision"]
        notes = f"u4, groups of {GROUP}, dynamic quantization {dynamic}, {precision}, head in 4 bits"
        shape = self.setup.shape
        return Facts(f"openvino {openvino.__version__}", shape.linear_bytes(a_weight, a_weight), ("linears",), notes)

    def run(self, kind: str, tokens: int, depth: int) -> float:
        if tokens == 1:
            return timed(self._call(self.whole, 1), 0.5)
        shape = self.setup.shape
        return shape.layers * timed(self._call(self.layer, tokens), 0.3) + timed(self._call(self.head, 1))

    def _call(self, compiled: Any, rows: int) -> Any:
        request = compiled.create_infer_request()
        for i, port in enumerate(compiled.inputs):
            width = port.get_partial_shape()[1].get_length()
            x = self.draw.standard_normal((rows, width), np.float32)
            request.set_input_tensor(i, openvino.Tensor(x))
        request.infer()
        return request.infer

    def _compiled(self, layers: int, head: bool) -> Any:
        shape = self.setup.shape
        sizes = [(rows, columns) for _ in range(layers) for _, rows, columns in shape.linears]
        sizes += [(shape.vocab_size, shape.hidden_size)] if head else []
        inputs = {width: ops.parameter([-1, width], np.float32) for width in sorted({c for _, c in sizes})}
        results = [ops.result(self._linear(inputs[columns], rows, columns)) for rows, columns in sizes]
        options = {
            "INFERENCE_NUM_THREADS": self.setup.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(self.setup.options["dynamic"]),
            "INFERENCE_PRECISION_HINT": self.setup.options["precision"],
        }
        return self.core.compile_model(openvino.Model(results, list(inputs.values()), "linears"), "CPU", options)

    def _linear(self, x: Any, rows: int, columns: int) -> Any:
        groups = columns // GROUP
        words = self.draw.integers(0, 255, rows * columns // 2, np.uint8)
        zeros = self.draw.integers(0, 255, rows * groups // 2, np.uint8)
        self.kept += [words, zeros]
        q = openvino.Tensor(words, openvino.Shape([rows, groups, GROUP]), openvino.Type.u4)
        z = openvino.Tensor(zeros, openvino.Shape([rows, groups, 1]), openvino.Type.u4)
        scale = (self.draw.random((rows, groups, 1)) * 0.01).astype(np.float16)
        steps = ops.subtract(ops.convert(ops.constant(q), "f16"), ops.convert(ops.constant(z), "f16"))
        weight = ops.multiply(steps, ops.constant(scale))
        flat = ops.reshape(weight, ops.constant(np.array([rows, columns], np.int64)), False)
        return ops.matmul(x, ops.convert(flat, "f32"), False, True)


if __name__ == "__main__":
    serve(OpenVino)
