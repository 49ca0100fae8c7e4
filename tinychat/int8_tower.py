"""A vision tower with 8-bit linears on disk: what its own config.json says, and which of its tensors are such.

The form is compressed-tensors' int-quantized: weight int8 `[N, K]`, weight_scale `[N, 1]`, activations by token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tinychat.checkpoint import Index
from tinychat.config import VilaConfig
from tinychat.errors import ModelError

Json = dict[str, Any]

FORMAT = "int-quantized"
PREFIX = "vision_tower."
SCALE = ".weight_scale"
WEIGHTS: Mapping[str, object] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}
ACTIVATIONS: Mapping[str, object] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}
USUAL: Mapping[str, object] = {"type": "int", "symmetric": True, "dynamic": False}  # where a config leaves it out
UNTOLD = "add the quantization_config that belongs to the weights to the tower's config.json"
OTHER = "take a model whose vision tower has 16 bits, or 8 bits by channel and by token"


def quantization(spared: Sequence[str]) -> Json:
    """The quantization_config of a tower; the linears of `spared`, named from its encoder, are in 16 bit."""
    scheme = {"targets": ["Linear"], "weights": dict(WEIGHTS), "input_activations": dict(ACTIVATIONS)}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme, "output_activations": None, "format": FORMAT}},
        "ignore": [*(f"re:.*[.]{name.replace('.', '[.]')}$" for name in spared), "re:(.*[.])?head[.].*"],
        "kv_cache_scheme": None,
    }


def int8_linears(config: VilaConfig, index: Index) -> frozenset[str]:
    """The tower's 8-bit linears; names are those in memory.

    Raises ModelError where its config says nothing of them, or something else than they are, or is not supported.
    """
    found = sorted(name for name in index.names() if name.startswith(PREFIX) and name.endswith(SCALE))
    stems = [name.removesuffix(SCALE) for name in found if f"{name.removesuffix(SCALE)}.weight" in index]
    raw = (config.vision_tower_cfg or {}).get("quantization_config")
    if raw is not None:
        _check(raw)
    elif stems:
        raise ModelError(f"{stems[0]} is quantized, and no quantization_config says how", UNTOLD)
    for stem in stems:
        if (dtype := index.dtype(f"{stem}.weight")) != torch.int8:
            message = f"{stem}.weight is {dtype}, torch.int8 is needed beside its weight_scale"
            raise ModelError(message, "check that config.json and the weights belong together")
    return frozenset(stems)


def swap_int8(model: nn.Module, names: Collection[str]) -> None:
    """Replace linears, by name, by 8-bit ones."""
    from tinychat.layers.int8_linear import Int8Linear

    for name, module in list(model.named_modules()):
        if name in names and isinstance(module, nn.Linear):
            model.set_submodule(name, Int8Linear(module.in_features, module.out_features, module.bias is not None))


def _check(raw: object) -> None:
    """Raises ModelError for a quantization of the tower that is not ours."""
    if not isinstance(raw, Mapping):
        raise ModelError(f"the vision tower's quantization_config is {raw!r}, not an object", "check config.json")
    method, groups = raw.get("quant_method"), list((raw.get("config_groups") or {}).values())
    if method != "compressed-tensors":
        raise ModelError(f"the vision tower is quantized with {method}, which is not supported", OTHER)
    if len(groups) != 1:
        message = f"the vision tower's quantization_config has {len(groups)} config_groups, one is supported"
        raise ModelError(message, OTHER)
    group = groups[0]
    if (kind := group.get("format") or raw.get("format")) != FORMAT:
        raise ModelError(f"the vision tower is quantized as {kind}, which is not supported", OTHER)
    for part, wanted in (("weights", WEIGHTS), ("input_activations", ACTIVATIONS)):
        _check_part(part, group.get(part) or {}, wanted)


def _check_part(part: str, found: Mapping[str, Any], wanted: Mapping[str, object]) -> None:
    for name, value in wanted.items():
        if (given := found.get(name, USUAL.get(name))) != value:
            message = f"{name} of {part} in the vision tower's quantization_config is {given!r}, not {value!r}"
            raise ModelError(message, OTHER)
