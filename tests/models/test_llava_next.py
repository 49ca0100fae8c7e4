"""LLaVA-NeXT on our tower and decoder against transformers in fp32: pictures of any size, alone and in a batch."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models.tiny import IMAGE_ID, TEXT, VISION, ids, ours_of, shake
from PIL import Image as pillow
from same import assert_close, assert_same
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    SiglipVisionConfig,
)

from tinychat.config import VilaConfig
from tinychat.errors import ModelError, UsageError
from tinychat.inputs.images import image_processor_for, to_tiles
from tinychat.models.anyres import pack_tiles
from tinychat.models.vila_fusion import IMAGE_TOKEN_INDEX
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.tiling import Size, Tiles, Tiling

HERE = IMAGE_TOKEN_INDEX
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
TILING = Tiling(tuple((h, w) for h, w in PINPOINTS), 28, 4)
# square, wide, high, case 19's strip of no rows and its size that floats get wrong, and the smallest there is
SIZES = [(56, 56), (30, 60), (60, 30), (1, 1000), (198, 176), (1, 1)]


def pair(vision: Any = None, **changes: Any) -> tuple[Any, VilaLlamaForCausalLM]:
    """A LLaVA-NeXT of transformers and ours."""
    tower = vision or CLIPVisionConfig(**VISION)
    text = LlamaConfig(**{**TEXT, "max_position_embeddings": 512})
    config = LlavaNextConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE_ID, image_grid_pinpoints=PINPOINTS, **changes
    )
    torch.manual_seed(0)
    theirs = LlavaNextForConditionalGeneration(config).eval()
    shake(theirs)
    return theirs, ours_of(theirs)


def tiles(*sizes: Size, seed: int = 0) -> Tiles:
    """Random tiles for pictures of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = tuple(torch.randn((TILING.tiles(size), 3, 28, 28), generator=generator) for size in sizes)
    return Tiles(pixels, sizes)


def theirs_of(pictures: Tiles) -> dict[str, Tensor]:
    """As transformers takes them: padded to the most tiles."""
    most = max(map(len, pictures.pixels))
    padded = [torch.cat((p, torch.zeros(most - len(p), 3, 28, 28))) for p in pictures.pixels]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(pictures.sizes)}


def expanded(row: Tensor, sizes: list[Size]) -> Tensor:
    """The image token once a feature; `sizes` loses those that were used."""
    pieces = [torch.full((TILING.tokens(sizes.pop(0)),), IMAGE_ID) if t == HERE else t[None] for t in row]
    return torch.cat(pieces)


def prompt(*parts: int, seed: int = 0) -> Tensor:
    pieces = [torch.tensor([HERE]) if n == HERE else ids(n, seed=seed + i) for i, n in enumerate(parts)]
    return torch.cat(pieces)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_features_and_logits_of_one_picture_equal_transformers(size: Size) -> None:
    theirs, ours = pair()
    pictures, row = tiles(size), prompt(3, HERE, 4)
    (expected,) = theirs.get_image_features(**theirs_of(pictures)).pooler_output
    (found,) = ours.encode_images(pictures)
    assert len(found) == TILING.tokens(size)
    assert_close(found, expected, 1e-5)
    logits = theirs(input_ids=expanded(row, [size])[None], **theirs_of(pictures)).logits
    assert_close(ours(input_ids=row[None], images=pictures).logits, logits)


@pytest.mark.parametrize(
    ("vision", "changes"),
    [
        (None, {"vision_feature_layer": -1}),
        (None, {"vision_feature_layer": 2}),
        (None, {"vision_feature_layer": [-1, 2]}),
        (None, {"vision_feature_layer": [1, -2, 3]}),
        (None, {"projector_hidden_act": "relu", "multimodal_projector_bias": False}),
        (SiglipVisionConfig(**VISION, vision_use_head=False), {"vision_feature_select_strategy": "full"}),
    ],
)
@torch.no_grad()
def test_layers_strategies_and_towers(vision: Any, changes: dict[str, Any]) -> None:
    theirs, ours = pair(vision, **changes)
    pictures, row = tiles((30, 60), (60, 30)), prompt(2, HERE, 1, HERE)
    wide = expanded(row, list(pictures.sizes))
    expected = theirs(input_ids=wide[None], **theirs_of(pictures)).logits
    assert_close(ours(input_ids=row[None], images=pictures).logits, expected)


@torch.no_grad()
def test_layer_0_is_what_the_embeddings_give() -> None:
    _, ours = pair(vision_feature_layer=[0, -2])
    tower: Any = ours.vision_tower
    pixels = tiles((28, 28)).pixels[0]
    expected = [tower.vision_model.hidden_state(pixels, layer)[:, 1:] for layer in (0, 2)]
    assert torch.equal(tower(pixels), torch.cat(expected, -1))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_case_20_pictures_of_different_sizes_in_one_row_and_across_rows(side: str) -> None:
    """Rows with two pictures, none, a picture alone; each also as if it were alone."""
    theirs, ours = pair()
    ours.config.tokenizer_padding_side = side
    rows = [prompt(2, HERE, 1, HERE, 2), prompt(6, seed=9), prompt(HERE, seed=3), prompt(HERE, 2, seed=5)]
    counts, sizes = [2, 0, 1, 1], [(30, 60), (56, 56), (1, 1000), (198, 176)]
    pictures, left = tiles(*sizes), list(sizes)
    wide = [expanded(row, left) for row in rows]
    length, narrow = max(map(len, wide)), max(map(len, rows))
    their_ids, their_mask = padded(wide, length, side)
    our_ids, our_mask = padded(rows, narrow, side)
    expected = theirs(input_ids=their_ids, attention_mask=their_mask, **theirs_of(pictures)).logits
    found = ours(input_ids=our_ids, attention_mask=our_mask, images=pictures).logits
    kept = their_mask.bool()
    assert_close(found[kept], expected[kept])
    at = 0
    for row, seen, mask, count in zip(rows, found, kept, counts, strict=True):
        own = Tiles(pictures.pixels[at : at + count], pictures.sizes[at : at + count])
        at += count
        alone = ours(input_ids=row[None], images=own if count else None).logits[0]
        assert_same(seen[mask], alone)


