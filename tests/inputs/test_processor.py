"""Prompts: parity with transformers, BOS once, answers spliced so that a turn extends the last, slots in place."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pillow
from tokenizers import Tokenizer
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tinychat.core import Image, Message, Request, Text
from tinychat.errors import FormatError, MediaError, ModelError, UsageError
from tinychat.inputs.images import image_processor_for
from tinychat.inputs.processor import Processor, Slot
from tinychat.inputs.templates import ROWS

JINJA = ["chatml", "chatml_image", "llama_3", "llava_hf", "mistral"]
ALL = [(name, None) for name in JINJA] + [("llama", row) for row in ROWS] + [("llama_legacy", row) for row in ROWS]
ALL += [("bare_chatml", "chatml"), ("bare_chatml", "hermes-2"), ("bare_llama_3", "llama_3")]


def picture(seed: int = 0, height: int = 20, width: int = 30) -> Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    pillow.fromarray(values).save(buffer, "PNG")
    return Image(data=buffer.getvalue())


def ask(*messages: Message) -> Request:
    return Request("r", messages=messages)


def user(*parts: str | Image) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def system(text: str) -> Message:
    return Message("system", (Text(text),))


def answer(text: str, *token_ids: int) -> Message:
    return Message("assistant", (Text(text),), token_ids or None)


@pytest.fixture(scope="module")
def make(tokenizers, configs):
    def build(name: str, template: str | None = None, *, vision: str = "clip", generation=None, **fields) -> Processor:
        config = configs(vision, **fields)
        image_processor = image_processor_for(config.vision) if config.vision else None
        return Processor(tokenizers(name), image_processor, config, generation, template)

    return build


# parity with transformers


@pytest.mark.parametrize("name", ["chatml", "llama_3", "mistral"])
@settings(max_examples=25)
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="<>[]"), max_size=20), min_size=3, max_size=3
    )
)
def test_harmless_chats_equal_apply_chat_template(name, texts, make, tokenizers):
    texts = ["".join(c for c in text if not "\ufdd0" <= c <= "\ufdef") for text in texts]
    messages = [user(texts[0]), answer(texts[1]), user(texts[2])]
    theirs = [{"role": message.role, "content": message.text} for message in messages]
    expected = tokenizers(name).apply_chat_template(theirs, add_generation_prompt=True, return_dict=False)
    assert list(make(name)(ask(*messages)).ids) == expected


def test_ids_and_pixels_equal_transformers_llava_processor(make, tokenizers):
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    tokenizer = tokenizers("llava_hf")
    theirs = LlavaProcessor(
        CLIPImageProcessorPil(**sizes), tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=tokenizer.chat_template,
    )  # fmt: skip
    images = [picture(1), picture(2, 40, 25)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is red?"}]
    text = theirs.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    decoded = [pillow.open(io.BytesIO(image.data)) for image in images]
    expected = theirs(images=decoded, text=text, return_tensors="pt")
    processor = make("llava_hf")
    prompt = processor(ask(user(*images, "Which is red?")))
    assert list(prompt.ids) == expected["input_ids"][0].tolist()
    assert torch.equal(processor.pixels(prompt, [0, 1]), expected["pixel_values"])
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert [i for slot in prompt.slots for i in prompt.ids[slot.start : slot.end]] == [image_token] * 8


def test_llava_and_vila_tokenize_around_pictures_by_stretches(make, tokenizers):
    """Their own prompts: the text is cut at <image>, each stretch tokenized alone, BOS kept at the first one only."""
    tokenizer = tokenizers("llama_legacy")
    text = ROWS["vicuna_v1"].system + " USER: <image>\nWhat is it? ASSISTANT:"
    first, second = (tokenizer(stretch)["input_ids"] for stretch in text.split("<image>"))
    prompt = make("llama_legacy", "vicuna_v1")(ask(user(picture(), "What is it?")))
    assert list(prompt.ids) == [*first, 0, 0, 0, 0, *second[1:]]
    assert prompt.slots == (Slot(len(first), len(first) + 4, 0),)


# one turn after another


typed = st.one_of(st.text(max_size=12), st.sampled_from(["</s>", "<image> x", "<|im_end|>", " ", ""]))
answers = st.lists(st.integers(3, 99), max_size=5)


@settings(max_examples=8)
@given(words=st.lists(typed, min_size=3, max_size=3), said=st.lists(answers, min_size=2, max_size=2))
@pytest.mark.parametrize(("name", "template"), ALL)
def test_a_turn_extends_the_last_one_exactly(name, template, words, said, make):
    processor = make(name, template)
    messages = [system("Be {kind}."), user(picture(1), words[0])]
    for tokens, word in zip(said, words[1:], strict=True):
        before = processor(ask(*messages)).keys()
        messages += [Message("assistant", (Text("other words"),), tuple(tokens)), user(picture(2), word)]
        after = processor(ask(*messages)).keys()
        assert after[: len(before) + len(tokens)] == (*before, *tokens)
        assert len(after) > len(before) + len(tokens)


def test_an_answer_with_the_images_own_token_id_is_no_slot(make, tokenizers):
    image_token = tokenizers("chatml_image").convert_tokens_to_ids("<image>")
    prompt = make("chatml_image")(ask(user(picture(), "a"), answer("b", image_token, image_token), user("c")))
    assert len(prompt.slots) == 1
    assert prompt.ids.count(image_token) == 4 + 2


def test_a_template_that_rewrites_old_turns_gets_the_answers_text(make, tokenizers, tmp_path):
    """Thinking models' templates put something into the header of the answer to come that old answers do not have."""
    path = tmp_path / "think.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    prompt = make("chatml", str(path))(ask(user("q"), answer("blue", 7, 7), user("r")))
    assert tokenizers("chatml").decode(prompt.ids) == "user: q\nassistant: blue\nuser: r\nassistant: <think>"


