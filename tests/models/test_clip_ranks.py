"""CLIP and SigLIP on 1, 2 and 4 ranks against transformers' classes on one, with random biases and norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.dual import EOS, Dual, assert_outputs, dual, outputs, pictures, texts
from rank_pool import Rank, RankPool
from same import assert_close
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModel, SiglipTextModel, SiglipVisionModel

from tinychat.checkpoint import Index, Weights
from tinychat.config import VisionConfig
from tinychat.errors import ModelError
from tinychat.layers.parallel import Group, Later
from tinychat.models.clip import CLIPModel
from tinychat.models.clip import CLIPVisionModel as OurVisionModel
from tinychat.models.vision_tower import VisionTower

SIZES = [1, 2, 4]
CASES = [(48, "quick_gelu", 577), (32, "gelu", 257), (28, "quick_gelu", 197)]  # picture, activation, positions in CLIP
PARTS = {  # family -> the class of both, of the tower and of the text encoder
    "clip": ("CLIPModel", CLIPVisionModel, CLIPTextModel),
    "siglip": ("SiglipModel", SiglipVisionModel, SiglipTextModel),
}


def part(whole: Dual, kind: type[Any], name: str) -> Any:
    """transformers' own class of one encoder, with the weights of the model of both."""
    source = getattr(whole.theirs, name)
    theirs = kind(source.config).eval()
    theirs.load_state_dict(source.state_dict())
    return theirs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("picture", "act", "positions"), CASES)
@pytest.mark.parametrize("family", PARTS)
def test_every_rank_gives_what_transformers_gives(
    ranks: RankPool, tmp_path: Path, family: str, picture: int, act: str, positions: int, size: int
) -> None:
    whole = dual(tmp_path, family, positions + size, act, picture)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 8:] = 0
    inputs = {
        "input_ids": texts(2),
        "pixel_values": pictures(2, picture),
        "attention_mask": mask,
        "return_loss": True,
        "output_hidden_states": True,
    }
    expected = whole(**inputs)
    assert expected["vision_model_output.last_hidden_state"].shape[1] == positions - (family == "siglip")
    for found in ranks.run(size, outputs, PARTS[family][0], whole.theirs.config, tmp_path, inputs):
        assert_outputs(found, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", PARTS)
def test_each_encoder_alone_gives_what_transformers_gives(
    ranks: RankPool, tmp_path: Path, family: str, size: int
) -> None:
    whole = dual(tmp_path, family, size, "gelu_pytorch_tanh")
    cases = [("vision_model", {"pixel_values": pictures(2, 28)}), ("text_model", {"input_ids": texts(3)})]
    for kind, (name, inputs) in zip(PARTS[family][1:], cases, strict=True):
        theirs = part(whole, kind, name)
        expected = Dual(theirs, tmp_path)(**inputs)
        for found in ranks.run(size, outputs, kind.__name__, theirs.config, tmp_path, inputs):
            assert_outputs(found, expected)


@torch.no_grad()
def features(group: Group, config: VisionConfig, folder: Path, pixels: Tensor) -> Tensor:
    return VisionTower(config, Weights(Index.of(folder), group=group))(pixels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layer", [-2, 0, 12, (-2, 0, 12), (3, -1)])
def test_the_tower_that_the_chat_uses_selects_layers(
    ranks: RankPool, tmp_path: Path, layer: int | tuple[int, ...], size: int
) -> None:
    whole = dual(tmp_path, "clip", 5, "quick_gelu", num_hidden_layers=12)
    raw = VisionConfig.of(whole.theirs.config.vision_config)
    config = VisionConfig(**{**{name: getattr(raw, name) for name in raw.__slots__}, "select_layer": layer})
    pixels = pictures(1, 28)
    with torch.no_grad():
        states = whole.theirs.vision_model(pixels, output_hidden_states=True).hidden_states
    chosen = (layer,) if isinstance(layer, int) else layer
    expected = torch.cat([states[i][:, 1:] for i in chosen], dim=-1)
    for found in ranks.run(size, features, config, tmp_path, pixels):
        assert_close(found, expected, 1e-5)


def test_ranks_that_do_not_divide_are_refused_with_numbers_that_fit(tmp_path: Path) -> None:
    config = dual(tmp_path, "clip", 0, "gelu", hidden_size=32, num_attention_heads=4).theirs.config
    said = r"3 ranks do not divide the 4 attention heads of vision_model\..*\.self_attn; take one of 1, 2, 4"
    with pytest.raises(ModelError, match=said):
        OurVisionModel("", config.vision_config, Later(Rank(0, 3)))
    config.vision_config.intermediate_size = 62
    with pytest.raises(ModelError, match=r"4 ranks do not divide the 62 outputs of .*fc1; take one of 1, 2, 31, 62"):
        OurVisionModel("", config.vision_config, Later(Rank(0, 4)))


@pytest.mark.parametrize("family", PARTS)
def test_no_constructor_changes_its_config(tmp_path: Path, family: str) -> None:
    from models.dual import OURS

    whole = dual(tmp_path, family, 1, "gelu", hidden_size=32, num_attention_heads=8, intermediate_size=64)
    config = whole.theirs.config
    config.text_config.num_attention_heads = 4
    before = config.to_dict()
    first, second = (OURS[PARTS[family][0]]("", config, Later(Rank(1, 4))) for _ in range(2))
    assert config.to_dict() == before
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (first, second)]
    assert shapes[0] == shapes[1]
    assert first.vision_model.encoder.layers[0].self_attn.num_heads == 2
    assert first.config == second.config


def test_what_is_split_and_what_is_whole(tmp_path: Path) -> None:
    whole = dual(tmp_path, "clip", 2, "gelu", hidden_size=32, num_attention_heads=4, intermediate_size=64)
    theirs = whole.theirs.state_dict()
    made = [CLIPModel("", whole.theirs.config, Weights(Index.of(tmp_path), group=Rank(rank, 2))) for rank in (0, 1)]
    columns, rows = ("q_proj.", "k_proj.", "v_proj.", "fc1."), ("out_proj.weight", "fc2.weight")
    for name, tensor in theirs.items():
        found = [model.get_parameter(name) for model in made]
        if any(part in name for part in columns):
            assert torch.equal(torch.cat(found), tensor), name
        elif name.endswith(rows):
            assert torch.equal(torch.cat(found, 1), tensor), name
        elif name.endswith(("out_proj.bias", "fc2.bias")):
            assert torch.equal(found[0], tensor) and not found[1].any(), name
        else:
            assert torch.equal(found[0], tensor) and torch.equal(found[1], tensor), name


def test_ends_are_where_the_tests_put_them() -> None:
    assert [(row == EOS).nonzero()[0].item() for row in texts(3)] == [4, 7, 10]
