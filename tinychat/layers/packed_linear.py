"""A float linear in 8 bits, as a device's kernels read it: half or a quarter of its memory, and faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from tinychat.errors import UsageError
from tinychat.layers.prepared import Held
from tinychat_kernels import cuda_layout, registry

NAMES = {"cpu": "CPU", "cuda": "GPU"}


class PackedLinear(nn.Module):
    """x `[..., K]` -> `[..., N]`; `read` gives the float weight that was packed, which is not held.

    What is packed may be wider than K and N, by zeros. A state dict has the float weight, and a copy is a float
    linear. It cannot move to another device. `exact`: activations stay float32, on a CPU.
    """

    NAME: ClassVar[str] = "linear"

    def __init__(
        self, packed: Held, read: Callable[[], Tensor], bias: Tensor | None = None, *, exact: bool = False
    ) -> None:
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.in_features, self._wide = sizes(packed)
        self.out_features = self._wide if bias is None else len(bias)
        self.exact = exact
        self._read = read

    @property
    def weight(self) -> Tensor:
        """The float weight `[N, K]`, read again."""
        return self._read()

    def forward(self, x: Tensor) -> Tensor:
        backend = "cuda" if isinstance(self.packed, cuda_layout.Packed) else "cpu"
        if x.device.type != backend:
            message = f"the {self.NAME} is packed for the {NAMES[backend]}, x is on {x.device}"
            raise UsageError(message, "load the model for that device")
        if x.requires_grad and torch.is_grad_enabled():  # kernels keep no gradients
            return linear(x, self.weight.to(x.dtype), self.bias)
        flat = pad(x.reshape(-1, x.shape[-1]), (0, self.in_features - x.shape[-1]))
        exact = {"exact": self.exact} if backend == "cpu" else {}
        out = registry.pick("linear", backend)(flat, self.packed, self._wide_bias(), **exact)
        return out[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def _wide_bias(self) -> Tensor | None:
        return None if self.bias is None else pad(self.bias, (0, self._wide - self.out_features))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits=8, group_size={self.packed.group}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _float_linear, (self.weight.detach().clone(), None if self.bias is None else self.bias.detach().clone())


def sizes(packed: Held) -> tuple[int, int]:
    """Inputs and outputs."""
    if isinstance(packed, cuda_layout.Packed):
        return packed.inputs, packed.outputs
    return packed.in_features, packed.out_features


def _float_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:  # whose type is the model's
        made.weight = nn.Parameter(weight.to(bias.dtype), requires_grad=False)
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made