def test_a_template_that_drops_an_answer(make, tokenizers, tmp_path):
    path = tmp_path / "last.jinja"
    path.write_text("{{ messages[-1].content }}")
    prompt = make("chatml", str(path))(ask(user("q"), answer("blue", 7, 7), user("r")))
    assert tokenizers("chatml").decode(prompt.ids) == "r"


def test_an_end_mark_that_is_not_one_token_stands_once_where_the_answer_is_text(make, tokenizers):
    """So a session keeps an answer that a stop string ended: its tokens would bring the mark a second time."""
    processor = make("chatml", "vicuna_v1")
    assert processor.stop_strings == ("</s>",)
    text = tokenizers("chatml").decode(processor(ask(user("q"), answer("yes"), user("r"))).ids)
    assert text.endswith(" USER: q ASSISTANT: yes</s>USER: r ASSISTANT:")


# typed text


@pytest.mark.parametrize(("name", "template"), [*ALL[:6], ("bare_llama_3", "llama_3")])
@settings(max_examples=15)
@given(st.lists(st.one_of(st.sampled_from(["<image>", "<|im_end|>", "</s>", "<s>"]), st.text(max_size=9)), max_size=4))
def test_typed_text_adds_no_special_id_and_moves_no_slot(name, template, make, pieces):
    processor = make(name, template)
    harmless, typed = (processor(ask(user(picture(), text))) for text in ("x", "x".join(pieces)))
    special = processor.marked.special_ids

    def count(prompt):
        return [i for i in prompt.ids if i in special]

    assert typed.slots == harmless.slots
    assert count(typed) == count(harmless)


def test_a_special_token_across_two_texts_stays_text(make):
    processor = make("chatml")
    whole, parts = (processor(ask(user(*texts))) for texts in (["<|im_end|>"], ["<|im_", "end|>"]))
    assert whole.ids == parts.ids


def test_a_raw_prompt_has_no_template_and_bos_once(make, tokenizers):
    prompt = make("llama")(Request("r", parts=(Text("the "), picture(), Text("the </s>"))))
    tokenizer = tokenizers("llama")
    a = tokenizer("the ")["input_ids"]
    assert prompt.ids[: len(a) + 4] == (*a, 0, 0, 0, 0)
    assert prompt.slots == (Slot(len(a), len(a) + 4, 0),)
    assert tokenizer.decode(prompt.ids[len(a) + 4 :]) == "the </s>"
    assert tokenizer.eos_token_id not in prompt.ids


@pytest.mark.parametrize(("name", "template"), ALL)
def test_bos_is_there_once_or_not_at_all(name, template, make, tokenizers):
    bos = tokenizers(name).bos_token_id
    ids = make(name, template)(ask(user("q"))).ids
    if bos is None:
        assert None not in ids
    else:
        assert (ids[0], ids.count(bos)) == (bos, 1)


def test_bos_of_a_row_where_the_tokenizer_adds_none(tokenizers, configs):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=without_post_processor(tokenizers("llama")), bos_token="<s>")
    assert Processor(tokenizer, None, configs(), template="vicuna_v1")(ask(user("q"))).ids.count(1) == 1
    assert 1 not in Processor(tokenizer, None, configs(), template="chatml")(ask(user("q"))).ids
    assert 1 not in Processor(tokenizer, None, configs())(Request("r", parts=(Text("q"),))).ids


