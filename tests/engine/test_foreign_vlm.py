"""Vision-language models of transformers, batched with text: the tokens of their own generate, picture by picture."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_vlms import FAKE, FOREIGN, IMAGE, KINDS, UTTERANCE, idefics2, paligemma, words
from PIL import Image as Pictures
from tokenizers import Tokenizer, models
from transformers import (
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    PreTrainedTokenizerFast,
)

from tinychat.core import Failed, Finished, Image, Message, Request, SamplingParams, StoppingParams, Text, Token
from tinychat.engine.causal_lm import CausalLM, CausalLMBatch
from tinychat.engine.foreign import adapted, open_foreign, reader_of
from tinychat.engine.foreign_vlm import ForeignProcessor, ForeignVlm, Pixels
from tinychat.engine.prefill import Filling
from tinychat.engine.scheduler import Scheduler
from tinychat.errors import ModelError, UsageError

ANSWER = 6


@cache
def engine(kind: str) -> CausalLM:
    model, processor = KINDS[kind]()
    return CausalLM.from_model(model, ForeignProcessor(processor, model.config, model.generation_config))


@cache
def picture(seed: int) -> Image:
    size = ((60, 40), (30, 70), (56, 56))[seed % 3]
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    out = io.BytesIO()
    Pictures.fromarray(noise.to(torch.uint8).numpy()).save(out, "png")
    return Image(data=out.getvalue())


PROMPTS: dict[str, tuple[Any, ...]] = {
    "one": (picture(0), Text("what is it?")),
    "two": (picture(1), Text(" and "), picture(2), Text(" differ")),
    "neighbours": (picture(2), picture(0), Text("same?")),
    "text": (Text("no picture at all"),),
}
PREFIXED = ("one", "neighbours", "text")  # PaliGemma's pictures come first


def prompts(kind: str) -> list[str]:
    return [name for name in PROMPTS if kind != "paligemma" or name in PREFIXED]


def request(name: str, **sampling: Any) -> Request:
    return Request(
        name,
        parts=PROMPTS[name],
        sampling=SamplingParams(temperature=0.0, **sampling),
        stopping=StoppingParams(ANSWER, ignore_eos=True),
    )


def theirs_of(kind: str, name: str) -> dict[str, Any]:
    """What transformers' own processor makes of a prompt."""
    _, processor = KINDS[kind]()
    text = "".join(IMAGE if isinstance(part, Image) else part.text for part in PROMPTS[name])
    opened = [Pictures.open(io.BytesIO(part.data or b"")) for part in PROMPTS[name] if isinstance(part, Image)]
    if opened:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # numpy's, in PaliGemma's labels
            return dict(processor(images=[opened], text=[text], return_tensors="pt"))
    if kind == "paligemma":
        ids = torch.tensor([processor.tokenizer(f"<bos>{text}\n", add_special_tokens=False)["input_ids"]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return dict(processor(text=[text], return_tensors="pt"))


@cache
def solo(kind: str, name: str) -> tuple[int, ...]:
    """transformers' own answer."""
    model, _ = KINDS[kind]()
    inputs = theirs_of(kind, name)
    inputs.pop("labels", None)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER, pad_token_id=0)
    return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


def open_batch(lm: CausalLM, *requests: Request) -> CausalLMBatch:
    return CausalLMBatch.from_pb(requests, lm.reader.tokenizer, processor=lm.reader)


def finish(lm: CausalLM, batch: CausalLMBatch) -> dict[str, tuple[int, ...]]:
    going: CausalLMBatch | None = batch
    while going is not None:
        going.check()
        _, going = lm.generate_token(going)
    return {row.id: tuple(row.generated) for row in batch.rows}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_transformers_processors(kind: str) -> None:
    lm = engine(kind)
    for name in prompts(kind):
        prompt, theirs = lm.reader(request(name)), theirs_of(kind, name)["input_ids"][0]
        assert list(prompt.ids) == theirs.tolist(), name
        assert [slot.image for slot in prompt.slots] == list(range(len(prompt.images)))
        if kind != "llava_next":  # whose counts go by the picture's size
            counts = [slot.end - slot.start for slot in prompt.slots]
            assert counts == [24 if kind == "split" else 4] * len(prompt.images)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_pictures_and_text_answer_as_generate_does_alone(kind: str) -> None:
    """Sizes differ within a prompt and in the batch, and text rows are beside them."""
    lm = engine(kind)
    batch = open_batch(lm, *(request(name) for name in prompts(kind)))
    assert finish(lm, batch) == {name: solo(kind, name) for name in prompts(kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_join_late_and_leave_early(kind: str) -> None:
    lm, (first, *others) = engine(kind), prompts(kind)
    _, going = lm.generate_token(open_batch(lm, request(first)))
    _, late = lm.generate_token(open_batch(lm, *(request(name) for name in others)))
    assert going is not None and late is not None
    _, joined = lm.generate_token(CausalLMBatch.concatenate([late, going]))
    assert joined is not None
    answers = finish(lm, joined.filter([first])) | finish(lm, joined.filter(others[::-1]))
    assert answers == {name: solo(kind, name) for name in prompts(kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_scheduler_gives_the_solo_answers(kind: str) -> None:
    """Prompts in pieces of three tokens, but for those that are read whole; the second time much of them is cached."""
    scheduler = Scheduler(engine(kind), rows=2, chunk=8, between=3)
    answers = dict[str, tuple[int, ...]]()
    for turn in range(2):
        for name in prompts(kind):
            scheduler.submit(replace(request(name), id=f"{turn} {name}"))
    while scheduler.busy:
        for event in scheduler.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                answers[event.request_id] = event.token_ids
    assert answers == {f"{turn} {name}": solo(kind, name) for turn in range(2) for name in prompts(kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_had_to_wait_goes_on_as_it_would_have(kind: str) -> None:
    """What it has said is read again after its prompt, which alone is read in both directions."""
    scheduler, (first, second, *_) = Scheduler(engine(kind), rows=1), prompts(kind)
    scheduler.submit(request(first))
    urgent = [replace(request(second), priority=1)]
    answers, said = dict[str, tuple[int, ...]](), 0
    while scheduler.busy:
        for event in scheduler.step():
            said += isinstance(event, Token)
            if isinstance(event, Finished):
                answers[event.request_id] = event.token_ids
        if said >= 3 and urgent:
            scheduler.submit(urgent.pop())
    assert scheduler.preempted == 1 and list(answers) == [second, first]
    assert answers == {name: solo(kind, name) for name in (first, second)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_encoded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = engine(kind), list[Pixels]()
    encode = ForeignVlm.encode_images
    monkeypatch.setattr(ForeignVlm, "encode_images", lambda model, one: seen.append(one) or encode(model, one))
    finish(lm, open_batch(lm, request("one"), request("neighbours"), request("text")))
    assert len(seen) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_typed_placeholders_are_text(kind: str) -> None:
    lm = engine(kind)
    typed = Request("r", parts=(picture(0), Text(f"is {IMAGE} a {FAKE}?")))
    prompt = lm.reader(typed)
    special = {lm.reader.tokenizer.convert_tokens_to_ids(text) for text in (IMAGE, FAKE)}
    after = prompt.ids[prompt.slots[0].end + (kind != "paligemma") :]
    assert len(prompt.slots) == 1 and not special & set(after)
    assert IMAGE in lm.reader.tokenizer.decode(after)


def test_pictures_tell_prompts_apart() -> None:
    lm = engine("idefics2")
    same, other = (lm.reader(Request("r", parts=(picture(i), Text("hm")))) for i in (0, 3))
    assert same.ids == other.ids and same.keys() != other.keys()
    assert same.keys() == lm.reader(Request("r", parts=(picture(0), Text("hm")))).keys()


def test_messages_go_through_the_processors_template() -> None:
    model, processor = idefics2(False)
    template = (
        "{% for message in messages %}{{ message.role }}:{% for part in message.content %}{% if part.type == 'image' %}"
        "<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = words()
    tokenizer.add_tokens([UTTERANCE])
    own = Idefics2Processor(processor.image_processor, tokenizer, image_seq_len=4, chat_template=template)
    reader = ForeignProcessor(own, model.config, model.generation_config)
    prompt = reader(Request("r", (Message("user", (picture(0), Text("what?"))),)))
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    text = own.apply_chat_template(turns, add_generation_prompt=True)
    picture_of = Pictures.open(io.BytesIO(picture(0).data or b""))
    assert list(prompt.ids) == own(text=[text], images=[[picture_of]])["input_ids"][0]
    assert tokenizer.convert_tokens_to_ids(UTTERANCE) in reader.stop_ids


def test_a_prompt_read_in_both_directions_has_no_log_probabilities() -> None:
    with pytest.raises(UsageError, match="reads its prompts in both directions"):
        engine("paligemma").reader(request("one", prompt_logprobs=True))


def test_a_guess_is_not_read_in_both_directions() -> None:
    """Tokens that are verified together give the logits that they give one by one."""
    lm = engine("paligemma")
    batch = open_batch(lm, request("one"))
    lm.generate_token(batch)
    caches = [lm.model.make_cache(1, 64) for _ in range(2)]
    for one in caches:
        filling = Filling(lm.model, batch.rows[0].prompt, one)
        filling.look(lm.pixels(filling.prompt, filling.unseen[0]))
        filling.read(4)
        assert one.lengths == [len(filling.prompt.ids)], "read whole"
    guess = torch.tensor([[7, 300, 12, 7]])
    together = lm.model.verify(guess, caches[0])
    alone = [lm.model.decode(guess[:, i : i + 1], caches[1]) for i in range(4)]
    assert torch.allclose(together, torch.cat(alone, 1), atol=1e-4)


def test_the_mask_of_a_first_piece_and_of_a_later_one() -> None:
    """Rows of 0 and of 2 cached tokens read two more: the first sees both, the second what came before."""
    mask = ForeignVlm(paligemma()[0])._mask(torch.tensor([[0], [2]]), 2)
    assert (mask[:, 0] == 0).tolist() == [
        [[False, False, True, True], [False, False, True, True]],
        [[True, True, True, False], [True, True, True, True]],
    ]


def test_prompt_log_probabilities_of_a_prompt_with_pictures() -> None:
    lm, (model, _) = engine("idefics2"), idefics2(False)
    (generation,), _ = lm.generate_token(open_batch(lm, request("one", prompt_logprobs=True)))
    inputs = theirs_of("idefics2", "one")
    with torch.no_grad():
        logprobs = model(**inputs).logits[0].log_softmax(-1)
    assert generation.prefill_tokens is not None
    told = torch.tensor(generation.prefill_tokens.logprobs[1:])
    assert torch.allclose(told, logprobs[:-1].gather(1, inputs["input_ids"][0, 1:, None])[:, 0], atol=1e-4)


def test_a_model_whose_pictures_are_unknown_is_refused() -> None:
    model, _ = idefics2(False)
    config = type(model.config)(**model.config.to_dict())
    other: Any = Idefics2ForConditionalGeneration(config)
    other.config.model_type = "nobodys"
    with pytest.raises(ModelError, match="how a 'nobodys' model sees pictures is not known; known are idefics2"):
        adapted(other)


def test_a_tokenizer_without_the_image_token_is_refused() -> None:
    model, processor = paligemma()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ModelError, match="the tokenizer has no <image>"):
        ForeignProcessor(SimpleNamespace(tokenizer=tokenizer, image_processor=processor.image_processor), model.config)


# Opening.


def saved(kind: str, folder: Path) -> Path:
    model, processor = KINDS[kind]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def answers_of(lm: CausalLM, kind: str) -> bool:
    return finish(lm, open_batch(lm, *(request(name) for name in prompts(kind)))) == {
        name: solo(kind, name) for name in prompts(kind)
    }


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_is_opened_with_its_processor(kind: str, tmp_path: Path) -> None:
    lm = CausalLM(str(saved(kind, tmp_path)))
    assert isinstance(lm.model, ForeignVlm) and isinstance(lm.reader, ForeignProcessor) and lm.context == 256
    assert answers_of(lm, kind)


def test_classes_of_transformers_may_be_named(tmp_path: Path) -> None:
    folder = saved("split", tmp_path)
    opened = open_foreign(
        str(folder),
        Idefics2ForConditionalGeneration,
        processor_class=Idefics2Processor,
        processor_kwargs={"do_image_splitting": False},
        dtype=torch.float32,
    )
    assert len(opened.reader(request("one")).ids) < len(engine("split").reader(request("one")).ids)


def test_a_processor_of_transformers_is_wrapped() -> None:
    model, processor = paligemma()
    assert isinstance(reader_of(processor, model), ForeignProcessor)
    reader = engine("paligemma").reader
    assert reader_of(reader, model) is reader
