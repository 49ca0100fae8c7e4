"""Random tiny CLIP and SigLIP models of transformers in folders, and ours made of them on each rank of a group."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models.tiny import shake
from safetensors.torch import save_file
from same import assert_close
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, SiglipConfig, SiglipModel
from transformers.utils.generic import ModelOutput

from tinychat.checkpoint import Index, Weights
from tinychat.layers.parallel import Group
from tinychat.models import clip, siglip

WORDS, EOS = 60, 7
OURS = {name: getattr(module, name) for module in (clip, siglip) for name in dir(module) if name.endswith("Model")}
FAMILIES = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Dual:
    """A model of transformers, and the folder that it lies in."""

    theirs: PreTrainedModel
    folder: Path

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """What transformers' model gives."""
        with torch.no_grad():
            return flat(self.theirs(**inputs))


def sizes(rng: random.Random, act: str) -> dict[str, Any]:
    heads = rng.choice([4, 8])
    return {
        "hidden_size": heads * rng.choice([4, 6, 8]),
        "num_attention_heads": heads,
        "intermediate_size": 4 * rng.randint(8, 20),
        "num_hidden_layers": rng.randint(2, 3),
        "hidden_act": act,
        "layer_norm_eps": rng.choice([1e-5, 1e-3]),
    }


def dual(folder: Path, family: str, seed: int, act: str, image_size: int = 28, eos: int = EOS, **vision: Any) -> Dual:
    """Patches of 2 x 2 pixels; every parameter is random."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tower = {**sizes(rng, act), "image_size": image_size, "patch_size": 2, **vision}
    text = {**sizes(rng, act), "vocab_size": WORDS, "max_position_embeddings": 16}
    text |= {"eos_token_id": eos, "bos_token_id": 1, "pad_token_id": 0}
    common = {"projection_dim": rng.randint(5, 30)} if family == "clip" else {}
    if family == "siglip":
        text["projection_size"] = tower["hidden_size"]
    config, kind = FAMILIES[family]
    theirs = kind(config(vision_config=tower, text_config=text, **common)).eval()
    shake(theirs, seed)
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, folder / "model.safetensors")
    return Dual(theirs, folder)


def texts(rows: int, seed: int = 0) -> Tensor:
    """Random ids `[rows, 11]`, each row with an end of text, most with words behind it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(EOS + 1, WORDS, (rows, 11), generator=generator)
    for row in range(rows):
        ids[row, 4 + (3 * row) % 7 :: 3] = EOS
    return ids


def pictures(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, 3, size, size), generator=torch.Generator().manual_seed(seed))


def ours(group: Group, kind: str, config: Any, folder: Path) -> torch.nn.Module:
    """A class of ours, filled from the folder by this rank."""
    return OURS[kind]("", config, Weights(Index.of(folder), group=group)).eval()


@torch.no_grad()
def outputs(group: Group, kind: str, config: Any, folder: Path, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a rank's model gives."""
    return flat(ours(group, kind, config, folder)(**inputs))


def flat(output: ModelOutput) -> dict[str, Tensor]:
    """Every tensor of an output, and of the outputs in it, by a name."""
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        if isinstance(value, ModelOutput):
            found |= {f"{name}.{inner}": tensor for inner, tensor in flat(value).items()}
        elif isinstance(value, tuple):
            found |= {f"{name}.{i}": tensor for i, tensor in enumerate(value)}
        else:
            found[name] = value.clone()
    return found


def assert_outputs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and numbers within the tolerance."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        try:
            assert_close(found[name], tensor, TOLERANCE)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
