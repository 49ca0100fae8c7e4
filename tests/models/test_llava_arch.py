"""The base classes: documented usage, the 6-tuple, and setting up vision modules and picture tokens for training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.signatures import bare
from models.tiny import IMAGE_ID, PATCHES, VISION, VOCABULARY, ids, llava_pair, pixels, text_pair
from same import assert_close
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from tinychat.config import VilaConfig
from tinychat.errors import ModelError, UsageError
from tinychat.models.llava_base.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from tinychat.models.projector import Projector
from tinychat.models.vila_fusion import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.models.vision_tower import VisionTower

HERE = IMAGE_TOKEN_INDEX
DOCUMENTED = {  # `self` left out
    (LlavaMetaModel, "__init__"): "(config)",
    (LlavaMetaModel, "get_vision_tower"): "()",
    (LlavaMetaModel, "initialize_vision_modules"): "(model_args, fsdp=None)",
    (LlavaMetaForCausalLM, "get_model"): "()",
    (LlavaMetaForCausalLM, "get_vision_tower"): "()",
    (LlavaMetaForCausalLM, "encode_images"): "(images)",
    (
        LlavaMetaForCausalLM,
        "prepare_inputs_labels_for_multimodal",
    ): "(input_ids, position_ids, attention_mask, past_key_values, labels, images)",
    (LlavaMetaForCausalLM, "initialize_vision_tokenizer"): "(model_args, tokenizer)",
}


@pytest.mark.parametrize(("owner", "name"), DOCUMENTED)
def test_signatures_are_the_documents(owner: type, name: str) -> None:
    assert bare(getattr(owner, name)) == DOCUMENTED[owner, name]


def test_the_abstract_method_must_be_given() -> None:
    assert LlavaMetaForCausalLM.__abstractmethods__ == {"get_model"}
    with pytest.raises(TypeError, match="get_model"):
        LlavaMetaForCausalLM()  # type: ignore[abstract]


def test_a_mixin_of_its_own() -> None:
    class Base(nn.Module):
        def __init__(self, config: VilaConfig) -> None:
            super().__init__()
            self.config = config

    class Other(LlavaMetaModel, Base):
        pass

    made = Other(llava_pair()[1].config)
    assert isinstance(made.get_vision_tower(), VisionTower) and isinstance(made.mm_projector, Projector)


def prepare(model: VilaLlamaForCausalLM, tokens: Tensor, images: Any, **given: Any) -> Any:
    arguments = [given.get(name) for name in ("positions", "mask", "past", "labels")]
    return model.prepare_inputs_labels_for_multimodal(tokens, *arguments, images)


def with_pictures(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


# Encoding


@torch.no_grad()
def test_pictures_come_in_every_form() -> None:
    theirs, ours = llava_pair()
    expected = torch.stack(list(theirs.model.get_image_features(pixels(4)).pooler_output))
    assert_close(ours.encode_images(pixels(4)), expected)
    for form in (pixels(4).reshape(2, 2, 3, 28, 28), list(pixels(4)), [pixels(4)[:3], pixels(4)[3]]):
        assert_close(ours.encode_images(form), expected)
    assert ours.encode_images([]).shape == (0, 0, 64)


def test_a_text_model_says_that_it_reads_text() -> None:
    _, ours = text_pair("llama")
    with pytest.raises(ModelError, match="this model reads text only; choose a vision-language model"):
        ours.encode_images(pixels(1))


# The 6-tuple


@torch.no_grad()
def test_the_usage_of_the_document_as_it_is_written() -> None:
    _, self = llava_pair()
    input_ids = with_pictures([5, HERE, 6], [HERE, 7, 8])
    position_ids = attention_mask = past_key_values = labels = None
    images = pixels(2)

    image_features = self.encode_images(images)

    (
        input_ids, position_ids, attention_mask,
        past_key_values, inputs_embeds, labels
    ) = self.prepare_inputs_labels_for_multimodal(
        input_ids, position_ids, attention_mask,
        past_key_values, labels, images
    )  # fmt: skip

    assert (input_ids, position_ids, attention_mask, past_key_values, labels) == (None,) * 5
    assert inputs_embeds is not None and inputs_embeds.shape == (2, 2 + PATCHES, 64)
    assert torch.equal(inputs_embeds[0, 1 : 1 + PATCHES], image_features[0])
    assert torch.equal(inputs_embeds[1, :PATCHES], image_features[1])
    assert torch.equal(inputs_embeds[1, PATCHES:], self.get_input_embeddings()(torch.tensor([7, 8])))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_what_was_given_comes_back_in_the_new_width(side: str) -> None:
    _, ours = llava_pair()
    ours.config.tokenizer_padding_side = side
    tokens = with_pictures([5, HERE, 6], [7, 8, 9])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    result = prepare(ours, tokens, pixels(1), positions=torch.arange(3)[None], mask=mask, labels=tokens, past="kept")
    none, positions, wide, past, embeds, labels = result
    length = 2 + PATCHES
    assert none is None and past == "kept" and embeds.shape == (2, length, 64)
    assert wide.dtype == mask.dtype and wide.sum(1).tolist() == [length, 2]
    assert wide[1, -2:].all() if side == "left" else wide[1, :2].all()
    kept = wide[1].bool()
    assert positions[0].tolist() == list(range(length)) and positions[1][kept].tolist() == [0, 1]
    assert labels[0].tolist() == [5, *[IGNORE_INDEX] * PATCHES, 6]
    assert labels[1][kept].tolist() == [7, 8] and set(labels[1][~kept].tolist()) == {IGNORE_INDEX}
    assert not embeds[1][~kept].any()


@torch.no_grad()
def test_rows_that_become_unequal_get_a_mask() -> None:
    _, ours = llava_pair()
    mask = prepare(ours, with_pictures([5, HERE], [5, 6]), pixels(1))[2]
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [1 + PATCHES, 2]


def test_inputs_without_pictures_come_back_as_they_are() -> None:
    _, ours = llava_pair()
    tokens, mask = ids(1, 4), torch.ones(1, 4)
    assert prepare(ours, tokens, None, mask=mask, labels=tokens) == (tokens, None, mask, None, None, tokens)
    one = ids(1, 1)
    past = ours.make_cache(1)
    assert prepare(ours, one, pixels(1), past=past) == (one, None, None, past, None, None)


@torch.no_grad()
def test_a_prompt_of_one_picture_alone() -> None:
    _, ours = llava_pair()
    assert prepare(ours, with_pictures([HERE]), pixels(1))[4].shape == (1, PATCHES, 64)


@torch.no_grad()
def test_samples_with_none_one_and_several_pictures() -> None:
    _, ours = llava_pair()
    tokens = with_pictures([5, 6, 7], [HERE, 6, HERE], [5, HERE, 6])
    embeds, features = prepare(ours, tokens, pixels(3))[4], ours.encode_images(pixels(3))
    assert torch.equal(embeds[0, :3], ours.embed_text(tokens[0]))
    assert torch.equal(embeds[1, :PATCHES], features[0]) and torch.equal(embeds[1, PATCHES + 1 :], features[1])
    assert torch.equal(embeds[2, 1 : 1 + PATCHES], features[2])


@torch.no_grad()
def test_frames_of_one_placeholder_are_joined() -> None:
    _, ours = llava_pair()
    features = ours.encode_images(pixels(4))
    five = pixels(4).reshape(2, 2, 3, 28, 28)
    embeds = prepare(ours, with_pictures([5, HERE], [HERE, 6]), five)[4]
    assert torch.equal(embeds[0, 1:], features[:2].flatten(0, 1))
    assert torch.equal(embeds[1, :-1], features[2:].flatten(0, 1))


@torch.no_grad()
def test_a_batch_of_text_takes_an_empty_list() -> None:
    _, ours = llava_pair()
    assert torch.equal(prepare(ours, ids(2, 3), [])[4], ours.embed_text(ids(2, 3)))


@torch.no_grad()
def test_masked_placeholders_take_no_picture() -> None:
    _, ours = llava_pair()
    tokens, mask = with_pictures([5, 6, HERE], [HERE, 5, 6]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert prepare(ours, tokens, pixels(1), mask=mask)[4].shape == (2, PATCHES + 2, 64)


@torch.no_grad()
def test_rows_are_cut_to_the_models_length() -> None:
    _, ours = llava_pair()
    ours.config.tokenizer_model_max_length = 10
    tokens = with_pictures([5, HERE, 6], [7, 8, 9])
    with pytest.warns(UserWarning, match="a row of 18 tokens is cut to tokenizer_model_max_length = 10"):
        embeds, labels = prepare(ours, tokens, pixels(1), labels=tokens)[4:]
    assert embeds.shape == (2, 10, 64) and labels[0].tolist() == [5, *[IGNORE_INDEX] * 9]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (pixels(1), "the ids hold 2 image placeholders, 1 images came"),
        (pixels(3), "the ids hold 2 image placeholders, 3 images came"),
        ([], "the ids hold 2 image placeholders, 0 images came"),
        (list(pixels(5)), "the ids hold 2 image placeholders, 5 images came"),
    ],
)
def test_numbers_that_differ_are_both_named(images: Any, words: str) -> None:
    _, ours = llava_pair()
    with pytest.raises(UsageError, match=words):
        prepare(ours, with_pictures([HERE, 5, HERE]), images)


def test_shapes_that_differ_are_named() -> None:
    _, ours = llava_pair()
    tokens = with_pictures([HERE, 5, 6])
    with pytest.raises(UsageError, match=r"attention_mask has shape \[1, 4\], the ids \[1, 3\]"):
        prepare(ours, tokens, pixels(1), mask=torch.ones(1, 4))
    with pytest.raises(UsageError, match=r"labels has shape \[1, 2\], the ids \[1, 3\]"):
        prepare(ours, tokens, pixels(1), labels=ids(1, 2))


# Vision modules for training


def arguments(**given: Any) -> SimpleNamespace:
    tower = CLIPVisionConfig(**VISION)
    return SimpleNamespace(**{"mm_vision_tower": tower, "mm_projector_type": "mlp2x_gelu", **given})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_model_gets_eyes(dtype: torch.dtype) -> None:
    model = text_pair("llama")[1].to(dtype)
    model.get_model().initialize_vision_modules(arguments(mm_vision_select_layer=-1), fsdp=None)
    tower = model.get_vision_tower()
    assert isinstance(tower, VisionTower) and tower.config.select_layer == -1
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config.tokens_per_image == PATCHES
    with torch.no_grad():
        assert model(input_ids=with_pictures([5, HERE]), images=pixels(1)).logits.shape == (1, 1 + PATCHES, VOCABULARY)


def test_a_tower_of_a_folder_comes_with_its_weights(tmp_path: Path) -> None:
    theirs = CLIPVisionModel(CLIPVisionConfig(**VISION))
    theirs.save_pretrained(tmp_path)
    model = text_pair("llama")[1]
    model.initialize_vision_modules(arguments(mm_vision_tower=str(tmp_path), mm_projector_type="linear"))
    assert model.vision_tower is not None
    with torch.no_grad():
        expected = theirs(pixel_values=pixels(1)).last_hidden_state
        assert_close(model.vision_tower.vision_model(pixels(1)).last_hidden_state, expected)


def test_what_exists_is_kept_and_unfrozen() -> None:
    _, ours = llava_pair()
    tower, projector = ours.vision_tower, ours.mm_projector
    assert projector is not None
    projector.requires_grad_(False)
    ours.initialize_vision_modules(arguments())
    assert ours.vision_tower is tower and ours.mm_projector is projector
    assert all(p.requires_grad for p in projector.parameters())


def test_fsdp_does_not_see_the_tower(tmp_path: Path) -> None:
    _, ours = llava_pair()
    tower = ours.vision_tower
    ours.initialize_vision_modules(arguments(), fsdp=["full_shard"])
    assert ours.get_vision_tower() is tower
    assert not [name for name in ours.state_dict() if "vision_tower" in name]
    assert tower is not None
    ours.train()
    tower.train()
    ours.freezed_module_patch()
    assert not tower.training
    with torch.no_grad():
        expected = ours(input_ids=with_pictures([5, HERE]), images=pixels(1)).logits
        ours.save_pretrained(tmp_path)
        again = VilaLlamaForCausalLM.from_pretrained(tmp_path)
        assert_close(again(input_ids=with_pictures([5, HERE]), images=pixels(1)).logits, expected)


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_a_pretrained_adapter_is_read(tmp_path: Path, prefix: str, kind: str) -> None:
    model = text_pair("llama")[1]
    other = Projector(llava_pair()[1].config.projector) if kind == "mlp2x_gelu" else nn.Linear(32, 64)  # type: ignore[arg-type]
    state = {f"{prefix}{name.removeprefix('layers.')}": t for name, t in other.state_dict().items()}
    path = tmp_path / "mm_projector.bin"
    torch.save({**state, "model.embed_tokens.weight": torch.zeros(2, 64)}, path)
    model.initialize_vision_modules(arguments(mm_projector_type=kind, pretrain_mm_mlp_adapter=str(path)))
    assert model.mm_projector is not None
    for mine, theirs in zip(model.mm_projector.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_vision_modules_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model_args name no vision tower; set mm_vision_tower"):
        text_pair("llama")[1].initialize_vision_modules(SimpleNamespace())
    with pytest.raises(UsageError, match="mm_vision_tower is a int; give a config, a dict or a folder"):
        text_pair("llama")[1].initialize_vision_modules(arguments(mm_vision_tower=3))
    with pytest.raises(ModelError, match="config.json was looked for"):
        text_pair("llama")[1].initialize_vision_modules(arguments(mm_vision_tower=str(tmp_path / "none")))
    _, ours = llava_pair()
    with pytest.raises(ModelError, match="there is no file .*none.bin; give the adapter's file"):
        ours.initialize_vision_modules(arguments(pretrain_mm_mlp_adapter=tmp_path / "none.bin"))
    torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, tmp_path / "part.bin")
    with pytest.raises(ModelError, match=r"holds \['layers.0.weight'\], the projector has \['layers.0.bias', "):
        ours.initialize_vision_modules(arguments(pretrain_mm_mlp_adapter=tmp_path / "part.bin"))


# Picture tokens


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(("marks", "patch"), [(True, True), (True, False), (False, True), (False, False)])
def test_tokens_are_added_and_their_rows_are_means(marks: bool, patch: bool) -> None:
    _, ours = llava_pair()
    words, before = tokenizer(VOCABULARY), ours.get_input_embeddings().weight.detach().clone()
    head = ours.get_output_embeddings().weight.detach().clone()  # type: ignore[union-attr]
    given = SimpleNamespace(mm_use_im_start_end=marks, mm_use_im_patch_token=patch)
    ours.initialize_vision_tokenizer(given, words)
    names = ["<im_patch>"] * patch + ["<im_start>", "<im_end>"] * marks
    assert words.convert_tokens_to_ids(names) == list(range(VOCABULARY, VOCABULARY + len(names)))
    table, out = ours.get_input_embeddings().weight.detach(), ours.llm.lm_head.weight.detach()
    assert len(table) == len(words) == ours.config.text.vocab_size
    assert torch.equal(table[:VOCABULARY], before)
    for row in range(VOCABULARY, len(words)):
        assert_close(table[row], before.mean(0), 1e-6)
        assert_close(out[row], head.mean(0), 1e-6)
    with torch.no_grad():
        assert ours(input_ids=torch.tensor([[len(words) - 1]])).logits.shape[-1] == len(words)


def test_a_vocabulary_that_is_padded_beyond_the_tokenizer_is_not_cut() -> None:
    _, ours = llava_pair()
    words = tokenizer(90)
    ours.initialize_vision_tokenizer(SimpleNamespace(mm_use_im_start_end=True), words)
    table = ours.get_input_embeddings().weight.detach()
    assert len(table) == VOCABULARY
    assert_close(table[90:92], table[:90].mean(0).expand(2, -1), 1e-6)


def test_rows_of_an_adapter_are_taken(tmp_path: Path) -> None:
    _, ours = llava_pair()
    torch.save({"model.embed_tokens.weight": torch.stack([torch.ones(64), torch.ones(64) * 2])}, tmp_path / "a.bin")
    given = SimpleNamespace(mm_use_im_start_end=True, pretrain_mm_mlp_adapter=str(tmp_path / "a.bin"))
    ours.initialize_vision_tokenizer(given, tokenizer(VOCABULARY))
    assert ours.get_input_embeddings().weight[-2:, 0].tolist() == [1, 2]
    torch.save({"model.embed_tokens.weight": torch.ones(1, 5)}, tmp_path / "a.bin")
    with pytest.raises(ModelError, match=r"holds embeddings \[1, 5\], the model has \[101, 64\] and 2 new rows"):
        llava_pair()[1].initialize_vision_tokenizer(given, tokenizer(VOCABULARY))
    torch.save({"x": torch.ones(1)}, tmp_path / "a.bin")
    with pytest.raises(ModelError, match=r"holds no model.embed_tokens.weight"):
        llava_pair()[1].initialize_vision_tokenizer(given, tokenizer(VOCABULARY))


@pytest.mark.parametrize("marks", [True, False])
def test_tuning_the_adapter_alone_freezes_the_head(marks: bool) -> None:
    _, ours = llava_pair()
    given = SimpleNamespace(mm_use_im_start_end=marks, tune_mm_mlp_adapter=True)
    ours.initialize_vision_tokenizer(given, tokenizer(VOCABULARY))
    assert ours.get_input_embeddings().weight.requires_grad is marks
    assert not ours.llm.lm_head.weight.requires_grad


def test_the_image_token_of_the_config_is_no_placeholder() -> None:
    """Only -200 is one here: a typed image token is text."""
    _, ours = llava_pair()
    with pytest.raises(UsageError, match="the ids hold 0 image placeholders, 1 images came"):
        prepare(ours, torch.tensor([[5, IMAGE_ID]]), pixels(1))
