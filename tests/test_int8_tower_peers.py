"""Our 8-bit towers in the package that defines the form, and in transformers with it. Left out where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from int8_folders import A8, W8, int8_folder, set_tower_quantization
from safetensors.torch import load_file
from torch import Tensor

from tinychat.int8_tower import quantization
from tinychat.load import load_model
from tinychat_kernels import ref
from tinychat_kernels.int8 import Int8, dequantize_rows, quantize_rows

pytestmark = pytest.mark.filterwarnings("ignore")


def test_weights_are_those_that_the_package_compresses() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**W8))
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    ours = quantize_rows(weight)
    theirs = IntQuantizationCompressor.compress({"weight": weight, "weight_scale": ours.scale[:, None]}, scheme)
    assert torch.equal(theirs["weight"], ours.weight)
    back = IntQuantizationCompressor.decompress({**theirs}, scheme)["weight"]
    assert torch.equal(back, dequantize_rows(ours, torch.float32))


def test_the_config_is_the_packages() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    read = QuantizationConfig.model_validate(quantization(["layers.1.mlp.fc2"]))
    group = read.config_groups["group_0"]
    for part, wanted in ((group.weights, W8), (group.input_activations, A8)):
        assert {name: getattr(part, name) for name in wanted} == wanted
    assert "re:.*[.]layers[.]1[.]mlp[.]fc2$" in read.ignore and read.format == "int-quantized"


def as_the_package_rounds(x: Tensor) -> Int8:
    """Tokens in -128..127, at a scale that a step of 127.5 is the largest: ours, as vLLM's, is 127."""
    step = x.float().abs().amax(1) / 127.5
    return Int8((x.float() / step[:, None]).round().clamp(-128, 127).to(torch.int8), step)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("spare", ["", "layers.1.mlp.fc2"])
@torch.no_grad()
def test_a_tower_by_itself_is_read_by_transformers(tmp_path: Path, monkeypatch, family: str, spare: str) -> None:
    pytest.importorskip("compressed_tensors")
    import transformers

    folder = int8_folder(tmp_path, vision=family, spare=spare)
    set_tower_quantization(folder, quantization([spare] if spare else []))
    kind = {"clip": transformers.CLIPVisionModel, "siglip": transformers.SiglipVisionModel}[family]
    theirs = kind.from_pretrained(folder / "vision_tower", dtype=torch.float32, device_map="cpu").eval()
    ours = load_model(folder, dtype="float32", device="cpu").get_vision_tower()
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    wanted = theirs(pixels, output_hidden_states=True).hidden_states
    for i, states in enumerate(wanted):
        near = ours.vision_model.hidden_state(pixels, i)
        assert float((near - states).norm() / states.norm()) < 3e-2
    monkeypatch.setattr(ref, "quantize_tokens", as_the_package_rounds)
    alike = ours.vision_model.hidden_state(pixels, 1)
    apart = (alike - wanted[1]).norm(dim=-1) / wanted[1].norm(dim=-1)
    assert float(apart.median()) < 1e-5  # the others have a value that was rounded the other way
    stored = load_file(folder / "vision_tower" / "model.safetensors")
    assert sum(name.endswith("weight_scale") for name in stored) == 18 - bool(spare)
