"""Our CLIP tower against transformers' CLIPVisionModel in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.tiny import VISION, pixels, shake
from same import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

from tinychat.checkpoint import Index, Weights, write_safetensors
from tinychat.config import VisionConfig
from tinychat.errors import ModelError, UsageError
from tinychat.models.clip import CLIPVisionTransformer
from tinychat.models.vision_tower import VisionTower


def pair(**changes: object) -> tuple[CLIPVisionModel, CLIPVisionTransformer]:
    config = CLIPVisionConfig(**{**VISION, **changes})
    theirs = CLIPVisionModel(config).eval()
    shake(theirs)
    ours = CLIPVisionTransformer("vision_model", config).eval()
    ours.load_state_dict({name.removeprefix("vision_model."): t for name, t in theirs.state_dict().items()})
    return theirs, ours


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {"num_attention_heads": 1}])
@torch.no_grad()
def test_outputs_equal_transformers(changes: dict[str, object]) -> None:
    theirs, ours = pair(**changes)
    expected, found = theirs(pixel_values=pixels(2)), ours(pixels(2))
    assert_close(found.last_hidden_state, expected.last_hidden_state)
    assert_close(found.pooler_output, expected.pooler_output)


@torch.no_grad()
def test_every_hidden_state_equals_transformers() -> None:
    theirs, ours = pair()
    states = theirs(pixel_values=pixels(2), output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert ours(pixels(2)).hidden_states is None
    for found, expected in zip(ours(pixels(2), output_hidden_states=True).hidden_states, states, strict=True):
        assert_close(found, expected)
    for i, expected in enumerate(states):
        assert_close(ours.hidden_state(pixels(2), i), expected)
        assert_close(ours.hidden_state(pixels(2), i - 4), expected)


@pytest.mark.parametrize("layer", [-5, 4])
def test_a_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(ModelError, match=f"select_layer is {layer}, the tower has 3 layers"):
        pair()[1].hidden_state(pixels(1), layer)


def test_layers_beyond_the_selected_one_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair()
    ran: list[int] = []
    for i, layer in enumerate(ours.encoder.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    ours.hidden_state(pixels(1), -2)
    assert ran == [0, 1]


@pytest.mark.parametrize(("feature", "count"), [("patch", 16), ("cls_patch", 17)])
@torch.no_grad()
def test_the_tower_selects_layer_and_feature(feature: str, count: int) -> None:
    theirs, _ = pair()
    raw = VisionConfig.of(theirs.config)
    names = {name: getattr(raw, name) for name in raw.__slots__}
    tower = VisionTower(VisionConfig(**{**names, "select_layer": -3, "select_feature": feature}))
    tower.vision_model.load_state_dict({n.removeprefix("vision_model."): t for n, t in theirs.state_dict().items()})
    expected = theirs(pixel_values=pixels(2), output_hidden_states=True).hidden_states[-3]
    assert_close(tower(pixels(2)), expected[:, 17 - count :])


@torch.no_grad()
def test_weights_are_taken_from_a_checkpoint_at_once(tmp_path: Path) -> None:
    theirs, ours = pair()
    tensors = {f"tower.{name}": tensor for name, tensor in ours.state_dict().items()}
    write_safetensors(tensors.items(), tmp_path)
    weights = Weights(Index.of(tmp_path))
    made = CLIPVisionTransformer("tower", theirs.config, weights)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, tensors[f"tower.{name}"]), name


@torch.no_grad()
def test_pictures_do_not_depend_on_their_neighbours() -> None:
    _, ours = pair()
    assert_close(ours(pixels(3)).last_hidden_state[1:2], ours(pixels(3)[1:2]).last_hidden_state, 1e-5)


def test_wrong_pictures_are_refused() -> None:
    _, ours = pair()
    with pytest.raises(ModelError, match=r"pixels have shape \[1, 3, 28, 29\], the tower takes \[N, 3, 28, 28\]"):
        ours(torch.zeros(1, 3, 28, 29))
    with pytest.raises(ModelError, match=r"shape \[3, 28, 28\]"):
        ours(torch.zeros(3, 28, 28))
    with pytest.raises(UsageError, match="pixel_values is None"):
        ours()


def test_heads_that_do_not_divide_the_width() -> None:
    raw = VisionConfig.of(CLIPVisionConfig(**VISION))
    names = {name: getattr(raw, name) for name in raw.__slots__}
    with pytest.raises(ModelError, match="a width of 32 does not divide by 5 heads"):
        CLIPVisionTransformer("x", VisionConfig(**{**names, "num_attention_heads": 5}))


@torch.no_grad()
def test_float_pictures_enter_a_bfloat16_tower() -> None:
    assert pair()[1].bfloat16()(pixels(1)).last_hidden_state.dtype == torch.bfloat16
