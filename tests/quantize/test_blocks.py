"""What a layer becomes on the disk: which types its tensors have, and what 16 bits cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from make_tiny_model import make_tiny_model
from tinychat.checkpoint import Index, write_safetensors
from tinychat.errors import ModelError
from tinychat.quantize.job import Calibration, Job
from tinychat.quantize.run import Run
from tinychat_kernels.layout import QuantSpec

SPEC = QuantSpec(group_size=32)
QUICK = {"scale_grid": 3, "clip_grid": 4, "loss_tokens": 64}


def made(folder: Path, out: Path, method: str) -> Index:
    """The checkpoint that a job writes."""
    wanted = Job(folder, out, method=method, spec=SPEC, search=QUICK, calibration=Calibration(samples=2, seqlen=32))  # type: ignore[arg-type]
    list(Run(wanted).events())
    return Index.of(out)


def changed(folder: Path, name: str, value: float) -> Path:
    """One number of a model is another."""
    index = Index.of(folder)
    tensors = {n: index.get(n).clone() for n in index.names()}
    tensors[name].view(-1)[3] = value
    write_safetensors(tensors.items(), folder)
    return folder


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_a_bfloat16_model_keeps_its_floats_and_has_scales_in_float16(tmp_path: Path, method: str) -> None:
    """awq gemm has its scales in float16, whatever the model's type is."""
    source = Index.of(make_tiny_model(tmp_path / "model", "llava_hf", dtype="bfloat16"))
    written = made(tmp_path / "model", tmp_path / "out", method)
    kinds = {name: written.dtype(name) for name in written.names()}
    assert {kind for name, kind in kinds.items() if name.endswith("scales")} == {torch.float16}
    others = {name: kind for name, kind in kinds.items() if name in source}
    assert len(others) > 20 and set(others.values()) == {torch.bfloat16}
    assert '"bfloat16"' in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_weights_whose_scales_are_no_float16_numbers_are_named(tmp_path: Path, method: str) -> None:
    source = make_tiny_model(tmp_path / "model", "text", dtype="bfloat16")
    changed(source, "model.layers.1.mlp.up_proj.weight", 3e6)
    with pytest.raises(
        ModelError, match=r"layer 1, mlp\.up_proj holds weights so large that their scales are no float16"
    ):
        made(source, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_wide_floats_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model", "text", dtype="float32")
    changed(source, "model.layers.0.input_layernorm.weight", 1e5)
    with pytest.raises(ModelError, match=r"layer 0, input_layernorm\.weight holds values that are no finite float16"):
        made(source, tmp_path / "out", "rtn")
