"""A linear layer with 8-bit weights, whose inputs are rounded to 8 bits as they come."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tinychat.layers.prepared import Held, Prepared
from tinychat_kernels import registry
from tinychat_kernels.cpu import Packed
from tinychat_kernels.int8 import Int8, dequantize_rows, quantize_rows


class Int8Linear(Prepared):
    """x `[..., K]` -> `[..., N]`; the buffers are compressed-tensors' int-quantized ones, bit for bit as on disk."""

    FORM = ("weight", "weight_scale")

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.zeros((out_features, in_features), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros((out_features, 1)))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @property
    def packed(self) -> Int8:
        """The weights as on disk."""
        weight, scale = self._form().values()
        return Int8(weight, scale[:, 0])

    def load_packed(self, packed: Int8) -> None:
        """Take over quantized weights; the bias stays."""
        self.weight, self.weight_scale = packed.weight, packed.scale[:, None]
        self._prepared = None

    @property
    def held(self) -> Packed | None:
        """The weights as the CPU kernels read them, where they are held so."""
        held = self._prepared
        assert held is None or isinstance(held, Packed)
        return held

    def prepare(self, packed: Packed | None = None) -> None:
        """Hold the weights as the CPU kernels read them, packed before or now. Raises BuildError without kernels."""
        from tinychat_kernels import cpu

        if packed is not None:
            self._hold(packed)
        elif not self.prepared:
            self._hold(cpu.pack_int8(self.packed))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Round a float linear to the nearest. Raises LayoutError for NaN and Inf."""
        out = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        out.load_packed(quantize_rows(linear.weight.detach()))
        if linear.bias is not None:
            out.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return out

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """The float linear that this one stands for: 2 to 4 bytes a weight instead of one."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=dtype)
        linear.weight = nn.Parameter(dequantize_rows(self.packed, dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        registry.asked()  # a wrong name is an error, whatever computes
        flat = x.reshape(-1, self.in_features)
        backend = self._computes_by(x)
        weights = self._prepared if backend == "cpu" else self.packed
        out = registry.pick("w8a8_linear", backend)(flat, weights, self.bias)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _backend_of_form(self, x: Tensor) -> str:
        """The CUDA kernels, where they run: they read the weights as they lie on disk."""
        return "cuda" if x.is_cuda and _on_kernels(x.device, registry.asked()) else "ref"

    def _unpacked(self, packed: Held) -> Mapping[str, Tensor]:
        from tinychat_kernels import blocks

        assert isinstance(packed, Packed)
        return dict(zip(self.FORM, blocks.unpack_int8(packed), strict=True))


@functools.cache
def _on_kernels(device: torch.device, asked: str | None) -> bool:
    """Whether the CUDA kernels run on a GPU, with this TINYCHAT_BACKEND: asked once."""
    from tinychat_kernels.cuda_gpu import current

    with current(device):
        return registry.chosen("cuda").name == "cuda"
