"""Batches with pictures: pixels are held until they are looked at, and once; signatures are LoRAX's."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image as Pictures

from make_tiny_model import make_tiny_model
from tinychat.core import Image, Request, SamplingParams, StoppingParams, Text
from tinychat.engine.batch import CausalLMBatch
from tinychat.engine.causal_lm import CausalLM
from tinychat.engine.vlm_causal_lm import VlmCausalLM, VlmCausalLMBatch
from tinychat.errors import UsageError
from tinychat.load import load
from tinychat.models.vila_llama import VilaLlamaForCausalLM

LAYOUTS = ("vila", "llava_next")


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), layout=request.param, seed=3)


@pytest.fixture(scope="module")
def lm(folder: Path) -> VlmCausalLM:
    return VlmCausalLM.from_model(*load(folder, device="cpu"), context=400)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    made, folder = list[Image](), tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(((30, 30), (60, 20), (17, 70))):
        path = folder / f"{i}.png"
        Pictures.new("RGB", size, (60 * i, 90, 200 - 50 * i)).save(path)
        made.append(Image(path=str(path)))
    return made


def request(name: str, *parts: str | Image, tokens: int = 5, **sampling: Any) -> Request:
    asked = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    stopping = StoppingParams(tokens, ignore_eos=True)
    return Request(name, parts=asked, sampling=SamplingParams(**sampling), stopping=stopping)


def mixed(pictures: list[Image]) -> list[Request]:
    """Pictures of other sizes, two in one request, one alone, none at all."""
    red, wide, tall = pictures
    return [
        request("one", "look ", red, " now"),
        request("two", wide, " and ", tall, tokens=7),
        request("none", "only words", temperature=0.8, seed=3),
        request("alone", tall, tokens=3),
    ]


def batch_of(lm: VlmCausalLM, *requests: Request) -> VlmCausalLMBatch:
    return lm.batch_type.from_requests(0, [(one, one) for one in requests], lm.reader, 400, lm.device)


def answers(lm: VlmCausalLM, batch: CausalLMBatch | None) -> dict[Any, list[int]]:
    said = dict[Any, list[int]]()
    while batch is not None:
        batch.check()
        made, batch = lm.generate_token(batch)
        for generation in made:
            said.setdefault(generation.request_id, []).extend(generation.next_tokens.ids)
    return said


def test_rows_with_pictures_say_what_they_say_alone(lm: VlmCausalLM, pictures: list[Image]) -> None:
    alone = {one.id: answers(lm, batch_of(lm, one))[one.id] for one in mixed(pictures)}
    assert answers(lm, batch_of(lm, *mixed(pictures))) == alone


def test_pixels_are_dropped_with_the_prefill(lm: VlmCausalLM, pictures: list[Image]) -> None:
    batch = batch_of(lm, *mixed(pictures))
    assert batch.pixel_values is not None and len(batch.pixel_values) == 4 and batch.pixel_attention_mask is None
    assert batch.image_sizes == [(30, 30), (20, 60), (70, 17), (70, 17)]
    _, following = lm.generate_token(batch)
    assert following is not None and getattr(following, "pixel_values", None) is None
    logits, speculative = lm.forward(batch, None)
    assert speculative is None and logits.shape[0] == 4
    assert batch.pixel_values is None and batch.image_sizes is None and batch.past_key_values is not None


def test_pictures_are_looked_at_once(lm: VlmCausalLM, pictures: list[Image], monkeypatch: pytest.MonkeyPatch) -> None:
    looks, real = list[Any](), type(lm.model).encode_images

    def counted(self: Any, images: Any) -> Any:
        looks.append(images)
        return real(self, images)

    monkeypatch.setattr(type(lm.model), "encode_images", counted)
    answers(lm, batch_of(lm, *mixed(pictures)))
    assert len(looks) == 4


def test_filtering_before_the_prefill_keeps_pictures(lm: VlmCausalLM, pictures: list[Image]) -> None:
    alone = {one.id: answers(lm, batch_of(lm, one))[one.id] for one in mixed(pictures)}
    batch = batch_of(lm, *mixed(pictures)).filter(["alone", "two"])
    assert isinstance(batch, VlmCausalLMBatch) and batch.image_sizes == [(70, 17), (20, 60), (70, 17)]
    assert answers(lm, batch) == {name: alone[name] for name in ("alone", "two")}


def test_batches_whose_pictures_nobody_has_seen_are_not_joined(lm: VlmCausalLM, pictures: list[Image]) -> None:
    ready = batch_of(lm, request("a", pictures[0]))
    lm.forward(ready)
    with pytest.raises(UsageError, match="only prefilled batches are concatenated"):
        VlmCausalLMBatch.concatenate([ready, batch_of(lm, request("b", pictures[0]))])


def test_forward_is_a_step(lm: VlmCausalLM, pictures: list[Image]) -> None:
    """Its likeliest tokens are those of generate_token, a row's guesses included."""
    said = answers(lm, batch_of(lm, request("a", pictures[0], "one two one two", tokens=4)))["a"]
    batch = batch_of(lm, request("a", pictures[0], "one two one two", tokens=4))
    logits, _ = lm.forward(batch)
    found = [int(logits[0].argmax())]
    batch.rows[0].push(found[0])
    logits, _ = lm.forward(batch)
    assert logits.shape[0] == 1
    assert [*found, int(logits[0].argmax())] == said[:2]


