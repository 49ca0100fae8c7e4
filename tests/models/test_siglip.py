"""Our SigLIP tower against transformers' SiglipVisionModel in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.tiny import VISION, pixels, shake
from same import assert_close
from transformers import SiglipVisionConfig, SiglipVisionModel

from tinychat.checkpoint import Index, Weights, write_safetensors
from tinychat.errors import ModelError, UsageError
from tinychat.models.siglip import SiglipVisionTransformer
from tinychat.models.vision_tower import VisionTower


def pair(**changes: object) -> tuple[SiglipVisionModel, SiglipVisionTransformer]:
    config = SiglipVisionConfig(**{**VISION, "vision_use_head": False, **changes})
    theirs = SiglipVisionModel(config).eval()
    shake(theirs)
    ours = SiglipVisionTransformer("vision_model", config).eval()
    ours.load_state_dict({name.removeprefix("vision_model."): t for name, t in theirs.state_dict().items()})
    return theirs, ours


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}])
@torch.no_grad()
def test_outputs_equal_transformers(changes: dict[str, object]) -> None:
    theirs, ours = pair(**changes)
    expected = theirs(pixel_values=pixels(2), output_hidden_states=True)
    assert_close(ours(pixels(2)).last_hidden_state, expected.last_hidden_state)
    assert len(expected.hidden_states) == 4
    kept = ours(pixels(2), output_hidden_states=True).hidden_states
    for found, state in zip(kept, expected.hidden_states, strict=True):
        assert_close(found, state)
    for i, state in enumerate(expected.hidden_states):
        assert_close(ours.hidden_state(pixels(2), i), state)
        assert_close(ours.hidden_state(pixels(2), i - 4), state)


@torch.no_grad()
def test_the_tower_gives_every_patch() -> None:
    theirs, _ = pair()
    tower = VisionTower(theirs.config)
    tower.vision_model.load_state_dict({n.removeprefix("vision_model."): t for n, t in theirs.state_dict().items()})
    expected = theirs(pixel_values=pixels(2), output_hidden_states=True).hidden_states[-2]
    assert tower.config.num_features == 16
    assert_close(tower(pixels(2)), expected)


@torch.no_grad()
def test_weights_are_taken_from_a_checkpoint_at_once(tmp_path: Path) -> None:
    theirs, ours = pair()
    tensors = {f"tower.{name}": tensor for name, tensor in ours.state_dict().items()}
    write_safetensors(tensors.items(), tmp_path)
    made = SiglipVisionTransformer("tower", theirs.config, Weights(Index.of(tmp_path)))
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, tensors[f"tower.{name}"]), name


def test_wrong_pictures_are_refused() -> None:
    _, ours = pair()
    with pytest.raises(ModelError, match=r"pixels have shape \[1, 1, 28, 28\], the tower takes \[N, 3, 28, 28\]"):
        ours(torch.zeros(1, 1, 28, 28))
    with pytest.raises(UsageError, match="pixel_values is None"):
        ours()
