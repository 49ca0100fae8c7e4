"""int8_quality: loud channels mean what the quiet ones did, and its settings are what their names say."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

import int8_quality
from make_tiny_model import make_tiny_model
from tinychat.layers.packed_linear import PackedLinear
from tinychat.load import assemble, open_source
from tinychat.placement import Placement
from tinychat_kernels import cpu


@torch.no_grad()
def features(folder: Path, **placed: str) -> torch.Tensor:
    model = assemble(open_source(folder), Placement(device="cpu", **placed))
    return model.encode_images(torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)))


def test_a_card_takes_the_default_and_the_exact_answers() -> None:
    exact = {"setting": "exact", "right": 9, "asked": 12, "kl": {}, "top1": {}, "tokens": 3, "unchanged": 1.0}
    default = {**exact, "setting": "int8", "right": 8, "scores": []}
    kept = {"setting": "int8", "right": 8, "asked": 12, "kl": {}, "top1": {}, "tokens": 3}
    assert int8_quality.for_card([exact, default]) == {**kept, "exact_right": 9}


@pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
def test_a_setting_is_compared_with_exact() -> None:
    args = argparse.Namespace(model=None, only=["head and tower"], threads=1, samples=1, per_task=0)
    exact, default = int8_quality.results(args, lambda _: None)
    assert (exact["setting"], exact["kl"]["value"]) == ("exact", 0.0)
    assert default["setting"] == "int8 activations, head and tower" and 0 < default["kl"]["value"] < 1e-3


def test_loud_channels_change_nothing_but_how_loud_they_are(tmp_path: Path) -> None:
    quiet = make_tiny_model(tmp_path / "quiet", dtype="float16", quantize=32)
    loud = int8_quality.with_outliers(quiet, tmp_path / "loud", 2, 64.0)
    before, after = features(quiet, tower="float"), features(loud, tower="float")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    norms = [
        open_source(home).index.get("vision_tower.vision_model.encoder.layers.1.layer_norm2.weight").float()
        for home in (quiet, loud)
    ]
    assert int((norms[1] / norms[0] > 60).sum()) == 2


@pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
def test_a_row_has_one_scale_while_it_is_asked_for() -> None:
    groups = []
    for rows in (False, True):
        setting = int8_quality.Setting("x", True, "float", "int8", rows=rows)
        tower = int8_quality.opened(None, setting, None).model.vision_tower
        held = [module for module in tower.modules() if isinstance(module, PackedLinear)]
        groups.append({module.packed.group for module in held})
    assert groups == [{64, 128}, {192, 768}]
