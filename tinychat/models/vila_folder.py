"""Writing a model as a VILA folder: config.json at the root, a part each in llm/, vision_tower/ and mm_projector/."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tinychat.checkpoint import write_safetensors
from tinychat.config import VilaConfig
from tinychat.errors import UsageError

if TYPE_CHECKING:
    from tinychat.models.vila_llama import VilaLlamaForCausalLM

PARTS = {"llm": "llm_cfg", "vision_tower": "vision_tower_cfg", "mm_projector": "mm_projector_cfg"}


def save_folder(model: VilaLlamaForCausalLM, folder: Path) -> None:
    """Write config and weights; a tokenizer and an image processor are the caller's to add.

    Raises UsageError for a model whose weights lie elsewhere than in its modules.
    """
    if absent := sum(tensor.is_meta for tensor in model.state_dict().values()):
        message = f"{absent} tensors of the model are not in memory, since a device map has them elsewhere"
        raise UsageError(message, "load it without a device map")
    folder.mkdir(parents=True, exist_ok=True)
    for name, key in PARTS.items():
        module = model.get_vision_tower() if name == "vision_tower" else getattr(model, name)
        if isinstance(module, nn.Module):
            newline = [] if name != "mm_projector" or model.image_newline is None else [model.image_newline]
            named = (("image_newline", tensor.detach().cpu()) for tensor in newline)
            write_safetensors(chain(_tensors(module), named), folder / name)
            _write_json(folder / name / "config.json", _part_config(model.config, key))
        else:
            _remove_part(folder / name)
    _write_json(folder / "config.json", _root_config(model))


def _remove_part(folder: Path) -> None:
    """What an earlier save wrote of a part that the model does not have; other files stay."""
    for pattern in ("config.json", "model*.safetensors", "model.safetensors.index.json"):
        for path in folder.glob(pattern):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The part's tensors under VILA's names, a tied head left out; a linear projector is one layer, not a list."""
    linear = getattr(getattr(module, "config", None), "type", None) == "linear"
    tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
    for name, tensor in module.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name.replace("layers.0.", "layers.") if linear else name, tensor.detach().cpu().contiguous()


def _part_config(config: VilaConfig, key: str) -> dict[str, Any]:
    part = dict(getattr(config, key) or {})
    if key == "mm_projector_cfg":
        assert config.projector is not None
        part = {"model_type": "v2l_projector", **part, "token_order": config.projector.token_order}
    if key == "llm_cfg" and hasattr(config, "quantization_config"):
        part["quantization_config"] = config.quantization_config
    return part


def _root_config(model: VilaLlamaForCausalLM) -> dict[str, Any]:
    kept = {name: value for name, value in model.config.to_diff_dict().items() if name not in PARTS.values()}
    kept |= {key: name for name, key in PARTS.items() if getattr(model, name) is not None}
    kept |= {"layout": "vila", "architectures": ["VilaLlamaForCausalLM"], "model_type": "vila_llama"}
    return {**kept, "model_dtype": str(model.dtype)}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