def padded(rows: list[Tensor], length: int, side: str) -> tuple[Tensor, Tensor]:
    tokens, mask = torch.ones(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


@torch.no_grad()
def test_chunks_and_single_tokens_across_pictures_agree() -> None:
    _, ours = pair()
    pictures, row = tiles((30, 60), (198, 176)), prompt(2, HERE, 1, HERE, 3)
    whole = ours(input_ids=row[None], images=pictures).logits
    embeds = ours.prepare_inputs_labels_for_multimodal(row[None], None, None, None, None, pictures)[4]
    assert embeds is not None and embeds.shape[1] == whole.shape[1]
    for chunk in (1, 7, 16, 1000):
        assert_same(ours.prefill(embeds, ours.make_cache(1, 512), 0, chunk), whole[:, -1:])


def test_gradients_reach_every_part_as_in_transformers() -> None:
    theirs, ours = pair()
    pictures, row = tiles((30, 60)), prompt(3, HERE, 4)
    labels = torch.where(row == HERE, -100, row)[None]
    wide = expanded(row, [(30, 60)])[None]
    expected = theirs(input_ids=wide, labels=wide.masked_fill(wide == IMAGE_ID, -100), **theirs_of(pictures)).loss
    found = ours(input_ids=row[None], labels=labels, images=pictures).loss
    assert abs(float(found.detach()) - float(expected.detach())) < 1e-5
    expected.backward()
    found.backward()
    assert ours.image_newline is not None and ours.image_newline.grad is not None
    assert_close(ours.image_newline.grad, theirs.model.image_newline.grad, 1e-5)
    assert ours.image_newline.grad.any()


REAL = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]


@pytest.mark.parametrize(
    ("tiling", "count"),
    [(TILING, 10_000), (Tiling(tuple(REAL), 336, 24), 10_000), (Tiling(((768, 384), (384, 1152)), 384, 27), 2000)],
)
def test_case_19_the_count_equals_the_rows_for_every_size_of_a_sweep(tiling: Tiling, count: int) -> None:
    """Numbered features, put together by transformers and by us: as many, and in the same order."""
    rng, newline, n = random.Random(0), torch.tensor([-1.0]), tiling.patches
    vision = SimpleNamespace(image_size=tiling.side, patch_size=tiling.side // n)
    pinpoints = [list(resolution) for resolution in tiling.resolutions]
    theirs = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    for size in [*SIZES, *((rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(count))]:
        features = torch.arange(tiling.tiles(size) * n * n * 1.0).reshape(-1, n * n, 1)
        (expected,), _ = LlavaNextModel.pack_image_features(theirs, [features], [size], "default", newline)
        packed = pack_tiles(features, tiling, size, newline)
        assert len(packed) == tiling.tokens(size), size
        assert torch.equal(packed, expected), size


def test_case_19_one_tile_adds_one_newline() -> None:
    packed = pack_tiles(torch.arange(16.0).reshape(1, 16, 1), TILING, (28, 28), torch.tensor([-1.0]))
    assert packed.flatten().tolist() == [*range(16), -1]


@pytest.mark.parametrize("size", [*SIZES, (3, 50), (3, 3), (1, 3), (200, 3), (333, 500)])
def test_tiles_equal_transformers_image_processor(size: Size) -> None:
    """Its own padding to a batch left out, and its guess of which axis the colours are on."""
    config = VilaConfig(**pair()[0].config.to_dict())
    assert config.vision is not None and config.tiling == TILING
    processor = image_processor_for(config.vision, None, config.tiling)
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = to_tiles(pillow.fromarray(values), processor)
    made = processor.preprocess(values, input_data_format="channels_last", return_tensors="pt")
    assert found.shape == (TILING.tiles(size), 3, 28, 28)
    assert torch.equal(found, made["pixel_values"][0])
    assert tuple(made["image_sizes"][0].tolist()) == size


def test_what_cannot_be_is_a_sentence() -> None:
    _, ours = pair()
    with pytest.raises(UsageError, match="cuts its pictures into tiles, and pixels came without sizes; give tinychat"):
        ours.encode_images(torch.zeros(1, 3, 28, 28))
    wrong = Tiles((torch.zeros(4, 3, 28, 28),), ((56, 56),))
    with pytest.raises(UsageError, match="a picture of 56 x 56 pixels is cut into 5 tiles, 4 came; give each picture"):
        ours.encode_images(wrong)
    raw = pair()[0].config.to_dict()
    with pytest.raises(ModelError, match="select_strategy is 'full': the features of a tile are then not a square"):
        VilaConfig(**{**raw, "vision_feature_select_strategy": "full"})
    with pytest.raises(ModelError, match="30x56 in image_grid_pinpoints; the tower's tiles have 28 pixels"):
        _ = VilaConfig(**{**raw, "image_grid_pinpoints": [[30, 56]]}).tiling
    with pytest.raises(UsageError, match="whole pictures, and tiles came"):
        from models.tiny import llava_pair

        llava_pair()[1].encode_images(tiles((28, 28)))


def test_no_pictures_are_no_features() -> None:
    assert pair()[1].encode_images(Tiles((), ())) == []
