"""A linear layer with 4-bit group-wise weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tinychat.layers.prepared import Held, Prepared
from tinychat_kernels import cuda_layout, layout, registry
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
    def packed(self) -> AwqGemm | Held:
        """The weights as they are held now."""
        return self._prepared or self._words()

    def logical(self) -> Logical:
        """(q, scale, zero) as tinychat_kernels.layout defines them."""
        if self._prepared is None:
            return layout.to_logical(self._words(), self.spec)
        return _logical(self._prepared, self.spec)

    def load_logical(self, logical: Logical) -> None:
        """Take over quantized weights; the bias stays."""
        self.qweight, self.qzeros, self.scales = layout.from_logical(logical, self.spec)
        self._prepared = None

    def prepare(self, packed: Held | None = None, *, exact: bool = False) -> None:
        """Hold the weights as the kernels of their device read them, packed before or now.

        `exact`: activations stay float32, on a CPU. Raises LayoutError for weights that the kernels cannot hold,
        BuildError where there are none for the CPU.
        """
        if packed is None:
            from tinychat_kernels import cpu, cuda

            words = self._words()
            packed = (cuda if words.qweight.is_cuda else cpu).pack(words, self.spec)
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
        backend = self._computes_by(x)
        weights = self.packed if self.prepared and backend != "ref" else self._words()
        exact = {"exact": self.exact} if backend == "cpu" else {}
        out = registry.pick("w4_linear", backend)(flat, weights, self.spec, bias, **exact)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{self.in_features}, {self.out_features}, bits={spec.bits}, group_size={spec.group_size}"

    def _words(self) -> AwqGemm:
        return AwqGemm(**self._form())

    def _unpacked(self, packed: Held) -> Mapping[str, Tensor]:
        return layout.from_logical(_logical(packed, self.spec), self.spec)._asdict()

    def _backend_of_form(self, x: Tensor) -> str:
        """autoawq, where it is chosen on a GPU and takes such a linear: its kernels read what lies on disk."""
        if not x.is_cuda or registry.chosen("cuda").name != "autoawq":
            return "ref"
        from tinychat_kernels import autoawq

        return "ref" if autoawq.obstacle(x.dtype, self._words(), self.spec) else "autoawq"


def _logical(packed: Held, spec: QuantSpec) -> Logical:
    if isinstance(packed, cuda_layout.Packed):
        return cuda_layout.unpack(packed, spec)
    from tinychat_kernels import blocks

    return blocks.unpack(packed, spec)
