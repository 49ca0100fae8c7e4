"""A state dict as one .pt file, written from tensors that are never all in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def write_pickle(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write named tensors as torch.save does. Each is put on disk first and mapped: twice the space, not the memory."""
    with tempfile.TemporaryDirectory(prefix=".tensors-", dir=path.parent) as beside:
        mapped: dict[str, Tensor] = {}
        for name, tensor in tensors:
            file = Path(beside) / str(len(mapped))
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write_bytes(flat.view(torch.uint8).numpy().data)
            again = torch.from_file(str(file), shared=False, size=flat.numel(), dtype=flat.dtype)
            mapped[name] = again.reshape(tensor.shape)
        with path.open("wb") as file:  # whose errors are the system's, unlike those of torch's own files
            torch.save(mapped, file)
        mapped.clear()
