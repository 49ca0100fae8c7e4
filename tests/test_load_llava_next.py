"""A LLaVA-NeXT folder from picture files to tokens: against transformers' processor and model, and in the engine."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as pillow
from safetensors.torch import load_file, save_file
from same import assert_close
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from make_tiny_model import make_tiny_model
from tinychat import planner
from tinychat.config import read_config
from tinychat.core import Finished, Image, Message, Request, SamplingParams, StoppingParams, Text
from tinychat.engine.engine import Engine
from tinychat.engine.prefill import embed_rest, last_tokens
from tinychat.errors import ModelError, UsageError
from tinychat.inputs.processor import Processor, Prompt
from tinychat.load import load, load_model
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.tiling import Size, Tiles
from tinychat_kernels import cpu

NEW_NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}
# height x width: case 19's and others, so that tiles, rows and newlines all differ
SIZES: list[Size] = [(300, 600), (1, 1000), (198, 176), (20, 20)]


def picture(height: int, width: int, seed: int = 0) -> Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    pillow.fromarray(values).save(buffer, "PNG")
    return Image(data=buffer.getvalue())


def opened(image: Image) -> Any:
    return pillow.open(io.BytesIO(image.data or b"")).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("next"), "llava_next", seed=3)


@pytest.fixture(scope="module")
def ready(folder: Path) -> tuple[VilaLlamaForCausalLM, Processor]:
    return load(folder, dtype="float32", device="cpu", context=1024)


def ask(*parts: str | Image, name: str = "r", tokens: int = 6, **fields: Any) -> Request:
    said = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    stopping = StoppingParams(max_new_tokens=tokens, ignore_eos=True)
    return Request(name, (Message("user", said),), stopping=stopping, **fields)


def answers(engine: Engine, *requests: Request) -> dict[str, Finished]:
    ends = {event.request_id: event for event in engine.run(requests) if isinstance(event, Finished)}
    assert ends.keys() == {request.id for request in requests}
    return ends


@torch.no_grad()
def logits(model: VilaLlamaForCausalLM, processor: Processor, prompt: Prompt) -> torch.Tensor:
    features = model.encode_images(processor.pixels(prompt, range(len(prompt.images))))
    return model(inputs_embeds=embed_rest(model, prompt, 0, list(features))).logits


@pytest.mark.parametrize("sizes", [*([size] for size in SIZES), SIZES[:3]])
@torch.no_grad()
def test_ids_pixels_and_logits_equal_transformers(sizes: list[Size], folder: Path, ready: Any) -> None:
    model, processor = ready
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = processor(ask(*images, "What is this?"))
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is this?"}]
    theirs, words = (
        LlavaNextForConditionalGeneration.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    text = words.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = words(text=text, images=[opened(image) for image in images], return_tensors="pt")
    assert list(prompt.ids) == inputs["input_ids"][0].tolist()
    assert [slot.end - slot.start for slot in prompt.slots] == [processor.image_tokens(size) for size in sizes]
    pixels = processor.pixels(prompt, range(len(images)))
    assert isinstance(pixels, Tiles) and pixels.sizes == tuple(sizes)
    for mine, other in zip(pixels.pixels, inputs["pixel_values"], strict=True):
        assert torch.equal(mine, other[: len(mine)])
    assert_close(logits(model, processor, prompt), theirs(**inputs).logits)


def test_new_names_and_those_of_transformers_own_saving_load(folder: Path, tmp_path: Path, ready: Any) -> None:
    expected = ready[0].state_dict()
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        old = next(old for old in NEW_NAMES if name.startswith(old))
        renamed[name.replace(old, NEW_NAMES[old], 1)] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    same_tensors(tmp_path, expected)
    LlavaNextForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    same_tensors(tmp_path / "saved", expected)
    ready[0].save_pretrained(tmp_path / "vila")
    assert read_config(tmp_path / "vila").tiling == ready[0].tiling
    same_tensors(tmp_path / "vila", expected)


def test_a_processor_that_transformers_saved_gives_the_same(folder: Path, tmp_path: Path, ready: Any) -> None:
    """transformers 5 keeps the image processor inside the processor's file."""
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").is_file()
    processor = Processor.from_folder(tmp_path, read_config(folder))
    prompt = processor(ask(picture(300, 600), "what?"))
    assert prompt == ready[1](ask(picture(300, 600), "what?"))
    mine, other = (one.pixels(prompt, [0]).pixels[0] for one in (processor, ready[1]))
    assert torch.equal(mine, other)


