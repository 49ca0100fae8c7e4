"""A linear layer with 4-bit group-wise weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tinychat_kernels import layout, registry
from tinychat_kernels.layout import AwqGemm, Logical, QuantSpec


class QuantLinear(nn.Module):
    """x `[..., K]` -> `[..., N]`; buffers are the AWQ GEMM layout, bit for bit as on disk."""

    def __init__(self, in_features: int, out_features: int, spec: QuantSpec, bias: bool = False) -> None:
        super().__init__()
        spec.check(in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        groups = spec.groups(in_features)
        self.register_buffer("qweight", torch.zeros((in_features, out_features // 8), dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros((groups, out_features // 8), dtype=torch.int32))
        self.register_buffer("scales", torch.zeros((groups, out_features)))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @property
    def packed(self) -> AwqGemm:
        return AwqGemm(cast("Tensor", self.qweight), cast("Tensor", self.qzeros), cast("Tensor", self.scales))

    def logical(self) -> Logical:
        """(q, scale, zero) as tinychat_kernels.layout defines them."""
        return layout.to_logical(self.packed, self.spec)

    def load_logical(self, logical: Logical) -> None:
        """Take over quantized weights; the bias stays."""
        self.qweight, self.qzeros, self.scales = layout.from_logical(logical, self.spec)

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
        flat = x.reshape(-1, self.in_features)
        out = registry.pick("w4_linear")(flat, self.packed, self.spec, cast("Tensor | None", self.bias))
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{self.in_features}, {self.out_features}, bits={spec.bits}, group_size={spec.group_size}"
