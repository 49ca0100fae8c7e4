"""CLIPModel, CLIPTextModel and SigLIP's on one rank: masks, ends of texts, losses, gradients, and what they refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.dual import EOS, OURS, WORDS, Dual, assert_outputs, dual, flat, ours, pictures, texts
from same import assert_close
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, LlamaConfig, SiglipConfig

from tinychat.config import VisionConfig
from tinychat.errors import ModelError, TinychatError, UsageError
from tinychat.layers import attention
from tinychat.layers.parallel import ALONE
from tinychat.models.clip import CLIPModel, CLIPTextModel, CLIPVisionModel, text_ends
from tinychat.models.dual_config import DualConfig, TextEncoderConfig
from tinychat.models.siglip import SiglipModel, SiglipVisionModel, SiglipVisionTransformer

KINDS = {"clip": "CLIPModel", "siglip": "SiglipModel"}


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def pair(folder: Path, family: str, seed: int = 0, **changes: Any) -> tuple[Dual, Any]:
    whole = dual(folder, family, seed, **{"act": "quick_gelu", **changes})
    return whole, ours(ALONE, KINDS[family], whole.theirs.config, folder)


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_outputs_equal_transformers_at_random_sizes(tmp_path: Path, family: str, seed: int) -> None:
    whole, mine = pair(tmp_path, family, seed, act=["gelu", "quick_gelu", "gelu_pytorch_tanh", "relu"][seed])
    inputs = {"input_ids": texts(4, seed), "pixel_values": pictures(4, 28, seed), "return_loss": True}
    assert_outputs(flat(mine(**inputs)), whole(**inputs))
    fewer = {**inputs, "pixel_values": inputs["pixel_values"][:3], "return_loss": False}
    assert_outputs(flat(mine(**fewer)), whole(**fewer))


@torch.no_grad()
def test_features_are_the_projected_poolers(tmp_path: Path, family: str) -> None:
    whole, mine = pair(tmp_path, family)
    ids, pixels = texts(3), pictures(2, 28)
    mask = (torch.arange(11) < 8).long().expand(3, -1)
    assert_close(mine.get_text_features(ids, mask), whole.theirs.get_text_features(ids, mask).pooler_output, 1e-5)
    assert_close(mine.get_image_features(pixels), whole.theirs.get_image_features(pixels).pooler_output, 1e-5)


MASKS = {
    "right": [[1] * 11, [1] * 8 + [0] * 3, [1] * 10 + [0]],
    "left": [[1] * 11, [0] * 3 + [1] * 8, [0] + [1] * 10],
    "holes": [[1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1], [1] * 11, [1] + [0] * 3 + [1] * 7],
    "none": [[1] * 11] * 3,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_padding_is_not_looked_at(tmp_path: Path, family: str, mask: list[list[int]]) -> None:
    whole, mine = pair(tmp_path, family)
    ids, kept = texts(3), torch.tensor(mask)
    found = mine.text_model(ids, kept)
    expected = whole.theirs.text_model(ids, kept)
    assert_close(found.last_hidden_state[kept.bool()], expected.last_hidden_state[kept.bool()], 1e-5)
    assert found.last_hidden_state.isfinite().all()
    other = torch.where(kept.bool() | (ids == EOS), ids, EOS + 2)
    assert_close(
        mine.text_model(other, kept).last_hidden_state[kept.bool()], found.last_hidden_state[kept.bool()], 1e-6
    )


@torch.no_grad()
def test_a_clip_text_sees_only_what_is_before_and_a_siglip_text_both_ways(tmp_path: Path, family: str) -> None:
    _, mine = pair(tmp_path, family)
    ids = texts(1)
    changed = ids.clone()
    changed[0, -1] = EOS + 3
    found, other = (mine.text_model(i).last_hidden_state[0, 0] for i in (ids, changed))
    assert torch.equal(found, other) == (family == "clip")


@pytest.mark.parametrize(("eos", "place"), [(2, 3), (EOS, 2), (9, 1), (3, 0)])
@torch.no_grad()
def test_where_a_text_ends(tmp_path: Path, eos: int, place: int) -> None:
    ids = torch.tensor([[3, 9, 7, 49, 7, 7]])
    assert text_ends(ids, eos).tolist() == [place]
    whole, mine = pair(tmp_path, "clip", eos=eos)
    expected = whole.theirs.text_model(ids)
    found = mine.text_model(ids)
    assert_close(found.pooler_output, expected.pooler_output, 1e-5)
    assert_close(found.pooler_output, expected.last_hidden_state[:, place], 1e-5)


def test_the_losses_gradients_equal_transformers(tmp_path: Path, family: str) -> None:
    whole, mine = pair(tmp_path, family)
    inputs = {"input_ids": texts(3), "pixel_values": pictures(3, 28), "return_loss": True}
    whole.theirs(**inputs).loss.backward()
    mine(**inputs).loss.backward()
    expected = dict(whole.theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        if (theirs := expected[name].grad) is None:
            assert parameter.grad is None, name
        else:
            assert_close(parameter.grad, theirs, 1e-5 * max(1.0, float(theirs.abs().max())))


def test_a_new_models_scale_is_that_of_the_paper() -> None:
    scale = CLIPModel("", CLIPConfig(**small("clip"))).logit_scale
    assert math.isclose(float(scale.detach().exp()), 1 / 0.07, rel_tol=1e-4)


@torch.no_grad()
def test_no_attention_scores_are_made(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of queries and keys is within scaled_dot_product_attention: once a layer."""
    _, mine = pair(tmp_path, family)
    calls: list[int] = []
    real = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or real(*args, **kw)
    )
    mine(texts(1), pictures(1, 28))
    assert len(calls) == len(mine.text_model.encoder.layers) + len(mine.vision_model.encoder.layers)


