"""Models of transformers behind our Model: which are taken, which are refused and why, and how they are opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from make_tiny_model import make_tiny_model
from make_tiny_model import tokenizer as make_tokenizer
from tinychat.core import Image, Request, SamplingParams, StoppingParams, Text
from tinychat.engine import foreign
from tinychat.engine.causal_lm import CausalLM, CausalLMBatch
from tinychat.engine.foreign import ForeignModel, adapted, open_model, set_pad_token
from tinychat.engine.prefill import Model
from tinychat.errors import CapacityError, FormatError, ModelError, UsageError
from tinychat.inputs.processor import Processor
from tinychat.models.vila_llama import VilaLlamaForCausalLM

TOKENIZER = make_tokenizer(image=False)
SMALL: dict[str, Any] = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
LLAMA: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def gpt2(**changes: Any) -> Any:
    torch.manual_seed(5)
    return GPT2LMHeadModel(GPT2Config(**{**SMALL, **changes})).eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(gpt2(), tmp_path / "gpt2")


# The Model protocol.


def test_ours_are_taken_as_they_are_and_theirs_adapted() -> None:
    ours: Any = VilaLlamaForCausalLM.__new__(VilaLlamaForCausalLM)
    assert adapted(ours) is ours
    model: Model = adapted(gpt2())
    assert isinstance(model, ForeignModel) and model.device == torch.device("cpu") and model.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
            "encoder",
        ),
        (lambda: FalconMambaForCausalLM(FalconMambaConfig(hidden_size=16, num_hidden_layers=1)), "state|layers of"),
        (lambda: LlamaModel(LlamaConfig(**LLAMA)), "no head"),
    ],
)
def test_models_without_keys_and_values_are_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        adapted(make())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match="a Linear is given as the model"):
        adapted(torch.nn.Linear(2, 2))


def test_a_model_that_ignores_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = gpt2()
    model, forward = ForeignModel(theirs), theirs.forward
    monkeypatch.setattr(theirs, "forward", lambda **given: forward(**{**given, "past_key_values": None}))
    with pytest.raises(ModelError, match="a cache of its own"):
        model.decode(torch.tensor([[1]]), model.make_cache(1, 8))


def test_prefill_in_chunks_gives_the_logits_of_one() -> None:
    model = adapted(gpt2())
    embeds = model.embed(torch.arange(9), (), ())
    assert embeds.shape == (1, 9, 32) and not embeds.requires_grad
    whole = model.prefill(embeds, model.make_cache(1, 16), 0)
    cache = model.make_cache(1, 16)
    model.prefill(embeds[:, :4], cache, 0)
    last = model.prefill(embeds[:, 4:], cache, 4)
    assert whole.shape == last.shape == (1, 1, 320) and torch.allclose(whole, last, atol=1e-5)
    assert torch.allclose(model.prefill(embeds[:, 6:], cache, 6), whole, atol=1e-5), "a row goes back, and on"


def test_verify_gives_logits_after_every_token_of_rows_of_different_lengths() -> None:
    theirs = gpt2()
    model = ForeignModel(theirs)
    short, long = model.make_cache(1, 16), model.make_cache(1, 16)
    model.prefill(model.embed(torch.tensor([1, 2])), short, 0)
    model.prefill(model.embed(torch.tensor([3, 4, 5, 6])), long, 0)
    both = type(short).cat([short, long])
    logits = model.verify(torch.tensor([[7, 8], [9, 10]]), both)
    assert both.lengths == [4, 6]
    with torch.no_grad():
        alone = [theirs(torch.tensor([ids])).logits[0, -2:] for ids in ([1, 2, 7, 8], [3, 4, 5, 6, 9, 10])]
    assert torch.allclose(logits, torch.stack(alone), atol=1e-5)
    embeds = torch.cat([model.embed(torch.tensor(ids)) for ids in ([7, 8], [9, 10])])
    both.truncate([2, 4])
    assert torch.allclose(model.verify(embeds, both), logits, atol=1e-5)


def test_a_forward_beyond_the_capacity_is_refused() -> None:
    model = adapted(gpt2())
    cache = model.make_cache(1, 4)
    with pytest.raises(CapacityError, match="5 tokens of context are needed, the cache holds 4"):
        model.prefill(model.embed(torch.arange(5), (), ()), cache, 0)
    assert cache.lengths == [0] and adapted(gpt2()).make_cache(1, None).capacity == 64  # type: ignore[arg-type]


def test_a_prompt_without_tokens_is_refused() -> None:
    model = ForeignModel(gpt2())
    with pytest.raises(UsageError, match="no tokens to prefill"):
        model.prefill(torch.zeros(1, 0, 32), model.make_cache(1, 4), 0)


def test_features_take_their_places() -> None:
    model = ForeignModel(gpt2())
    features = torch.full((2, 32), 7.0)
    embeds = model.embed(torch.arange(5), [(1, 3)], [features])[0]
    assert torch.equal(embeds[1:3], features)
    assert torch.equal(embeds[[0, 3, 4]], model.embed(torch.arange(5))[0, [0, 3, 4]])
    with pytest.raises(UsageError, match="a picture has 2 features for 3 places"):
        model.embed(torch.arange(5), [(1, 4)], [features])


def test_a_text_model_refuses_pictures() -> None:
    lm = CausalLM.from_model(gpt2(), TOKENIZER)
    with pytest.raises(UsageError, match="reads text only and was given 1 images"):
        CausalLMBatch.from_pb([Request("1", parts=(Image(data=b"x"), Text("a")))], lm.reader.tokenizer)
    with pytest.raises(UsageError, match="GPT2LMHeadModel reads text only"):
        ForeignModel(gpt2()).encode_images(torch.zeros(1))


# Opening.


def answer(lm: CausalLM, text: str, **stopping: Any) -> tuple[int, ...]:
    asked = Request(
        "r", parts=(Text(text),), sampling=SamplingParams(temperature=0.0), stopping=StoppingParams(6, **stopping)
    )
    batch = lm.batch_type.from_pb([asked], lm.reader.tokenizer, processor=lm.reader)
    going: Any = batch
    while going is not None:
        _, going = lm.generate_token(going)
    return tuple(batch.rows[0].generated)


def test_a_folder_of_transformers_answers_as_its_generate(folder: Path) -> None:
    lm = CausalLM(str(folder))
    assert isinstance(lm.model, ForeignModel) and lm.model.dtype == torch.float32 and lm.context == 64
    ids = torch.tensor([TOKENIZER("hello")["input_ids"]])
    theirs = gpt2().generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    assert answer(lm, "hello", ignore_eos=True) == tuple(theirs[0, ids.shape[1] :].tolist())


def test_what_our_loader_reads_is_ours(tmp_path: Path) -> None:
    opened = open_model(str(make_tiny_model(tmp_path / "vila", layout="vila", seed=3)))
    assert isinstance(opened.model, VilaLlamaForCausalLM) and isinstance(opened.reader, Processor)
    theirs = open_model(str(save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "llama")))
    assert isinstance(theirs.model, VilaLlamaForCausalLM) and theirs.context == 2048


def test_a_dtype_is_taken(folder: Path) -> None:
    opened = open_model(str(folder), dtype=torch.bfloat16)
    assert isinstance(opened.model, ForeignModel) and opened.model.dtype == torch.bfloat16


def test_answers_end_at_every_eos_of_the_generation_config(folder: Path) -> None:
    free = answer(CausalLM(str(folder)), "hello", ignore_eos=True)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [319, free[2]]}))
    lm = CausalLM(str(folder))
    assert {319, free[2], 258} <= set(lm.reader.stop_ids)
    assert answer(lm, "hello") == free[: free.index(free[2])]
    assert answer(lm, "hello", ignore_eos=True) == free


def test_compile_is_skipped_with_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    CausalLM(str(folder), compile=True)
    assert "is not compiled" in caplog.text


@pytest.mark.parametrize(
    ("pads", "wanted"),
    [
        ({"tokenizer": "a", "pad": 70, "eos": 71}, "a"),
        ({"pad": 70, "eos": 71}, 70),
        ({"eos": 71}, 71),
        ({"eos": [72, 71]}, 72),
        ({"eos": None, "tokenizer_eos": True}, 258),
        ({"eos": None}, "[PAD]"),
        ({"pad": 100_000, "eos": 71}, 71),
    ],
)
def test_a_pad_token_is_found(pads: dict[str, Any], wanted: int | str) -> None:
    tokenizer = make_tokenizer(image=False)
    tokenizer.pad_token = pads.get("tokenizer")
    tokenizer.eos_token = "<|im_end|>" if pads.get("tokenizer_eos") else None
    set_pad_token(tokenizer, GPT2Config(**SMALL, pad_token_id=pads.get("pad"), eos_token_id=pads["eos"]))
    assert wanted in (tokenizer.pad_token, tokenizer.pad_token_id)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors of the model \(transformer.h.1.mlp.c_fc.weight\)"):
        open_model(str(folder))


def test_damaged_weights_are_a_format_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FormatError, match="the weights in .* cannot be read"):
        open_model(str(folder))


def test_a_damaged_config_is_a_format_error(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError):
        open_model(str(folder))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        open_model(str(tmp_path / "none" / "here"))


def test_an_unknown_architecture_says_what_both_loaders_say(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobodys", "architectures": ["Nobodys"]}))
    with pytest.raises(ModelError, match=r"transformers does not read .*nobodys.*our own loader does not") as caught:
        open_model(str(tmp_path))
    assert len(caught.value.message) < 700


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer.json or vocab.json was looked for in"):
        open_model(str(folder))


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer has ids up to 258, the model's vocabulary has 200 tokens"):
        open_model(str(save(gpt2(vocab_size=200), tmp_path)))


def test_code_of_a_folder_runs_only_when_asked(tmp_path: Path) -> None:
    config = {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(ModelError, match="code of its own, which only trust_remote_code runs"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("quantize", "cuda", "installed", "message"),
    [
        ("awq", True, True, "the way to quantize is 'awq'; give bitsandbytes, or nothing"),
        ("bitsandbytes", False, True, "need a CUDA device, and torch finds none"),
        ("bitsandbytes", True, False, "need the package bitsandbytes, which is not installed"),
    ],
)
def test_quantizing_that_cannot_work_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantize: str, cuda: bool, installed: bool, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(UsageError, match=message):
        CausalLM(str(folder), quantize=quantize)
