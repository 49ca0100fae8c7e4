"""Parts of a model that kernels run as a whole, in place of their modules."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from tinychat.layers.parallel import Group
from tinychat_kernels.errors import KernelError


class Sizes(Protocol):
    """The fields of a config that every such part has."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...


class Obstacle(Exception):
    """Why the modules of a part run, and not the kernels."""


@contextmanager
def refused() -> Generator[None, None, None]:
    """What the kernels do not take becomes an Obstacle."""
    try:
        yield
    except KernelError as error:
        raise Obstacle(str(error)) from error


def linears_of(layers: nn.Module, attention: Sequence[str], mlp: Sequence[str]) -> Iterator[Any]:
    """Those of each layer by their names, attention's first."""
    for layer in layers.children():
        for part, names in ((layer.get_submodule("self_attn"), attention), (layer.get_submodule("mlp"), mlp)):
            yield from (getattr(part, name) for name in names)


def is_watched(part: nn.Module) -> bool:
    """Whether hooks want to see what the modules do, or have taken over."""
    return any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in part.modules())


def split(group: Group) -> str | None:
    """What keeps a part that the ranks of a group share from running as a whole: sums within it."""
    return f"{group.size()} ranks share it" if group.size() > 1 else None
