"""What stands for pictures in text: strings and counts equal transformers' processors."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Idefics2Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution

from tinychat import tiling
from tinychat.config import VilaConfig
from tinychat.errors import ModelError, UsageError
from tinychat.inputs.marks import IMAGE_ID, MarkedTokenizer
from tinychat.inputs.placeholders import (
    TYPES,
    arrange_text,
    get_number_of_features,
    get_unpadded_features,
    image_text_replacement,
    image_text_replacement_fixup,
    placeholders_for,
)

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
FAKE = "<fake_token_around_image>"
SIZES = 30_000


def next_config(vision: Any = None, **changes: Any) -> LlavaNextConfig:
    tower = vision or CLIPVisionConfig(image_size=336, patch_size=14)
    return LlavaNextConfig(vision_config=tower, text_config=LlamaConfig(), **changes)


def their_count(config: LlavaNextConfig) -> Any:
    """transformers' own count of a picture's tokens, as a function of height and width."""
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints)
    tower: Any = config.vision_config
    processor.patch_size, side = tower.patch_size, tower.image_size
    additional = int(tower.model_type == "clip_vision_model")
    processor.num_additional_image_tokens = additional
    dropped = config.vision_feature_select_strategy == "default"
    return lambda height, width: processor._get_number_of_features(height, width, side, side) - dropped


def random_sizes(count: int, longest: int = 3000, seed: int = 0) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randint(1, longest), rng.randint(1, longest)) for _ in range(count)]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (next_config(), SIZES),
        (next_config(vision_feature_select_strategy="full"), 1000),
        (next_config(CLIPVisionConfig(image_size=28, patch_size=14), image_grid_pinpoints=[[28, 56], [56, 28]]), 5000),
        (
            next_config(
                SiglipVisionConfig(image_size=384, patch_size=14),
                vision_feature_select_strategy="full",
                image_grid_pinpoints=[[384, 768], [1152, 384], [1536, 1536]],
            ),
            5000,
        ),
    ],
)
def test_counts_equal_transformers_for_random_sizes(config: LlavaNextConfig, count: int) -> None:
    theirs = their_count(config)
    sizes = [*random_sizes(count), (1, 1), (1, 1000), (1000, 1), (198, 176), (110, 176), (3, 40_000_000 // 3)]
    assert not [size for size in sizes if get_number_of_features(*size, config) != theirs(*size)]


@pytest.mark.parametrize(
    ("height", "width", "swapped", "right"),
    [
        (20, 20, 1176, 1176),
        (640, 640, 2928, 2928),
        (480, 640, 2340, 2340),
        (640, 480, 2352, 2352),
        (899, 1024, 2634, 2634),
        (1024, 899, 2640, 2640),
        (333, 500, 976, 1464),
        (300, 600, 876, 1752),
        (600, 300, 888, 1776),
        (1000, 3000, 776, 2328),
        (3000, 1000, 792, 2376),
        (1, 1000, 576, 576),
    ],
)
def test_case_19_non_square_grids_and_loraxs_swapped_count(height: int, width: int, swapped: int, right: int) -> None:
    config = next_config()
    assert get_number_of_features(height, width, config) == right == their_count(config)(height, width)
    assert get_number_of_features(height, width, config, swap_grid=True) == swapped


def test_case_19_a_strip_has_no_unpadded_rows() -> None:
    assert get_unpadded_features(1, 1000, 24, 1, 3) == (0, 0)
    assert get_unpadded_features(198, 176, 14, 2, 2) == (28 * 24, 28)


def test_unpadded_features_equal_transformers() -> None:
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    rng = random.Random(1)
    for height, width in random_sizes(5000, seed=2):
        n, rows, columns = rng.randint(1, 27), rng.randint(1, 6), rng.randint(1, 6)
        theirs = processor._get_unpadded_features(height, width, n, n, rows, columns)
        assert get_unpadded_features(height, width, n, rows, columns) == theirs, (height, width, n, rows, columns)


def test_the_best_resolution_equals_transformers() -> None:
    rng = random.Random(3)
    for size in [*random_sizes(3000, seed=4), (1, 40_000_000), (1, 100_000)]:
        resolutions = [(336 * rng.randint(1, 4), 336 * rng.randint(1, 4)) for _ in range(rng.randint(1, 6))]
        assert tiling.select_best_resolution(size, resolutions) == select_best_resolution(size, resolutions), size


def test_no_size_takes_more_tokens_or_tiles_than_the_most() -> None:
    cut = tiling.Tiling(tuple(map(tuple, PINPOINTS)), 336, 24)  # type: ignore[arg-type]
    sizes = random_sizes(5000, seed=5)
    assert max(map(cut.tokens, sizes)) <= cut.most_tokens == 2928 == cut.tokens((672, 672))
    assert max(map(cut.tiles, sizes)) == cut.most_tiles == 5


@pytest.mark.parametrize(("resolutions", "words"), [([[336, 500]], "336x500 in image_grid"), ([], "an empty image_g")])
def test_resolutions_that_are_no_tiles_are_refused(resolutions: list[list[int]], words: str) -> None:
    with pytest.raises(ModelError, match=f"the config has {words}.*336 pixels a side"):
        tiling.Tiling(tuple(map(tuple, resolutions)), 336, 24)  # type: ignore[arg-type]


# strings


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and those for pictures."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "<image>", FAKE)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def bare(kind: Any, **fields: Any) -> Any:
    """A processor with these attributes alone."""
    made = kind.__new__(kind)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(("strategy", "additional"), [("default", 1), ("full", 1)])
def test_llava_equals_transformers(strategy: Any, additional: int) -> None:
    tower = CLIPVisionConfig(image_size=336, patch_size=14)
    config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(), vision_feature_select_strategy=strategy)
    theirs = bare(
        LlavaProcessor, image_token="<image>", patch_size=14, num_additional_image_tokens=additional,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    inputs = {"pixel_values": torch.zeros(2, 3, 336, 336)}
    found = image_text_replacement(theirs, inputs, config, 1)
    assert found == theirs.replace_image_token(inputs, 1) == "<image>" * (576 + (strategy == "full"))
    assert image_text_replacement(None, {}, config, 0) == found


def test_llava_next_equals_transformers_picture_by_picture() -> None:
    config = next_config()
    theirs = bare(
        LlavaNextProcessor, image_token="<image>", patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
    )  # fmt: skip
    sizes = torch.tensor([[300, 600], [20, 20], [1, 1000]])
    inputs = {"pixel_values": torch.zeros(3, 5, 3, 336, 336), "image_sizes": sizes}
    for i, count in enumerate((1752, 1176, 576)):
        found = image_text_replacement(theirs, inputs, config, i)
        assert found == theirs.replace_image_token(inputs, i) == "<image>" * count
    with pytest.raises(UsageError, match="the image inputs have no image_sizes; give what the model's own"):
        image_text_replacement(theirs, {}, config, 0)


def idefics2(splits: bool, tokenizer: Any) -> Any:
    image_processor = SimpleNamespace(do_image_splitting=splits)
    fields = {"image_token": "<image>", "fake_image_token": FAKE, "image_seq_len": 64, "tokenizer": tokenizer}
    return bare(Idefics2Processor, image_processor=image_processor, **fields)


def their_idefics2_text(processor: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The string that transformers' processor hands to its tokenizer."""
    seen: list[str] = []

    class Words:
        init_kwargs: dict[str, Any] = {}

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            seen.extend(texts)
            return {"input_ids": []}

    monkeypatch.setattr(processor, "tokenizer", Words())
    monkeypatch.setattr(Idefics2Processor, "_merge_kwargs", lambda *_, **__: {"text_kwargs": {}, "images_kwargs": {}})
    monkeypatch.setattr(Idefics2Processor, "_check_special_mm_tokens", lambda *_, **__: None)
    processor(text=text)
    return seen[0]


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("text", ["<image>", "a <image> b", "<image><image>c", "x<image>\n<image> <image><end>"])
def test_case_21_idefics2_equals_transformers(splits: bool, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = idefics2(splits, None)
    mine = image_text_replacement(processor, {}, SimpleNamespace(model_type="idefics2"), 0)
    whole = image_text_replacement_fixup("idefics2", text.replace("<image>", mine))
    assert whole == their_idefics2_text(processor, text, monkeypatch)


def test_case_21_five_splits_make_320_image_and_6_fake_tokens() -> None:
    one = image_text_replacement(idefics2(True, None), {}, SimpleNamespace(model_type="idefics2"), 0)
    fixed = image_text_replacement_fixup("idefics2", one)
    assert (fixed.count("<image>"), fixed.count(FAKE)) == (320, 6)
    neighbours = image_text_replacement_fixup("idefics2", one + one)
    assert (neighbours.count("<image>"), neighbours.count(FAKE)) == (640, 11)
    config = SimpleNamespace(model_type="idefics2", perceiver_config=SimpleNamespace(resampler_n_latents=4))
    bare_processor = SimpleNamespace(image_processor=SimpleNamespace(do_image_splitting=False))
    assert image_text_replacement(bare_processor, {}, config, 0) == FAKE + "<image>" * 4 + FAKE


@pytest.mark.parametrize("kind", ["idefics2", "llava", "paligemma"])
@pytest.mark.parametrize("typed", ["<image>", f"{FAKE}<image>{FAKE}", "what is <image>?", "<im<image>age>"])
def test_case_21_an_image_token_that_was_typed_is_text(kind: str, typed: str, words: Any) -> None:
    marked = MarkedTokenizer(words, "<image>")
    picture = "<image>" * 3
    ids = marked.encode(arrange_text(kind, picture + marked.quote(typed), "<s>"))
    assert ids.count(IMAGE_ID) == 3
    assert ids[:3] == [IMAGE_ID] * 3
    fake = words.convert_tokens_to_ids(FAKE)
    assert fake not in ids
    assert words.decode([i for i in ids[3:] if i != words.bos_token_id]).rstrip("\n") == typed


@pytest.mark.parametrize("text", ["<image>Describe", "<image><image> a\nb", "see <image>"])
def test_paligemma_has_transformers_own_order_and_no_special_tokens(text: str, words: Any) -> None:
    theirs = bare(PaliGemmaProcessor, image_token="<image>", image_seq_length=4, tokenizer=words)
    images, (expected,), *_ = theirs.prepare_inputs_layout(images=None, text=[text])
    if images is None:  # the order is made where there are pictures
        images, (expected,), *_ = theirs.prepare_inputs_layout(images=[[torch.zeros(3, 2, 2)]], text=[text])
    found = arrange_text("paligemma", text, words.bos_token)
    assert found == expected
    vision = SiglipVisionConfig(image_size=28, patch_size=14)
    config = PaliGemmaConfig(vision_config=vision, text_config={"model_type": "gemma"})
    assert image_text_replacement(theirs, {}, config, 0) == theirs.replace_image_token({}, 0) == "<image>" * 4
    assert image_text_replacement(None, {}, config, 0) == "<image>" * 4
    assert not placeholders_for(config).add_special_tokens
    assert placeholders_for("llava").add_special_tokens


def test_text_alone_gets_its_bos_first() -> None:
    assert arrange_text("paligemma", "caption en", "<bos>") == "<bos>caption en\n"
    assert arrange_text("llava", "caption en", "<bos>") == "caption en"


def test_vila_counts_by_its_own_config(configs: Any) -> None:
    config = configs("siglip", image_suffix="\n")
    assert image_text_replacement(None, {}, config, 0) == "<image>" * 4 + "\n"
    tiled = VilaConfig(**next_config().to_dict())
    inputs = {"image_sizes": [(20, 20), (300, 600)]}
    assert image_text_replacement(None, inputs, tiled, 1) == "<image>" * 1752
    assert get_number_of_features(300, 600, tiled, swap_grid=True) == 876
    with pytest.raises(UsageError, match="shows its pictures whole; take config.tokens_per_image"):
        get_number_of_features(300, 600, config)


@pytest.mark.parametrize("thing", ["mllama", SimpleNamespace(model_type="mllama")])
def test_an_unknown_type_is_a_sentence(thing: Any) -> None:
    sentence = "how a 'mllama' model takes pictures is not known; known are idefics2, llava, llava_next, paligemma"
    for call in (
        lambda: placeholders_for(thing),
        lambda: image_text_replacement_fixup(thing, "a"),
        lambda: arrange_text(thing, "a"),
    ):
        with pytest.raises(ModelError, match=sentence):
            call()
    assert set(TYPES) == {"idefics2", "llava", "llava_next", "paligemma", "vila_llama"}
