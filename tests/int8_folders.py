"""Tiny VILA folders whose vision tower has 8-bit linears: made from a 16-bit one, tensor by tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from make_tiny_model import make_tiny_model
from tinychat_kernels.int8 import quantize_rows

LINEAR = re.compile(r".*encoder\.layers\.\d+\..*(_proj|fc\d)\.weight")
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def w8a8(**changes: Any) -> dict[str, Any]:
    """A tower's quantization_config; changes are those of its only group."""
    group = {"targets": ["Linear"], "weights": W8, "input_activations": A8, **changes}
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}


def set_tower_quantization(folder: Path, value: object) -> None:
    path = folder / "vision_tower" / "config.json"
    raw = json.loads(path.read_text())
    raw.pop("quantization_config", None)
    path.write_text(json.dumps(raw if value is None else {**raw, "quantization_config": value}))


def int8_folder(folder: Path, quantize: int | None = 32, spare: str = "", **shape: Any) -> Path:
    """A VILA folder; linears whose names hold `spare` stay as they were."""
    make_tiny_model(folder, "vila", quantize=quantize, dtype="float16", **shape)
    home = folder / "vision_tower" / "model.safetensors"
    tensors = load_file(home)
    for name in [name for name in tensors if LINEAR.fullmatch(name) and not (spare and spare in name)]:
        packed = quantize_rows(tensors[name])
        tensors |= {name: packed.weight, f"{name}_scale": packed.scale[:, None].clone()}
    save_file(tensors, home)
    set_tower_quantization(folder, w8a8())
    return folder
