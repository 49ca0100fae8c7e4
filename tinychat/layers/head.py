"""The head of a decoder in 8 bits, for the CPU kernels: a quarter to a half of the bytes that a token reads of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinychat.errors import UsageError
from tinychat_kernels import registry
from tinychat_kernels.cpu import Packed


class PackedHead(nn.Module):
    """hidden `[..., D]` -> logits `[..., V]`; `read` gives the float weight that was packed, which is not held.

    A state dict has that weight, and a copy is a float linear. It cannot move to another device.
    """

    def __init__(self, packed: Packed, read: Callable[[], Tensor], *, exact: bool = False) -> None:
        super().__init__()
        self.packed = packed
        self.exact = exact
        self._read = read

    @property
    def weight(self) -> Tensor:
        """The float weight `[V, D]`, read again."""
        return self._read()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            raise UsageError(f"the head is packed for the CPU, x is on {x.device}", "load the model for that device")
        if x.requires_grad and torch.is_grad_enabled():  # kernels keep no gradients
            return torch.nn.functional.linear(x, self.weight.to(x.dtype))
        flat = x.reshape(-1, self.packed.in_features)
        out = registry.pick("linear", "cpu")(flat, self.packed, exact=self.exact)
        return out.reshape(*x.shape[:-1], self.packed.out_features)

    def extra_repr(self) -> str:
        return f"{self.packed.in_features}, {self.packed.out_features}, bits=8, group_size={self.packed.group}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _float_linear, (self.weight.detach().clone(),)


def _float_linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