@torch.no_grad()
def test_our_own_config_and_theirs_make_the_same_model(tmp_path: Path, family: str) -> None:
    whole, mine = pair(tmp_path, family)
    config = DualConfig.of(whole.theirs.config)
    assert DualConfig.of(config) is config
    again = OURS[KINDS[family]]("", config)
    again.load_state_dict(whole.theirs.state_dict())
    assert torch.equal(
        again(texts(1), pictures(1, 28)).logits_per_text, mine(texts(1), pictures(1, 28)).logits_per_text
    )


@torch.no_grad()
def test_half_precision_takes_float_pictures(tmp_path: Path, family: str) -> None:
    _, mine = pair(tmp_path, family)
    output = mine.bfloat16()(texts(2), pictures(2, 28), return_loss=True)
    assert output.logits_per_image.dtype == torch.bfloat16
    assert output.loss.isfinite()


# the head of a SigLIP tower


def test_a_siglip_towers_head(tmp_path: Path) -> None:
    whole = dual(tmp_path, "siglip", 0, "gelu")
    vision = whole.theirs.config.vision_config
    assert SiglipVisionModel("", vision).vision_model.head is not None
    assert SiglipVisionModel("", vision, with_head=False).vision_model.head is None
    assert SiglipVisionTransformer("", VisionConfig.of(vision)).head is None
    vision.vision_use_head = False
    plain = SiglipVisionTransformer("", vision)
    assert plain.head is None
    assert plain(pictures(1, 28)).pooler_output is None
    assert not any(name.startswith("head") for name in plain.state_dict())


# what is refused


def small(family: str) -> dict[str, Any]:
    common = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**common, "vocab_size": WORDS, "max_position_embeddings": 12, "eos_token_id": EOS, "bos_token_id": 1}
    return {"text_config": text | {"pad_token_id": 0}, "vision_config": {**common, "image_size": 28, "patch_size": 14}}


MODELS: dict[str, nn.Module] = {}


def model(family: str) -> nn.Module:
    if family not in MODELS:
        kinds = {"clip": (CLIPModel, CLIPConfig), "siglip": (SiglipModel, SiglipConfig)}
        made, config = kinds[family]
        MODELS[family] = made("", config(**small(family)))
    return MODELS[family]


Inputs = tuple[Tensor | None, Tensor | None, Tensor | None]
GOOD = texts(2)
REFUSED: dict[str, tuple[Inputs, type[TinychatError], str]] = {
    "no ids": ((None, pictures(1, 28), None), UsageError, "input_ids is None; give token ids [N, T]"),
    "no pixels": ((GOOD, None, None), UsageError, "pixel_values is None; give pixels [N, 3, H, W]"),
    "size": ((GOOD, pictures(1, 42), None), ModelError, "shape [1, 3, 42, 42], the tower takes [N, 3, 28, 28]"),
    "one row": ((GOOD[0], pictures(1, 28), None), UsageError, "input_ids have shape [11]; give token ids [N, T]"),
    "empty": ((GOOD[:, :0], pictures(1, 28), None), UsageError, "input_ids have shape [2, 0]"),
    "long": (
        (torch.cat((GOOD, GOOD), 1), pictures(1, 28), None),
        UsageError,
        "texts have 22 tokens, the encoder has 12 positions; cut them to 12 tokens",
    ),
    "foreign id": ((GOOD + 50, pictures(1, 28), None), UsageError, "is not one of the encoder's 60"),
    "negative id": ((GOOD - 9, pictures(1, 28), None), UsageError, "token id -2 is not one of the encoder's 60"),
    "mask": (
        (GOOD, pictures(1, 28), torch.ones(2, 10)),
        UsageError,
        "attention_mask has shape [2, 10], input_ids have [2, 11]; give 1 for each token and 0 for padding",
    ),
}


@pytest.mark.parametrize(("inputs", "kind", "said"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(family: str, inputs: Inputs, kind: type[TinychatError], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        model(family)(*inputs)


def test_a_text_without_its_end_is_refused() -> None:
    ids = texts(3)
    ids[1, ids[1] == EOS] = EOS + 1
    with pytest.raises(UsageError, match="text 1 has no token 7, which ends a text"):
        model("clip")(ids, pictures(1, 28))


def test_a_loss_needs_pairs(family: str) -> None:
    with pytest.raises(UsageError, match="2 texts and 3 pictures are no pairs, so there is no loss"):
        model(family)(texts(2), pictures(3, 28), return_loss=True)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CLIPModel("", LlamaConfig()), "'llama' does not embed pictures and texts; works: clip, siglip"),
        (lambda: CLIPTextModel("", CLIPVisionConfig()), "the text encoder 'clip_vision_model' is not supported"),
        (lambda: CLIPVisionModel("", CLIPTextConfig()), "the vision tower 'clip_text_model' is not supported"),
        (lambda: TextEncoderConfig.of(CLIPTextConfig(eos_token_id=[7, 8])), "eos_token_id is [7, 8], one id is needed"),
    ],
)
def test_configs_of_something_else_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        make()


def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    whole = dual(tmp_path, "clip", 0, "gelu", hidden_size=32, num_attention_heads=4)
    config = whole.theirs.config.vision_config
    config.image_size = 56
    said = r"vision_model\.embeddings\.position_embedding\.weight is \[197, 32\], \[785, 32\] is needed"
    with pytest.raises(ModelError, match=said):
        ours(ALONE, "CLIPVisionModel", config, tmp_path)
