"""What GPTQModel and compressed-tensors write gives their logits in ours. Left out where they are missing.

By hand, with the Python of an environment that has them: python -m pytest -q tests/test_load_peers.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peer_logits
import pytest
import torch

from make_tiny_model import make_tiny_model
from tinychat.checkpoint import Index
from tinychat.load import open_source

pytestmark = pytest.mark.filterwarnings("ignore")
SAID = [f"word {i} is not like word {7 * i}; " * 12 for i in range(24)]
WORKERS = "GPTQMODEL_CPU_WORKERS"


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What files mean is compared, not kernels: ours that round activations stay out."""
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", "text", dtype="float16", hidden_size=128, intermediate_size=256)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["awq gemm", "gptq symmetric", "gptq asymmetric", "gptq v2"])
def test_gptqmodel_s(
    tmp_path: Path, source: Path, method: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gptqmodel")
    monkeypatch.setenv(WORKERS, os.environ.get(WORKERS, "2"))  # one is refused
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig

    kinds = {
        "awq gemm": ({"quant_method": METHOD.AWQ, "format": FORMAT.GEMM}, BACKEND.AWQ_TORCH),
        "gptq symmetric": ({"desc_act": False, "sym": True}, BACKEND.GPTQ_TORCH),
        "gptq asymmetric": ({"desc_act": False, "sym": False}, BACKEND.GPTQ_TORCH),
        "gptq v2": ({"desc_act": False, "sym": False, "format": FORMAT.GPTQ_V2}, BACKEND.GPTQ_TORCH),
    }
    said, backend = kinds[method]
    model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=32, device="cpu", **said))
    model.quantize(SAID, batch_size=1, backend=backend)
    model.save(str(tmp_path / "out"))
    assert open_source(tmp_path / "out").spec is not None
    theirs = None  # transformers reads GPTQ through yet another package
    if method.startswith("gptq"):
        theirs = GPTQModel.load(str(tmp_path / "out"), backend=backend, device="cpu").model.float()
    peer_logits.compare(tmp_path / "out", f"{method} by GPTQModel", capfd, theirs)


def compress(model: Any, symmetric: bool, out: Path) -> None:
    """What llmcompressor does at its end, with scales from each group's range: packed weights, bfloat16 scales."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.unflatten(1, (-1, 32))
            scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(tmp_path: Path, source: Path, symmetric: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """The model that was packed answers itself: transformers 5.23 cannot load the zero points that it wrote."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    compress(model, symmetric, tmp_path / "out")
    assert Index.of(tmp_path / "out").dtype("model.layers.0.mlp.up_proj.weight_scale") == torch.bfloat16
    kind = "symmetric" if symmetric else "asymmetric"
    peer_logits.compare(tmp_path / "out", f"{kind} by compressed-tensors", capfd, model.float())
