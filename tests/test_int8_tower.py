"""Vision towers with 8-bit linears: loaded, turned into floats, planned for, and refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from int8_folders import A8, W8, int8_folder, set_tower_quantization, w8a8
from safetensors.torch import load_file, save_file
from same import assert_same
from torch import Tensor, nn

from tinychat.convert import convert
from tinychat.errors import ModelError
from tinychat.layers.int8_linear import Int8Linear
from tinychat.load import Placement, assemble, load_model, open_source
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.planner import weights_bytes
from tinychat_kernels.int8 import dequantize_rows


def features(model: VilaLlamaForCausalLM, size: int = 56) -> Tensor:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.stack(list(model.encode_images(pixels.to(model.dtype))))


def int8_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_the_towers_linears_have_eight_bits(tmp_path: Path, vision: str) -> None:
    folder = int8_folder(tmp_path, vision=vision)
    model = load_model(folder, dtype="float32", device="cpu")
    assert len(int8_of(model)) == 6 * 3 and all(".encoder.layers." in name for name in int8_of(model))
    stored = load_file(folder / "vision_tower" / "model.safetensors")
    linear = model.get_submodule("vision_tower.vision_model.encoder.layers.1.mlp.fc2")
    name = next(key for key in stored if key.endswith("layers.1.mlp.fc2.weight"))
    weight, scale = linear.packed
    assert torch.equal(weight, stored[name]) and torch.equal(scale[:, None], stored[f"{name}_scale"])
    assert linear.bias.dtype == torch.float32


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_its_features_are_near_those_of_the_floats(tmp_path: Path, vision: str) -> None:
    source = open_source(int8_folder(tmp_path, vision=vision))
    ours = assemble(source, Placement("float32", "cpu"))
    floats = assemble(source, Placement("float32", "cpu", dequantize=True))
    assert int8_of(ours) and not int8_of(floats)
    near, exact = features(ours), features(floats)
    assert 1e-5 < float((near - exact).norm() / exact.norm()) < 3e-2
    for name in int8_of(ours):
        weight = floats.get_submodule(name).weight
        assert torch.equal(weight, dequantize_rows(ours.get_submodule(name).packed, torch.float32))


def test_some_linears_may_stay_floats(tmp_path: Path) -> None:
    model = load_model(int8_folder(tmp_path, spare="fc2"), device="cpu")
    assert len(int8_of(model)) == 5 * 3 and not any("fc2" in name for name in int8_of(model))
    assert torch.isfinite(features(model)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("floats", [False, True])
def test_the_memory_is_planned_for_what_is_held(tmp_path: Path, dtype: torch.dtype, floats: bool) -> None:
    source = open_source(int8_folder(tmp_path, quantize=None))
    model = assemble(source, Placement(dtype, "cpu", dequantize=floats))
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert weights_bytes(source.index, dtype, floats) == held


def test_it_is_saved_as_it_was(tmp_path: Path) -> None:
    model = load_model(int8_folder(tmp_path / "in"), dtype="float16", device="cpu")
    model.save_pretrained(tmp_path / "out")
    again = load_model(tmp_path / "out", dtype="float16", device="cpu")
    assert int8_of(again) == int8_of(model) and int8_of(model)
    assert torch.equal(features(again), features(model))


def test_a_float_decoder_may_have_such_a_tower(tmp_path: Path) -> None:
    model = load_model(int8_folder(tmp_path, quantize=None), device="cpu")
    assert int8_of(model)
    assert_same(features(model), features(load_model(tmp_path, device="cpu")))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "mlp.fc1 is quantized, and no quantization_config says how; add the quantization_config that"),
        ("int8", "the vision tower's quantization_config is 'int8', not an object"),
        ({"quant_method": "fp8"}, "the vision tower is quantized with fp8, which is not supported"),
        ({**w8a8(), "config_groups": {}}, "has 0 config_groups, one is supported"),
        (w8a8(format="float-quantized"), "the vision tower is quantized as float-quantized, which is not supported"),
        (w8a8(weights={**W8, "num_bits": 4}), "num_bits of weights in the vision tower's .* is 4, not 8"),
        (w8a8(weights={**W8, "strategy": "tensor"}), "strategy of weights .* is 'tensor', not 'channel'"),
        (w8a8(weights={**W8, "symmetric": False}), "symmetric of weights .* is False, not True"),
        (w8a8(input_activations=None), "num_bits of input_activations .* is None, not 8; take a model whose"),
        (w8a8(input_activations={**A8, "dynamic": False}), "dynamic of input_activations .* is False, not True"),
        (w8a8(input_activations={**A8, "strategy": "tensor"}), "strategy of input_activations .* is 'tensor'"),
    ],
)
def test_what_is_not_read(tmp_path: Path, value: object, words: str) -> None:
    folder = int8_folder(tmp_path)
    set_tower_quantization(folder, value)
    with pytest.raises(ModelError, match=words):
        open_source(folder)


def change(folder: Path, end: str, value: Tensor | None) -> None:
    """Put another tensor in the place of those that end so; None takes them away."""
    home = folder / "vision_tower" / "model.safetensors"
    tensors = load_file(home)
    for name in [name for name in tensors if name.endswith(end)]:
        del tensors[name]
        if value is not None:
            tensors[name] = value.clone()
    save_file(tensors, home)


@pytest.mark.parametrize(
    ("end", "value", "words"),
    [
        ("q_proj.weight_scale", torch.ones(32), r"q_proj.weight_scale is \[32\], \[32, 1\] is needed"),
        ("q_proj.weight", torch.zeros(32, 32).half(), "q_proj.weight is torch.float16, torch.int8 is needed beside"),
        ("q_proj.weight_scale", None, "q_proj.weight is torch.int8, torch.float32 is needed"),
        ("fc1.weight", None, "missing: .*fc1.weight"),
    ],
)
def test_tensors_that_are_wrong(tmp_path: Path, end: str, value: Tensor | None, words: str) -> None:
    folder = int8_folder(tmp_path)
    change(folder, end, value)
    with pytest.raises(ModelError, match=words):
        load_model(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("to", ["vila", "llm-awq-v2"])
def test_it_is_converted_as_it_is(tmp_path: Path, to: str) -> None:
    source = int8_folder(tmp_path / "in", spare="fc2", hidden_size=128, intermediate_size=256)
    convert(source, tmp_path / "out", to)
    before, after = (load_file(folder / "vision_tower" / "model.safetensors") for folder in (source, tmp_path / "out"))
    theirs = {name.rpartition("encoder.")[2]: tensor for name, tensor in after.items()}
    assert all(torch.equal(tensor, theirs[name.rpartition("encoder.")[2]]) for name, tensor in before.items())
    ours, other = (load_model(folder, dtype="float32", device="cpu") for folder in (source, tmp_path / "out"))
    assert int8_of(other) == int8_of(ours) and torch.equal(features(other), features(ours))


@pytest.mark.parametrize("to", ["awq-gemm", "compressed-tensors"])
def test_one_config_cannot_say_it(tmp_path: Path, to: str) -> None:
    words = f"the vision tower has 8-bit weights, which {to} cannot say; .*--to vila"
    with pytest.raises(ModelError, match=words):
        convert(int8_folder(tmp_path / "in"), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
