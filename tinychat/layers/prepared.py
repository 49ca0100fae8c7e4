"""What quantized linears share: their weights held as a checkpoint has them, or as a device's kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tinychat_kernels import cuda_layout
from tinychat_kernels.cpu import Packed

Held = Packed | cuda_layout.Packed  # as the kernels of a CPU read weights, or those of a GPU


class Prepared(nn.Module):
    """A layer whose buffers `FORM`, as on disk, may give way to packed weights.

    A state dict, a copy, and what is cast or moved to another device have the buffers again.
    """

    FORM: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self._prepared: Held | None = None

    @property
    def prepared(self) -> bool:
        """Whether the weights are held as a device's kernels read them."""
        return self._prepared is not None

    def restore(self) -> None:
        """Hold the buffers again."""
        if self.prepared:
            for name, tensor in self._form().items():
                setattr(self, name, tensor)
            self._prepared = None

    def _unpacked(self, packed: Held) -> Mapping[str, Tensor]:
        """The buffers that were packed, bit for bit."""
        raise NotImplementedError

    def _hold(self, packed: Held) -> None:
        self._prepared = packed
        for name in self.FORM:
            setattr(self, name, None)

    def _form(self) -> dict[str, Tensor]:
        """The buffers, unpacked where they are not held."""
        if self._prepared is None:
            return {name: cast("Tensor", getattr(self, name)) for name in self.FORM}
        return dict(self._unpacked(self._prepared))

    def _computes_by(self, x: Tensor) -> str:
        """The backend for these inputs: kernels keep no gradients."""
        if x.requires_grad and torch.is_grad_enabled():
            return "ref"
        if self._prepared is not None:
            return "cuda" if isinstance(self._prepared, cuda_layout.Packed) else "cpu"
        return self._backend_of_form(x)

    def _backend_of_form(self, x: Tensor) -> str:
        """The backend that computes from the buffers as they are."""
        return "ref"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepared:
            destination.update({f"{prefix}{name}": tensor for name, tensor in self._form().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prepared:
        """A cast or a move is for the buffers."""
        if self._prepared is not None:
            device = self._prepared.words.device if isinstance(self._prepared, cuda_layout.Packed) else "cpu"
            before = torch.empty(0, dtype=self._prepared.scale, device=device)
            after = fn(before)
            if (after.dtype, after.device) != (before.dtype, before.device):
                self.restore()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the kernels' memory is aligned, which a copy would not be."""
        state = dict(self.__dict__)
        if self.prepared:
            state["_buffers"] = {**self._buffers, **self._form()}
            state["_prepared"] = None
        return state
