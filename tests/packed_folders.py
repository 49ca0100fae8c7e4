"""Tiny 4-bit models in every format that is read: made from an AWQ GEMM folder, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from make_tiny_model import make_tiny_model
from tinychat_kernels import formats
from tinychat_kernels.formats import Format
from tinychat_kernels.layout import AwqGemm, QuantSpec, to_logical

PARTS = ("qweight", "qzeros", "scales")


def awq(version: str, spec: QuantSpec) -> dict[str, Any]:
    group = {"bits": 4, "group_size": spec.group_size, "zero_point": spec.zero_point}
    return {"quant_method": "awq", "version": version, **group}


def gptq(version: str, spec: QuantSpec) -> dict[str, Any]:
    fields = {"bits": 4, "group_size": spec.group_size, "desc_act": False, "sym": not spec.zero_point}
    return {"quant_method": "gptq", "checkpoint_format": version, **fields}


def compressed(spec: QuantSpec) -> dict[str, Any]:
    fields = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": spec.group_size}
    scheme = {"targets": ["Linear"], "weights": {**fields, "symmetric": not spec.zero_point}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": scheme}}


CONFIGS = {  # format -> its quantization_config
    formats.GEMM: lambda spec: awq("gemm", spec),
    formats.GEMV: lambda spec: awq("gemv", spec),
    formats.GEMV_FAST: lambda spec: awq("gemv_fast", spec),
    formats.LLM_AWQ_V2: lambda spec: awq("llm-awq", spec),
    formats.GPTQ: lambda spec: gptq("gptq", spec),
    formats.GPTQ_V2: lambda spec: gptq("gptq_v2", spec),
    formats.COMPRESSED_TENSORS: compressed,
}


def repacked(tensors: dict[str, Tensor], format: Format, spec: QuantSpec) -> dict[str, Tensor]:
    """The tensors of an AWQ GEMM checkpoint with its linears in another format."""
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    found = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in PARTS}
    for stem in stems:
        logical = to_logical(AwqGemm(*(tensors[f"{stem}.{part}"] for part in PARTS)), spec)
        logical = logical._replace(zero=logical.zero.clamp(min=1))  # GPTQ has no zero point 0
        found |= {f"{stem}.{end}": tensor.clone() for end, tensor in format.pack(logical, spec).items()}
    return found


def weights_of(folder: Path) -> Path:
    return next(path for path in (folder / "llm", folder) if (path / "model.safetensors").is_file())


def set_quantization(folder: Path, value: dict[str, Any] | None) -> None:
    """Replace the quantization_config wherever the folder has one; None takes it away."""
    for path in (folder / "config.json", folder / "llm" / "config.json"):
        if path.is_file():
            raw = json.loads(path.read_text())
            for part in (raw, raw.get("llm_cfg", {})):
                if part.pop("quantization_config", None) and value:
                    part["quantization_config"] = value
            path.write_text(json.dumps(raw))


def packed_folder(
    folder: Path, format: Format, layout: str = "text", group: int = 32, dtype: torch.dtype = torch.float16
) -> Path:
    """A tiny model of the layout and format, its scales in `dtype`."""
    spec = QuantSpec(group_size=group)
    make_tiny_model(folder, layout, quantize=group, hidden_size=128, intermediate_size=256)
    home = weights_of(folder)
    tensors = load_file(home / "model.safetensors")
    tensors = {name: tensor.to(dtype) if name.endswith(".scales") else tensor for name, tensor in tensors.items()}
    save_file(repacked(tensors, format, spec), home / "model.safetensors")
    set_quantization(folder, CONFIGS[format](spec))
    return folder


def as_pickle(folder: Path, name: str = "model-w4-awq.pt") -> Path:
    """The decoder's weights as a .pt file, and no word of the quantization in config.json."""
    home = weights_of(folder)
    torch.save(load_file(home / "model.safetensors"), home / name)
    (home / "model.safetensors").unlink()
    set_quantization(folder, None)
    return folder


def without_zero_points(folder: Path) -> Path:
    """A compressed-tensors folder made symmetric: its groups' zero is in the middle, and no tensor says it."""
    home = weights_of(folder)
    tensors = load_file(home / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("zero_point")}
    save_file(kept, home / "model.safetensors")
    set_quantization(folder, compressed(QuantSpec(group_size=32, zero_point=False)))
    return folder
