"""A 16-bit vision tower and its projector in 8 bits for the CPU kernels: which linears, and how they are rounded."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinychat.checkpoint import Index
from tinychat.errors import ModelError
from tinychat_kernels.errors import LayoutError

if TYPE_CHECKING:
    from tinychat.load import Source
    from tinychat_kernels.cpu import Packed

HALF = (torch.float16, torch.bfloat16)
WEIGHT = ".weight"
TOWER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.weight")
PROJECTOR = re.compile(r"mm_projector\.layers\.(\d+)\.weight")
SIDE_BY_SIDE = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
UP, DOWN = "fc1", "fc2"


def packed_sizes(source: Source) -> dict[str, int]:
    """Bytes of each linear that is rounded, in the order in which they lie. Needs the kernels.

    A tower that has 8 bits on disk stays as it is, and so do weights of 32 bits.
    """
    from tinychat_kernels import cpu_tower

    return {name: cpu_tower.linear_size(*_shape(source.index, name)) for name in _in_order(source)}


def is_ours(name: str) -> bool:
    """Whether the linear of this name, among packed ones, is rounded here."""
    return not name.startswith("llm.")


def packed(index: Index, name: str, memory: Tensor) -> Packed:
    """One of the linears, rounded into its memory. Raises ModelError for NaN and Inf."""
    from tinychat_kernels import cpu_tower

    try:
        return cpu_tower.round_linear(index.get(f"{name}{WEIGHT}"), *_shape(index, name), memory)
    except LayoutError as error:
        raise ModelError(f"{name}: {error}", "check the weights, or keep them with --tower float") from error


def hand_over(model: nn.Module, index: Index, found: Mapping[str, Packed]) -> None:
    """Put packed linears in the place of a model's empty ones; those have their bias already."""
    from tinychat.layers.packed_linear import PackedLinear

    for name, packed in found.items():
        empty: Any = model.get_submodule(name)
        read: Callable[[], Tensor] = functools.partial(index.get, f"{name}{WEIGHT}")
        model.set_submodule(name, PackedLinear(packed, read, empty.bias))


def _in_order(source: Source) -> list[str]:
    index, vision = source.index, source.config.vision
    if vision is None:
        return []
    found = {name: match for name in index.names() if (match := TOWER.fullmatch(name)) and not source.int8}
    tower = sorted(found, key=lambda name: (int(found[name][1]), SIDE_BY_SIDE.index(found[name][2])))
    projector = sorted(name for name in index.names() if PROJECTOR.fullmatch(name) and len(index.shape(name)) == 2)
    return [name.removesuffix(WEIGHT) for name in (*tower, *projector) if index.dtype(name) in HALF]


def _shape(index: Index, name: str) -> tuple[int, int]:
    """Inputs and outputs of a packed linear: between those of an MLP there may be more than on disk."""
    from tinychat_kernels import cpu_tower

    outputs, inputs = index.shape(f"{name}{WEIGHT}")
    last = name.rpartition(".")[2]
    return (
        cpu_tower.widened(inputs) if last == DOWN else inputs,
        cpu_tower.widened(outputs) if last == UP else outputs,
    )