def same_tensors(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_model(folder, dtype="float32", device="cpu").state_dict()
    assert found.keys() == expected.keys() and "image_newline" in found
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_case_20_pictures_of_different_sizes_in_one_request_and_across_requests(ready: Any) -> None:
    """Together, in rows of one engine, with text and pictures alone: each as by itself."""
    model, processor = ready
    requests = [
        ask(picture(300, 600), "and", picture(1, 1000, 1), "which?", name="two"),
        ask(picture(1, 1000, 1), picture(300, 600), name="turned round"),
        ask("text alone", name="text"),
        ask(picture(198, 176, 2), name="picture alone"),
    ]
    together = answers(Engine(model, processor, context=512, chunk=13, rows=4), *requests)
    for request in requests:
        alone = answers(Engine(model, processor, context=512), request)[request.id]
        assert together[request.id].token_ids == alone.token_ids
    first, second = (processor(request) for request in requests[:2])
    lengths = [[slot.end - slot.start for slot in prompt.slots] for prompt in (first, second)]
    assert lengths[0] == lengths[1][::-1] and lengths[0][0] != lengths[0][1]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_that_end_inside_a_picture_change_nothing(chunk: int, ready: Any) -> None:
    request = ask(picture(300, 600), "a", picture(198, 176, 1), "b")
    expected = answers(Engine(*ready, context=512), request)["r"].token_ids
    assert answers(Engine(*ready, context=512, chunk=chunk), request)["r"].token_ids == expected


def test_the_same_picture_is_found_in_the_cache_and_another_is_not(ready: Any) -> None:
    model, processor = ready
    request = ask(picture(300, 600), "what?")
    prompt = processor(request)
    engine = Engine(model, processor, context=512)
    first = answers(engine, request)["r"]
    again = answers(engine, request)["r"]
    assert again.usage.cached_tokens == len(prompt.ids) - 1
    assert again.token_ids == first.token_ids
    other = ask(picture(300, 600, seed=9), "what?")
    changed = answers(engine, other)["r"]
    assert changed.usage.cached_tokens == prompt.slots[0].start
    assert changed.token_ids == answers(Engine(model, processor, context=512), other)["r"].token_ids


def test_a_cached_prefix_may_end_inside_a_picture(ready: Any) -> None:
    model, processor = ready
    prompt = processor(ask(picture(300, 600), "what?"))
    features = list(model.encode_images(processor.pixels(prompt, [0])))
    whole = embed_rest(model, prompt, 0, features)
    inside = prompt.slots[0].start + 20
    assert torch.equal(embed_rest(model, prompt, inside, features), whole[:, inside:])


def test_case_21_an_image_token_that_was_typed_is_text(ready: Any) -> None:
    _, processor = ready
    prompt = processor(ask(picture(20, 20), "is <image> a word, <image>?"))
    (slot,) = prompt.slots
    assert prompt.ids.count(processor.placeholder_id) == slot.end - slot.start == processor.image_tokens((20, 20))
    assert processor.tokenizer.decode(prompt.ids[slot.end :]).count("<image>") == 2


def test_case_22_truncation_keeps_pictures_whole_or_is_refused(ready: Any) -> None:
    model, processor = ready
    request = ask(picture(300, 600), "between", picture(20, 20, 1), "end")
    prompt = processor(request)
    first, second = prompt.slots
    kept = last_tokens(prompt, len(prompt.ids) - first.end)
    assert [kept.ids[slot.start : slot.end] for slot in kept.slots] == [prompt.ids[second.start : second.end]]
    assert kept.slots[0].image == 1
    for start in (first.start + 1, first.end - 1, second.start + 5):
        with pytest.raises(UsageError, match="begin inside a picture's"):
            last_tokens(prompt, len(prompt.ids) - start)
    cut = replace(request, truncate=len(prompt.ids) - first.end, id="cut")
    plain = replace(request, id="plain")
    together = answers(Engine(model, processor, context=512, rows=2), cut, plain)
    assert together["cut"].usage.image_tokens == second.end - second.start
    assert together["plain"].usage.image_tokens == prompt.image_tokens
    alone = answers(Engine(model, processor, context=512), cut)["cut"]
    assert together["cut"].token_ids == alone.token_ids


def test_a_seed_gives_the_same_tokens_beside_other_pictures(ready: Any) -> None:
    sampling = SamplingParams(temperature=0.9, seed=7)
    request = ask(picture(198, 176), "say", name="seeded", sampling=sampling)
    alone = answers(Engine(*ready, context=512), request)["seeded"].token_ids
    others = [ask(picture(300, 600, i), "x", name=str(i)) for i in range(2)]
    assert answers(Engine(*ready, context=512, rows=3), *others, request)["seeded"].token_ids == alone


def test_the_plan_counts_the_most_tiles_and_tokens(folder: Path, tmp_path: Path) -> None:
    tiled, whole = read_config(folder), read_config(make_tiny_model(tmp_path, "llava_hf"))
    assert tiled.tiling is not None
    assert tiled.tokens_per_image == tiled.tiling.most_tokens == 16 + 8 * 9
    needs = [planner.Need(config, 0, torch.float32).plan(256, 0) for config in (tiled, whole)]
    assert needs[0].vision == 5 * needs[1].vision


@pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
def test_tiles_through_the_towers_one_call_do_not_depend_on_their_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path / "cache"))
    made = make_tiny_model(tmp_path / "model", "llava_next", quantize=32, dtype="float16", seed=3)
    model, processor = load(made, device="cpu", context=512)
    prompt = processor(ask(picture(300, 600), picture(1, 1000, 1), "?"))
    pixels = processor.pixels(prompt, [0, 1])
    with torch.inference_mode():
        together = model.encode_images(pixels)
        apart = [model.encode_images(processor.pixels(prompt, [i]))[0] for i in (0, 1)]
        tiles = torch.cat(pixels.pixels)
        one_by_one = torch.cat([model.vision_tower(tile[None]) for tile in tiles])
        in_a_row = model.vision_tower(tiles)
    assert model.vision_tower.one_call is not None
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert torch.equal(in_a_row, one_by_one)
    assert [len(rows) for rows in together] == [slot.end - slot.start for slot in prompt.slots]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_grid_pinpoints": [[56, 112]]}, r"image_grid_pinpoints are \[\(56, 112\)\] for the image processor"),
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not supported; take .* LLaVA-NeXT's"),
        ({"crop_size": {"height": 28, "width": 28}}, "makes 28 x 28 pixels, the vision tower takes 56 x 56"),
    ],
)
def test_an_image_processor_of_another_model_is_refused(
    change: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = tmp_path / "preprocessor_config.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), **change}))
    with pytest.raises(ModelError, match=words):
        Processor.from_folder(tmp_path, read_config(tmp_path))


def test_without_a_stored_processor_the_configs_resolutions_are_used(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("preprocessor_config.json", "processor_config.json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    prompt = Processor.from_folder(tmp_path, read_config(tmp_path))(ask(picture(300, 600)))
    assert prompt.image_tokens == 16 + 4 * 9
