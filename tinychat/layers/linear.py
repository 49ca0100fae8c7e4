"""A linear layer with 4-bit group-wise weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tinychat.layers.prepared import Prepared
from tinychat_kernels import layout, registry
from tinychat_kernels.cpu import Packed
from tinychat_kernels.layout import AwqGemm, Logical, QuantSpec


class QuantLinear(Prepared):
    """x `[..., K]` -> `[..., N]`; buffers are the AWQ GEMM layout, bit for bit as on disk."""

    FORM = AwqGemm._fields

    def __init__(self, in_features: int, out_features: int, spec: QuantSpec, bias: bool = False) -> None:
        super().__init__()
        spec.check(in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        self.exact = False
        groups = spec.groups(in_features)
        self.register_buffer("qweight", torch.zeros((in_features, out_features // 8), dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros((groups, out_features // 8), dtype=torch.int32))
        self.register_buffer("scales", torch.zeros((groups, out_features)))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @property
    def packed(self) -> AwqGemm | Packed:
        """The weights as they are held now."""
        return self._prepared or self._words()

    def logical(self) -> Logical:
        """(q, scale, zero) as tinychat_kernels.layout defines them."""
        if self._prepared is None:
            return layout.to_logical(self._words(), self.spec)
        from tinychat_kernels import blocks

        return blocks.unpack(self._prepared, self.spec)

    def load_logical(self, logical: Logical) -> None:
        """Take over quantized weights; the bias stays."""
        self.qweight, self.qzeros, self.scales = layout.from_logical(logical, self.spec)
        self._prepared = None

    def prepare(self, packed: Packed | None = None, *, exact: bool = False) -> None:
        """Hold the weights as the CPU kernels read them, packed before or now; `exact`: activations stay float32.

        Raises LayoutError for weights that the kernels cannot hold, BuildError where there are none.
        """
        if packed is None:
            from tinychat_kernels import cpu

            packed = cpu.pack(self._words(), self.spec)
        self._hold(packed)
        self.exact = exact

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: QuantSpec) -> QuantLinear:
        """Round a float linear to the nearest; the scales keep its dtype. Raises LayoutError."""
        out = cls(linear.in_features, linear.out_features, spec, bias=linear.bias is not None)
        out.load_logical(layout.quantize(linear.weight.detach(), spec))
        if linear.bias is not None:
            out.bias = linear.bias.detach().clone()
        return out

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """The float linear that this one stands for: 2 to 4 bytes a weight instead of half a byte."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=dtype)
        linear.weight = nn.Parameter(layout.dequantize(self.logical(), dtype).contiguous(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(cast("Tensor", self.bias).to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        flat, bias = x.reshape(-1, self.in_features), cast("Tensor | None", self.bias)
        registry.asked()  # a wrong name is an error, whatever computes
        if self._computes_by(x) == "ref":
            out = registry.pick("w4_linear", "ref")(flat, self._words(), self.spec, bias)
        else:
            out = registry.pick("w4_linear", "cpu")(flat, self._prepared, self.spec, bias, exact=self.exact)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{self.in_features}, {self.out_features}, bits={spec.bits}, group_size={spec.group_size}"

    def _words(self) -> AwqGemm:
        return AwqGemm(**self._form())

    def _unpacked(self, packed: Packed) -> Mapping[str, Tensor]:
        from tinychat_kernels import blocks

        return layout.from_logical(blocks.unpack(packed, self.spec), self.spec)._asdict()
