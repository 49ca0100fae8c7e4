"""llm-awq's search results: scales change no answer, clips bound the weights, and another model's are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.tiny import ids, text_pair
from torch import Tensor

from tinychat.errors import FormatError, ModelError
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.search_results import apply_search, read_search

LAYER = "model.layers.1"
WIDTH, INNER = 64, 96


def factors(size: int) -> Tensor:
    return 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(size))


def scales() -> list[tuple[str, tuple[str, ...], Tensor]]:
    """As llm-awq has them for a Llama, but for v -> o: here two key heads serve four."""
    attention = tuple(f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
    mlp = (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj")
    return [
        (f"{LAYER}.input_layernorm", attention, factors(WIDTH)),
        (f"{LAYER}.post_attention_layernorm", mlp, factors(WIDTH)),
        (f"{LAYER}.mlp.up_proj", (f"{LAYER}.mlp.down_proj",), factors(INNER)),
    ]


def saved(tmp_path: Path, **content: object) -> Path:
    path = tmp_path / "search.pt"
    torch.save({"scale": [], "clip": [], **content}, path)
    return path


@pytest.fixture
def model() -> VilaLlamaForCausalLM:
    return text_pair("llama", mlp_bias=True)[1]


@torch.no_grad()
def test_scales_change_the_weights_and_not_the_answer(tmp_path: Path, model: VilaLlamaForCausalLM) -> None:
    prompt = ids(1, 12)
    before, weight = model(input_ids=prompt).logits, model.llm.model.layers[1].mlp.down_proj.weight.clone()
    apply_search(model, saved(tmp_path, scale=scales()))
    assert torch.allclose(model(input_ids=prompt).logits, before, atol=1e-5)
    assert torch.allclose(model.llm.model.layers[1].mlp.down_proj.weight, weight * factors(INNER))


def test_clips_bound_each_group(tmp_path: Path, model: VilaLlamaForCausalLM) -> None:
    weight = model.llm.model.layers[0].self_attn.o_proj.weight
    before = weight.detach().clone().reshape(WIDTH, 2, 32)
    bounds = before.abs().amax(2, keepdim=True) * 0.6
    apply_search(model, saved(tmp_path, clip=[("model.layers.0.self_attn.o_proj", bounds)]))
    after = weight.detach().reshape(WIDTH, 2, 32)
    assert torch.equal(after, before.clamp(-bounds, bounds)) and not torch.equal(after, before)


def test_scales_come_before_clips(tmp_path: Path, model: VilaLlamaForCausalLM) -> None:
    name = f"{LAYER}.mlp.down_proj"
    weight = model.llm.model.layers[1].mlp.down_proj.weight
    wanted = (weight.detach() * factors(INNER)).clamp(-0.01, 0.01)
    apply_search(model, saved(tmp_path, scale=scales(), clip=[(name, torch.full((WIDTH, 3, 1), 0.01))]))
    assert torch.allclose(weight, wanted)


def test_names_become_ours(tmp_path: Path) -> None:
    found = read_search(saved(tmp_path, scale=scales()))
    assert found.scales[0][0] == "llm.model.layers.1.input_layernorm"
    assert found.scales[2][1] == ("llm.model.layers.1.mlp.down_proj",)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ({"scale": [("model.norm",)]}, FormatError, "holds no search results of llm-awq"),
        ({"clip": None}, FormatError, "a dict of the lists scale and clip"),
        ({"clip": [("model.norm", 3.0)]}, FormatError, "factors that are no finite tensors"),
        ({"clip": [("model.norm", torch.tensor(float("nan")))]}, FormatError, "factors that are no finite tensors"),
        (
            {"clip": [("model.layers.7.mlp.up_proj", torch.ones(96, 1, 1))]},
            ModelError,
            "layers.7.mlp.up_proj, which",
        ),
        ({"clip": [("model.norm", torch.ones(64, 1, 1))]}, ModelError, "llm.model.norm, which is no linear layer"),
        (
            {"clip": [("model.layers.0.mlp", torch.ones(64, 1, 1))]},
            ModelError,
            "layers.0.mlp, which has no float",
        ),
        (
            {"clip": [(f"{LAYER}.mlp.up_proj", torch.ones(64, 1, 1))]},
            ModelError,
            r"bounds \[64, 1, 1\] for llm.model.layers.1.mlp.up_proj of 96x64",
        ),
        (
            {"scale": [(f"{LAYER}.self_attn.v_proj", (f"{LAYER}.self_attn.o_proj",), factors(WIDTH))]},
            ModelError,
            "64 factors for llm.model.layers.1.self_attn.v_proj, llm.model.layers.1.self_attn.v_proj has 32",
        ),
        (
            {"scale": [(f"{LAYER}.input_layernorm", (f"{LAYER}.self_attn.q_proj",), torch.zeros(WIDTH))]},
            ModelError,
            "divide llm.model.layers.1.input_layernorm by 0",
        ),
    ],
)
def test_what_is_not_this_model_s_is_refused_before_anything_is_changed(
    tmp_path: Path, model: VilaLlamaForCausalLM, content: dict[str, object], kind: type[Exception], words: str
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=words):
        apply_search(model, saved(tmp_path, **{"scale": scales(), **content}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_with_code_is_not_run(tmp_path: Path, model: VilaLlamaForCausalLM) -> None:
    torch.save({"scale": [Path("x")], "clip": []}, tmp_path / "search.pt")
    with pytest.raises(FormatError, match="needs more than tensors to be read"):
        apply_search(model, tmp_path / "search.pt")
