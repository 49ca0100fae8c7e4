"""Results of an AWQ search as llm-awq keeps them in a .pt file, applied to float weights before these are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinychat.checkpoint import rename
from tinychat.errors import FormatError, ModelError
from tinychat.weight_files import unpickled

OTHER = "take the search results of this very model"


@dataclass(frozen=True, slots=True)
class SearchResults:
    """`scales`: (what is divided, the linears that are multiplied, one factor an input); `clips`: (linear, bounds).

    Names are those in memory. Bounds are `[N, groups, 1]`.
    """

    scales: tuple[tuple[str, tuple[str, ...], Tensor], ...]
    clips: tuple[tuple[str, Tensor], ...]


def read_search(path: Path) -> SearchResults:
    """Read a file of llm-awq's: {"scale": [...], "clip": [...]}. Raises FormatError where it is none."""
    content = unpickled(path)
    try:
        scales = [(_ours(prev), tuple(map(_ours, names)), factors) for prev, names, factors in content["scale"]]
        clips = [(_ours(name), bounds) for name, bounds in content["clip"]]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        message = f"{path} holds no search results of llm-awq: a dict of the lists scale and clip ({error!r:.100})"
        raise FormatError(message, "give the .pt file that its --dump_awq wrote") from error
    tensors = [*(factors for *_, factors in scales), *(bounds for _, bounds in clips)]
    if not all(isinstance(tensor, Tensor) and bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise FormatError(f"{path} holds factors that are no finite tensors", "search again")
    return SearchResults(tuple(scales), tuple(clips))


def apply_search(model: nn.Module, path: Path) -> SearchResults:
    """Scale and clip a float model in place as the file says; what it computes stays but for the clipping.

    Raises FormatError for a file that is none, ModelError, before anything is changed, where it is another model's.
    """
    found = read_search(path)
    scaled = [(_module(model, prev), [_linear(model, n) for n in names], f) for prev, names, f in found.scales]
    clipped = [(_linear(model, name), bounds) for name, bounds in found.clips]
    for (name, names, _), (module, linears, factors) in zip(found.scales, scaled, strict=True):
        _check_scale(name, module, names, linears, factors)
    for (name, _), (linear, bounds) in zip(found.clips, clipped, strict=True):
        _check_clip(name, linear, bounds)
    with torch.no_grad():
        for module, linears, factors in scaled:
            _scale(module, linears, factors.flatten())
        for linear, bounds in clipped:
            _clip(linear.weight, bounds)
    return found


def _ours(name: str) -> str:
    return rename(f"{name}.", "llava_hf").removesuffix(".")


def _module(model: nn.Module, name: str) -> Any:
    try:
        module: Any = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the search results name {name}, which the model has not", OTHER) from error
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise ModelError(f"the search results name {name}, which has no float weights", "give the 16-bit model")
    return module


def _linear(model: nn.Module, name: str) -> nn.Linear:
    if not isinstance(module := _module(model, name), nn.Linear):
        raise ModelError(f"the search results name {name}, which is no linear layer", OTHER)
    return module


def _check_scale(name: str, module: Any, names: Sequence[str], linears: Sequence[nn.Linear], factors: Tensor) -> None:
    count = factors.numel()
    sizes = {name: module.weight.shape[0], **{n: linear.in_features for n, linear in zip(names, linears, strict=True)}}
    if wrong := [f"{n} has {size}" for n, size in sizes.items() if size != count]:
        raise ModelError(f"the search results have {count} factors for {name}, {wrong[0]}", OTHER)
    if not bool((factors != 0).all()):
        raise ModelError(f"the search results divide {name} by 0", "search again")


def _check_clip(name: str, linear: nn.Linear, bounds: Tensor) -> None:
    rows, columns = linear.weight.shape
    if bounds.ndim != 3 or bounds.shape[0] != rows or columns % bounds.shape[1] or bounds.shape[2] != 1:
        raise ModelError(f"the search results have bounds {list(bounds.shape)} for {name} of {rows}x{columns}", OTHER)


def _scale(module: Any, linears: Sequence[nn.Linear], factors: Tensor) -> None:
    inputs = factors.to(module.weight.device, module.weight.dtype)
    module.weight.div_(inputs if module.weight.ndim == 1 else inputs[:, None])
    if getattr(module, "bias", None) is not None:
        module.bias.div_(inputs)
    for linear in linears:
        linear.weight.mul_(factors.to(linear.weight.device, linear.weight.dtype))


def _clip(weight: Tensor, bounds: Tensor) -> None:
    bounds = bounds.to(weight.device, weight.dtype)
    groups = weight.reshape(*bounds.shape[:2], -1)
    weight.copy_(groups.clamp(-bounds, bounds).reshape(weight.shape))
