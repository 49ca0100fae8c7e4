"""Results of an AWQ search as llm-awq keeps them in a .pt file, applied to float weights before these are rounded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinychat.checkpoint import rename
from tinychat.errors import FormatError, ModelError, UsageError
from tinychat.weight_files import unpickled
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import QuantSpec

LAYER = re.compile(r"llm\.model\.layers\.(\d+)\.")
LISTED = 5  # layers named in an error
OTHER = "take the search results of this very model"


@dataclass(frozen=True, slots=True)
class SearchResults:
    """`scales`: (what is divided, the linears that are multiplied, one factor an input); `clips`: (linear, bounds).

    Names are those in memory. Bounds are `[N, groups, 1]`.
    """

    scales: tuple[tuple[str, tuple[str, ...], Tensor], ...]
    clips: tuple[tuple[str, Tensor], ...]

    def within(self, prefix: str) -> SearchResults:
        """What belongs to the modules under a prefix, named from there."""
        start = len(prefix)
        scales = [(p[start:], tuple(n[start:] for n in ns), f) for p, ns, f in self.scales if p.startswith(prefix)]
        return SearchResults(tuple(scales), tuple((n[start:], b) for n, b in self.clips if n.startswith(prefix)))


def read_search(path: Path) -> SearchResults:
    """Read a file of llm-awq's: {"scale": [...], "clip": [...]}.

    Raises UsageError where there is no file, FormatError where it is none of these.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}", "give the .pt file that llm-awq's --dump_awq wrote")
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


def check_search(found: SearchResults, model: nn.Module, layers: int, spec: QuantSpec) -> None:
    """Raise ModelError unless every entry fits a model of so many layers, and groups are those of the clips.

    The model may be on the meta device. llm-awq scales in every layer: a layer without is another model's.
    """
    for name, names, factors in found.scales:
        linears = [_linear(model, n) for n in names]
        _check_scale(name, _module(model, name), names, linears, factors)
        _check_layer((name, *names))
    for name, bounds in found.clips:
        _check_clip(name, _linear(model, name), bounds, spec)
        _check_layer((name,))
    there = {int(match[1]) for name, *_ in found.scales if (match := LAYER.match(name))}
    if lost := sorted(set(range(layers)) - there):
        listed = ", ".join(map(str, lost[:LISTED])) + (", ..." if len(lost) > LISTED else "")
        raise ModelError(f"the search results have no scales for {len(lost)} of {layers} layers: {listed}", OTHER)


@torch.no_grad()
def apply_search(found: SearchResults, model: nn.Module) -> None:
    """Scale and then clip a float module in place; what it computes stays but for the clipping."""
    for name, names, factors in found.scales:
        _scale(_module(model, name), [_linear(model, n) for n in names], factors.flatten())
    for name, bounds in found.clips:
        _clip(_linear(model, name).weight, bounds)


def _ours(name: str) -> str:
    return rename(f"{name}.", "llava_hf").removesuffix(".")


def _module(model: nn.Module, name: str) -> Any:
    try:
        module: Any = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the search results name {name}, which the model has not", OTHER) from error
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise ModelError(f"the search results name {name}, which has no float weights", OTHER)
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


def _check_clip(name: str, linear: nn.Linear, bounds: Tensor, spec: QuantSpec) -> None:
    rows, columns = linear.weight.shape
    if bounds.ndim != 3 or bounds.shape[0] != rows or columns % bounds.shape[1] or bounds.shape[2] != 1:
        raise ModelError(f"the search results have bounds {list(bounds.shape)} for {name} of {rows}x{columns}", OTHER)
    if bool((bounds < 0).any()):
        raise ModelError(f"the search results clip {name} at bounds below 0", "search again")
    try:
        wanted = spec.groups(columns)
    except LayoutError as error:
        raise ModelError(f"{name} cannot be quantized: {error}", "choose another group size") from error
    if bounds.shape[1] != wanted:
        group = -1 if bounds.shape[1] == 1 else columns // bounds.shape[1]
        message = f"the search results clip {name} in {bounds.shape[1]} groups a row, {wanted} are asked for"
        raise ModelError(message, f"give --group-size {group}, which they were searched for")


def _check_layer(names: Sequence[str]) -> None:
    """Layers are quantized one at a time."""
    layers = {match[1] if (match := LAYER.match(name)) else None for name in names}
    if None in layers or len(layers) > 1:
        raise ModelError(f"the search results tie {', '.join(names)}, which lie not in one layer", OTHER)


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