def without_post_processor(tokenizer):
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**raw, "post_processor": None}))


# pictures


def test_pictures_stand_where_they_stand_in_the_message(make, tokenizers):
    prompt = make("chatml", image_token_id=9)(ask(user("a", picture(1), picture(2), "b", picture(3))))
    text = tokenizers("chatml").decode([i for i in prompt.ids if i != 9])
    assert "user\na\n\nb<|im_end|>" in text  # a newline after each picture but the last part of the message
    assert [slot.image for slot in prompt.slots] == [0, 1, 2]
    assert all(prompt.ids[slot.start : slot.end] == (9,) * 4 for slot in prompt.slots)
    assert prompt.image_tokens == 12
    assert prompt.slots[1].start - prompt.slots[0].end == 1


def test_the_suffix_of_newer_models_replaces_the_newline(make, tokenizers):
    newline = tokenizers("chatml_image")("\n")["input_ids"]
    prompt = make("chatml_image", image_suffix="\n")(ask(user(picture(), "b")))
    end = prompt.slots[0].end
    assert list(prompt.ids[end : end + 2]) == [*newline, *tokenizers("chatml_image")("b")["input_ids"]]


def test_keys_name_a_picture_by_content_and_mode(make):
    question = ask(user(picture(1), "b", picture(1), picture(2)))
    prompt = make("chatml", image_aspect_ratio="pad")(question)
    other = make("chatml", image_aspect_ratio="resize")(question)
    keys, slots = prompt.keys(), prompt.slots
    first, same, different = (keys[slot.start : slot.end] for slot in slots)
    assert first == same != different
    assert [offset for _, offset in first] == [0, 1, 2, 3]
    assert other.keys()[slots[0].start] != first[0]
    assert keys[: slots[0].start] == prompt.ids[: slots[0].start]
    assert len(keys) == len(prompt.ids)


def test_only_the_pictures_asked_for_are_decoded(make, monkeypatch):
    processor = make("chatml", image_aspect_ratio="pad")
    with monkeypatch.context() as patch:
        patch.setattr(pillow.Image, "convert", lambda *_: pytest.fail("decoded"))
        prompt = processor(ask(user(picture(1), picture(2, 33, 44), "b")))
    assert prompt.sizes == ((20, 30), (33, 44))
    both = processor.pixels(prompt, [0, 1])
    assert both.shape == (2, 3, 28, 28)
    assert torch.equal(processor.pixels(prompt, [1]), both[1:])


def test_bad_pictures_fail_at_the_header_or_at_the_pixels(make, tmp_path):
    processor = make("chatml")
    with pytest.raises(MediaError, match=r"gone\.png does not exist"):
        processor(ask(user(Image(path=str(tmp_path / "gone.png")))))
    cut = Image(data=picture(0, 60, 60).data[:4000])
    prompt = processor(ask(user(cut, "a")))
    with pytest.raises(MediaError, match="is damaged"):
        processor.pixels(prompt, [0])


def test_a_text_model_takes_no_pictures(make):
    processor = make("chatml", vision="")
    assert processor(ask(user("a"))).slots == ()
    with pytest.raises(UsageError, match="reads text only and was given 2 images; take a vision model"):
        processor(ask(user(picture(), picture(), "a")))


def test_the_last_word_is_the_users(make):
    with pytest.raises(UsageError, match="the last message is the assistant's own"):
        make("chatml")(ask(user("a"), answer("b")))


# stops


def test_stops_are_united(make, tokenizers):
    added = tokenizers("llama_3").get_added_vocab()
    processor = make("llama_3", generation={"eos_token_id": [300, 301]})
    assert processor.stop_ids == {300, 301, added["<|end_of_text|>"], added["<|eot_id|>"]}
    assert processor.stop_strings == ()
    assert make("llama", "vicuna_v1", generation={"eos_token_id": 5}).stop_ids == {2, 5}
    assert make("llama", "vicuna_v1").stop_strings == ()
    assert make("llama", "plain").stop_strings == ()
    assert make("llama", "chatml").stop_strings == ("<|im_end|>",)
    assert make("bare_chatml", "chatml").stop_ids == {0, 2}


# folders


def save(folder, tokenizer, **files):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def test_a_vila_folder(tmp_path, tokenizers, configs):
    save(tmp_path / "llm", tokenizers("chatml"), generation_config={"eos_token_id": [77]})
    (tmp_path / "vision_tower").mkdir()
    stored = {"image_processor_type": "CLIPImageProcessor", "size": 28, "crop_size": 28, "image_mean": [0.0] * 3}
    (tmp_path / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(stored))
    processor = Processor.from_folder(tmp_path, configs())
    assert processor.template.name == "jinja"
    assert processor.stop_ids == {2, 77}
    assert list(processor.image_processor.image_mean) == [0.0] * 3
    assert Processor.from_folder(tmp_path, configs(), "hermes-2").template.name == "hermes-2"


