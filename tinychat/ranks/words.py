"""What the ranks say to each other: rank 0 speaks, all others listen; a word is a name and its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinychat.tiling import Tiles

Word = tuple[str, tuple[Any, ...]]


def speak(group: Any, name: str, *arguments: Any) -> None:
    """Rank 0 tells the others; tensors go by way of the CPU. Raises RuntimeError where a connection is gone."""
    import torch.distributed as dist

    dist.broadcast_object_list([(name, tuple(map(_on_cpu, arguments)))], src=0, group=group, device=torch.device("cpu"))


def listen(group: Any) -> Word:
    """The next word of rank 0. Raises RuntimeError where the connection is gone."""
    import torch.distributed as dist

    heard: list[Any] = [None]
    dist.broadcast_object_list(heard, src=0, group=group, device=torch.device("cpu"))
    return heard[0]


def leave() -> None:
    """Out of the group, whose threads must not outlive it."""
    import torch.distributed as dist

    dist.destroy_process_group()


def _on_cpu(value: Any) -> Any:
    """A copy that can be pickled, of tensors wherever they are."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Tiles):
        return value.to("cpu")
    return [_on_cpu(one) for one in value] if isinstance(value, list) else value
