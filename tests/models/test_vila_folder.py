"""A saved model is a VILA folder that loads as the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import ids, llava_pair, pixels, text_pair
from safetensors.torch import load_file
from torch import nn

from make_tiny_model import make_tiny_model
from tinychat.layers.linear import QuantLinear
from tinychat.models.vila_fusion import IMAGE_TOKEN_INDEX
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat_kernels.layout import QuantSpec

HERE = IMAGE_TOKEN_INDEX
FILES = ("config.json", "model.safetensors")
PICTURE = torch.tensor([[5, 6, HERE, 7, 8, 9]])


@pytest.fixture
def eyes() -> VilaLlamaForCausalLM:
    return llava_pair()[1]


def quantized(model: VilaLlamaForCausalLM) -> VilaLlamaForCausalLM:
    """Its decoder's layers rounded to 4 bits, as the config then says."""
    for name, module in list(model.llm.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.llm.model.layers.set_submodule(name, QuantLinear.from_linear(module, QuantSpec(group_size=32)))
    fields = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    model.config.quantization_config = fields
    return model


MODELS = {
    "pictures": lambda: llava_pair()[1],
    "layer": lambda: llava_pair(vision_feature_layer=-1, vision_feature_select_strategy="full")[1],
    "text": lambda: text_pair("llama")[1],
    "tied": lambda: text_pair("llama", tie_word_embeddings=True)[1],
    "qwen2": lambda: text_pair("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)[1],
    "mistral": lambda: text_pair("mistral", sliding_window=6)[1],
    "bfloat16": lambda: llava_pair()[1].bfloat16(),
    "quantized": lambda: quantized(llava_pair()[1]),
    "quantized tied": lambda: quantized(text_pair("llama", tie_word_embeddings=True)[1]),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")  # the model that is not loaded computes with it too
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    again = VilaLlamaForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    assert not again.training and again.config.layout == "vila"
    assert (again.config.text, again.config.vision, again.config.projector) == (
        model.config.text,
        model.config.vision,
        model.config.projector,
    )
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) and tensor.dtype == after[key].dtype, key
    assert (again.llm.lm_head.weight is again.llm.model.embed_tokens.weight) == ("tied" in name)
    given: dict[str, Any] = {"input_ids": ids(1, 9)}
    if model.vision_tower is not None:
        given = {"input_ids": PICTURE, "images": pixels(1)}
    assert torch.equal(again(**given).logits, model(**given).logits)


def test_a_saved_folder_has_its_parts(tmp_path: Path, eyes: VilaLlamaForCausalLM) -> None:
    eyes.save_pretrained(tmp_path)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    parts = [f"{part}/{name}" for part in ("llm", "mm_projector", "vision_tower") for name in FILES]
    assert found == sorted(["config.json", *parts])


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    MODELS["tied"]().save_pretrained(tmp_path)
    names = load_file(tmp_path / "llm" / "model.safetensors")
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_a_part_that_the_model_lacks_is_removed(tmp_path: Path, eyes: VilaLlamaForCausalLM) -> None:
    eyes.save_pretrained(tmp_path)
    MODELS["text"]().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "llm"]
    again = VilaLlamaForCausalLM.from_pretrained(tmp_path)
    assert again.vision_tower is None and again.config.vision is None


def test_a_linear_projector_has_the_names_of_vila(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "a", "vila", projector="linear")
    before = VilaLlamaForCausalLM.from_pretrained(source)
    before.save_pretrained(tmp_path / "b")
    names = load_file(tmp_path / "b" / "mm_projector" / "model.safetensors")
    assert set(names) == {"layers.weight", "layers.bias"}
    after = VilaLlamaForCausalLM.from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.state_dict().items())