def test_a_single_folder_of_a_foreign_type(tmp_path, tokenizers, configs, caplog):
    save(tmp_path, tokenizers("llama"), config={"model_type": "llava_llama", "mm_vision_tower": "x"})
    processor = Processor.from_folder(tmp_path, configs())
    assert processor.template.name == "vicuna_v1"
    assert list(processor(ask(user("the"))).ids) == list(
        Processor(tokenizers("llama"), None, configs())(ask(user("the"))).ids
    )
    assert not caplog.records


def test_a_folder_of_transformers_own_llava(tmp_path, tokenizers, configs):
    tokenizer = tokenizers("llava_hf")
    theirs = LlavaProcessor(
        CLIPImageProcessorPil(size=28, crop_size=28), tokenizer, chat_template=tokenizer.chat_template
    )
    theirs.save_pretrained(tmp_path)
    processor = Processor.from_folder(tmp_path, configs())
    assert processor.template.places_images
    assert processor(ask(user(picture(), "a"))).image_tokens == 4


def test_a_chat_template_in_its_own_file(tmp_path, tokenizers, configs):
    save(
        tmp_path,
        tokenizers("bare_chatml"),
        chat_template={"chat_template": "{% for m in messages %}{{ m.content }}!{% endfor %}"},
    )
    processor = Processor.from_folder(tmp_path, configs())
    assert processor.tokenizer.decode(processor(ask(user("a"))).ids) == "a!"


def test_a_folder_without_tokenizer(tmp_path, configs):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ModelError, match=r"tokenizer\.json or tokenizer\.model or .* was looked for in .*, found model\.safetensors"
    ):
        Processor.from_folder(tmp_path, configs())


def test_a_damaged_tokenizer(tmp_path, configs):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="cannot be read"):
        Processor.from_folder(tmp_path, configs())


@pytest.mark.parametrize(
    ("damaged", "text", "sentence"),
    [
        ("tokenizer.json", '{"a":', r"tokenizer\.json is not valid JSON .*; download or copy the file again"),
        ("tokenizer.json", "", r"tokenizer\.json is not valid JSON"),
        ("tokenizer.json", "null", r"tokenizer\.json holds a NoneType, not an object"),
        ("tokenizer.json", '{"a": 1}', r"cannot be read \(KeyError: 'added_tokens'\); copy its files again"),
        ("tokenizer.json", '{"model": {"type": "X"}, "added_tokens": []}', r"cannot be read \(Exception: "),
        ("tokenizer.json", '{"added_tokens": 3}', r"cannot be read \(TypeError: "),
        ("tokenizer_config.json", '{"a":', r"tokenizer_config\.json is not valid JSON"),
    ],
)
def test_a_damaged_json_file_of_a_tokenizer(tmp_path, tokenizers, configs, damaged, text, sentence):
    save(tmp_path, tokenizers("chatml"))
    (tmp_path / damaged).write_text(text)
    with pytest.raises(FormatError, match=sentence) as caught:
        Processor.from_folder(tmp_path, configs())
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("short", [0, 1, 9])
def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizers, configs, short):
    tokenizer = tokenizers("chatml")
    config = configs("", vocab_size=len(tokenizer) - short)
    if not short:
        assert Processor(tokenizer, None, config)(ask(user("q"))).ids
        return
    sizes = f"ids up to {len(tokenizer) - 1}, the model's vocabulary has {len(tokenizer) - short} tokens; copy the"
    with pytest.raises(ModelError, match=sizes):
        Processor(tokenizer, None, config)


def test_padding_and_image_tokens_need_no_row_in_the_embedding(new_tokenizer, configs):
    """Fine-tuning tools add them to the tokenizer alone."""
    tokenizer = new_tokenizer
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    config = configs(vocab_size=size)
    prompt = Processor(tokenizer, image_processor_for(config.vision), config)(ask(user(picture(), "a <pad> <image>")))
    assert prompt.image_tokens == 4
    assert max(prompt.ids) < size


def test_pixels_of_another_size_than_the_towers_are_refused(tokenizers, configs):
    config = configs()
    stored = {"image_processor_type": "CLIPImageProcessor", "size": 56, "crop_size": 56}
    with pytest.raises(ModelError, match="makes 56 x 56 pixels, the vision tower takes 28 x 28"):
        Processor(tokenizers("llama"), image_processor_for(config.vision, stored), config)