def test_forward_reads_guesses_as_well(lm: VlmCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(lm, request("a", "one two one two one", tokens=40))
    lm.forward(batch)
    batch.rows[0].push(batch.rows[0].ids[-2])
    monkeypatch.setattr(lm, "speculate", 3, raising=False)
    guess, length = lm.guess(batch), batch.past_key_values.lengths[0]  # type: ignore[union-attr]
    logits, _ = lm.forward(batch)
    assert len(guess) == 3 and logits.shape[0] == 4 and batch.past_key_values.lengths[0] == length + 4  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="adapter data is given"):
        lm.forward(batch, object())


def test_messages_with_chunks_are_requests_with_parts(lm: VlmCausalLM, pictures: list[Image]) -> None:
    data = Path(pictures[0].path or "").read_bytes()
    chunks = [
        SimpleNamespace(text="look "),
        SimpleNamespace(image=SimpleNamespace(data=data, mimetype="image/png"), text=""),
    ]
    message = SimpleNamespace(
        id=4, inputs="", truncate=0, parameters=SimpleNamespace(temperature=0.0, seed=0), adapter_index=0,
        stopping_parameters=SimpleNamespace(max_new_tokens=5, stop_sequences=[], ignore_eos_token=True),
        tokenized_inputs=SimpleNamespace(input_chunks=chunks),
    )  # fmt: skip
    batch = VlmCausalLMBatch.from_pb([message], lm.reader.tokenizer, processor=lm.reader)
    assert answers(lm, batch)[4] == answers(lm, batch_of(lm, request("a", "look ", pictures[0])))["a"]
    prompts, pixels = VlmCausalLMBatch.batch_tokenized_inputs([message], lm.reader.tokenizer, lm.reader, None)
    assert len(prompts[0].slots) == 1 and len(pixels[0]) == 1


def test_a_tokenizer_alone_makes_no_pictures(lm: VlmCausalLM) -> None:
    with pytest.raises(UsageError, match="a batch with pictures needs a processor"):
        VlmCausalLMBatch.from_pb([], lm.reader.tokenizer)


def test_ours_opens_by_its_class(folder: Path, lm: VlmCausalLM, pictures: list[Image]) -> None:
    opened = VlmCausalLM(str(folder), VilaLlamaForCausalLM, adapter_id="", adapter_source="hub")
    assert opened.max_past() is None
    asked = request("a", "look ", pictures[1])
    assert answers(opened, batch_of(opened, asked)) == answers(lm, batch_of(lm, asked))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapter_id": "mine"}, "the adapter 'mine' from 'hub' is asked for"),
        ({"adapter_id": "", "lora": 1}, "lora is not known"),
    ],
)
def test_what_nothing_here_takes_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        VlmCausalLM("nowhere", VilaLlamaForCausalLM, adapter_source="hub", **given)


# Signatures, as LoRAX documents them: names, in order, and whether they have a default


def names(call: Any) -> list[str]:
    return [
        name if one.default is one.empty else f"{name}=" for name, one in inspect.signature(call).parameters.items()
    ]


PB = ["pb", "tokenizer", "tokenizers=", "processor=", "config=", "dtype=", "device="]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (CausalLM, ["model_id", "revision=", "quantize=", "compile=", "dtype=", "trust_remote_code="]),
        (
            CausalLM.forward,
            ["self", "input_ids", "attention_mask", "position_ids", "past_key_values=", "adapter_data="],
        ),
        (CausalLM.generate_token, ["self", "batch"]),
        (CausalLMBatch.from_pb, PB),
        (CausalLMBatch.filter, ["self", "request_ids"]),
        (CausalLMBatch.concatenate, ["batches"]),
        (
            VlmCausalLM,
            ["model_id", "model_class", "processor_class=", "processor_kwargs=", "batch_class=", "adapter_id",
             "adapter_source", "revision=", "dtype=", "trust_remote_code=", "kwargs"],
        ),
        (VlmCausalLM.forward, ["self", "batch", "adapter_data="]),
        (VlmCausalLM.max_past, ["self"]),
        (VlmCausalLMBatch.from_pb, PB),
        (VlmCausalLMBatch.batch_tokenized_inputs, ["requests", "tokenizer", "processor", "config"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)  # fmt: skip
def test_signatures_are_loraxs(call: Any, expected: list[str]) -> None:
    assert names(call) == expected


def test_keyword_only_arguments_are_loraxs() -> None:
    kinds = inspect.signature(VlmCausalLM).parameters
    assert [name for name, one in kinds.items() if one.kind is one.KEYWORD_ONLY][:2] == [
        "processor_class",
        "processor_kwargs",
    ]
    assert kinds["kwargs"].kind is inspect.Parameter.VAR_KEYWORD and kinds["batch_class"].default is VlmCausalLMBatch


def test_a_batch_has_loraxs_fields(lm: VlmCausalLM) -> None:
    fields = (
        "batch_id requests requests_idx_mapping input_ids attention_mask position_ids past_key_values all_input_ids "
        "input_lengths prefix_offsets read_offsets next_token_choosers stopping_criterias adapter_meta "
        "max_input_length padding_right_offset max_tokens keys_head_dim_last pixel_values pixel_attention_mask "
        "image_sizes"
    )
    batch = batch_of(lm, request("a", "x"), request("b", "longer than that"))
    values = {name: getattr(batch, name) for name in fields.split()}
    assert all(len(value) == 2 for value in values.values() if isinstance(value, list) and value)
    assert values["keys_head_dim_last"] is True and values["adapter_meta"].segment_indices == (0,)
    assert isinstance(values["input_ids"], torch.Tensor)
    assert lm.dynamic_adapter_loading_enabled is False and CausalLM.batch_type.fget(lm) is CausalLMBatch  # type: ignore[attr-defined]
