"""The training: it teaches exactly what the runtime will ask, resumes where it stopped, and exports what ships."""

from __future__ import annotations

import argparse
import io
import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image as Pictures
from transformers import PreTrainedTokenizerFast

import train_demo_model as training
from demo_export import PREPROCESSOR, add_scores, export
from demo_tokenizer import build_tokenizer
from tinychat.core import Image, Message, Request, Text
from tinychat.eval.demo import TASKS, Sample, sample_at
from tinychat.inputs.images import image_processor_for
from tinychat.inputs.processor import Processor
from tinychat.load import load, quant_spec
from tinychat.models.vila_fusion import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def options(folder: Path, samples: int) -> argparse.Namespace:
    return argparse.Namespace(run=folder, samples=samples, minutes=5.0, batch=2, device="cpu", bf16=False)


def png(picture: object) -> bytes:
    file = io.BytesIO()
    Pictures.fromarray(picture).save(file, "PNG")  # type: ignore[arg-type]
    return file.getvalue()


def conversation(sample: Sample) -> tuple[Message, ...]:
    """A sample's turns but the last answer, as a user would send them."""
    pictures = iter(Image(data=png(picture)) for picture in sample.pictures)
    out = [Message("system", (Text(sample.system),))] if sample.system else []
    for turn in sample.turns:
        shown = tuple(itertools.islice(pictures, turn.pictures))
        out += [Message("user", (*shown, Text(turn.question))), Message("assistant", (Text(turn.answer),))]
    return tuple(out[:-1])


def test_rows_and_pixels_are_those_of_the_runtime(tokenizer: PreTrainedTokenizerFast) -> None:
    config = training.demo_config(len(tokenizer))
    assert config.vision is not None
    processor = Processor(tokenizer, image_processor_for(config.vision, PREPROCESSOR), config)  # type: ignore[arg-type]
    encoder = training.Encoder(tokenizer)
    for index in range(60):
        sample = sample_at("train", index)
        prompt = processor(Request("r", conversation(sample)))
        ids, labels = encoder.row(sample)
        last = len(encoder.text(sample.turns[-1].answer)) + 1
        assert collapsed(prompt.ids, prompt.slots) == ids[:-last]
        assert labels[-last:] == ids[-last:] and labels[-last - 1] == IGNORE_INDEX
        if sample.pictures:
            shown = processor.pixels(prompt, range(len(sample.pictures)))
            assert torch.allclose(shown, training.pixels(list(sample.pictures)), atol=1e-5)


def collapsed(ids: tuple[int, ...], slots: tuple[object, ...]) -> list[int]:
    """The prompt with one IMAGE_TOKEN_INDEX a picture."""
    out = list(ids)
    for slot in reversed(slots):
        out[slot.start : slot.end] = [IMAGE_TOKEN_INDEX]  # type: ignore[attr-defined]
    return out


def test_batches_go_on_where_they_stopped() -> None:
    def questions(seen: int, count: int) -> list[list[str]]:
        drawn = itertools.islice(training.batches(seen, 3), count)
        return [[sample.turns[0].question for sample in samples] for samples in drawn]

    whole = questions(0, 40)
    assert questions(3 * 21, 19) == whole[21:]
    assert sorted(sum(whole[:16], [])) == sorted(sample_at("train", i).turns[0].question for i in range(48))


def test_patches_begin_with_their_place(tokenizer: PreTrainedTokenizerFast) -> None:
    """Neighbours are alike, and every place is told from every other."""
    table = training.sines(8, 192)
    likeness = torch.nn.functional.normalize(table) @ torch.nn.functional.normalize(table).T
    assert float((likeness - torch.eye(64)).max()) < 0.999
    assert likeness[0, 1] > likeness[0, 4] and likeness[0, 8] > likeness[0, 32]
    tower = training.new_state(tokenizer, "cpu").model.vision_tower
    assert tower is not None
    assert torch.allclose(tower.vision_model.embeddings.position_embedding.weight[1:], 0.4 * table)


def test_words_begin_as_loud_as_what_is_added_to_them(tokenizer: PreTrainedTokenizerFast) -> None:
    model = training.new_state(tokenizer, "cpu").model
    assert abs(float(model.get_input_embeddings().weight.detach().std()) - 1) < 0.02
    linear = model.llm.model.layers[0].mlp.down_proj.weight.detach()
    assert abs(float(linear.std()) * (3 * linear.shape[1]) ** 0.5 - 1) < 0.02


def test_the_learning_rate_rises_stays_and_falls() -> None:
    shares = [training.schedule(done / 1000) for done in range(1001)]
    assert shares[0] == shares[-1] == 0 and max(shares) == shares[200] == 1
    assert all(a >= b for a, b in itertools.pairwise(shares[20:]))


def test_a_training_in_two_parts_is_the_same_training(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = training.Encoder(tokenizer)
    whole = training.new_state(tokenizer, "cpu")
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    (tmp_path / "whole").mkdir()
    training.train(whole, encoder, options(tmp_path / "whole", 8))
    first = training.new_state(tokenizer, "cpu")
    (tmp_path / "parts").mkdir()
    stopped = options(tmp_path / "parts", 8)
    real = training.batches
    with monkeypatch.context() as patch:
        patch.setattr(training, "batches", lambda seen, size: itertools.islice(real(seen, size), 2))
        training.train(first, encoder, stopped)
    second = training.new_state(tokenizer, "cpu")
    second.load(tmp_path / "parts" / "checkpoint.pt")
    assert second.seen == 4
    training.train(second, encoder, stopped)
    assert second.seen == whole.seen == 8
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(tensor, second.model.state_dict()[name], atol=1e-6), name
        unused = "post_layernorm" in name  # LLaVA takes the features before it
        assert unused or not torch.equal(tensor, before[name]), f"{name} was not trained"


@pytest.mark.slow
def test_export_writes_a_folder_that_loads_and_a_card(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    state = training.new_state(tokenizer, "cpu")
    out, work = tmp_path / "out", tmp_path / "work"
    export(state.model, tokenizer, out, work, "nothing", card_samples=1)
    add_scores(out, work, 1)
    model, processor = load(out / "model", device="cpu")
    assert quant_spec(model.config) is not None
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert all(f"\n| {task} | " in card for task in TASKS)
    introduction, table, quality = (card.index(words) for words in ("# The tinychat demo", "| task |", "## Quality"))
    assert 0 == introduction < table < quality and (out / "model" / "quality.json").is_file()
    assert sorted(path.name for path in out.iterdir()) == ["model", "samples"]
