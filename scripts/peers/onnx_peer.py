"""ONNX Runtime's MatMulNBits: the linears of a model, asymmetric 4 bit, int8 activations (accuracy level 4).

Options: `group`. The head has 8 bits where the runtime takes them, else 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx  # pyright: ignore[reportMissingImports]
import onnxruntime  # pyright: ignore[reportMissingImports]
from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]

from peers.protocol import Decoder, Facts, Setup, serve, timed

MICROSOFT = "com.microsoft"


class OnnxRuntime:
    """One session of all linears for a token, and one of a single layer for many."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.group = int(setup.options["group"])
        self.draw = np.random.default_rng(0)
        self.whole = self._session(setup.shape.layers, head=True)
        self.layer = self._session(1, head=False)
        self.head = self._session(0, head=True)

    def facts(self) -> Facts:
        a_weight = 0.5 + 4.5 / self.group
        return Facts(
            f"onnxruntime {onnxruntime.__version__}", self.setup.shape.linear_bytes(a_weight, a_weight), ("linears",),
            f"MatMulNBits, groups of {self.group}, accuracy level 4, head in 4 bits",
        )  # fmt: skip

    def run(self, kind: str, tokens: int, depth: int) -> float:
        if tokens == 1:
            return timed(self._call(self.whole, 1), 0.5)
        shape = self.setup.shape
        return shape.layers * timed(self._call(self.layer, tokens), 0.3) + timed(self._call(self.head, 1))

    def _call(self, session: Any, rows: int) -> Any:
        binding = session.io_binding()
        for value in session.get_inputs():
            x = self.draw.standard_normal((rows, value.shape[1]), np.float32)
            binding.bind_ortvalue_input(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
        for value in session.get_outputs():
            out = np.zeros((rows, value.shape[1]), np.float32)
            binding.bind_ortvalue_output(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(out))
        session.run_with_iobinding(binding)
        return lambda: session.run_with_iobinding(binding)

    def _session(self, layers: int, head: bool) -> Any:
        shape: Decoder = self.setup.shape
        linears = [(f"{name}{i}", rows, columns) for i in range(layers) for name, rows, columns in shape.linears]
        linears += [("head", shape.vocab_size, shape.hidden_size)] if head else []
        nodes, weights, outputs = [], [], []
        for name, rows, columns in linears:
            groups = columns // self.group
            packed = self.draw.integers(0, 255, (rows, groups, self.group // 2), np.uint8)
            scales = (self.draw.random(rows * groups, np.float32) * 0.01).astype(np.float32)
            zeros = self.draw.integers(0, 255, rows * ((groups + 1) // 2), np.uint8)
            parts = {f"w{name}": packed, f"s{name}": scales, f"z{name}": zeros}
            weights += [numpy_helper.from_array(value, key) for key, value in parts.items()]
            kind = {"K": columns, "N": rows, "bits": 4, "block_size": self.group, "accuracy_level": 4}
            inputs = [f"x{columns}", *parts]
            nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{name}"], domain=MICROSOFT, **kind))
            outputs.append(helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, ["M", rows]))
        inputs = [
            helper.make_tensor_value_info(f"x{width}", TensorProto.FLOAT, ["M", width])
            for width in sorted({columns for _, _, columns in linears})
        ]
        return self._open(helper.make_graph(nodes, "linears", inputs, outputs, weights))

    def _open(self, graph: Any) -> Any:
        versions = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.setup.threads
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if model.ByteSize() < 2**31 - 1:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        path = f"{self.setup.folder}/onnx-{self.group}.onnx"
        onnx.save(model, path, save_as_external_data=True, location=f"onnx-{self.group}.bin")
        return onnxruntime.InferenceSession(path, options, providers=providers)


if __name__ == "__main__":
    serve(OnnxRuntime)
