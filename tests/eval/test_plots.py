"""Plots: a PNG for each kind of curve that a card has, and a sentence where matplotlib is missing."""

from __future__ import annotations

import builtins
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinychat.errors import TinychatError
from tinychat.eval import plots
from tinychat.eval.card import Card, Column, Measured
from tinychat.eval.divergence import Divergence, Estimate
from tinychat.eval.fidelity import Fidelity, LayerFidelity


def card(*, compared: bool) -> Card:
    one = Estimate(0.1, 0.1, 0.1)
    found = Divergence(10, 2, one, one, one, (None, 2), (0.1, 0.2, 0.4), (1.0, 1.0, 0.5))
    layers = (LayerFidelity(0, Fidelity(math.inf, 1), Fidelity(20, 1)), LayerFidelity(1, Fidelity(18, 1)))
    column = Column("AWQ", divergence={"all": found}, layers=layers) if compared else Column("AWQ")
    return Card({"base": Column("16 bit"), "quantized": column}, Measured("plain", 1), {}, (), {})


def test_a_missing_matplotlib_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        TinychatError, match=r"which is not installed; install the extra: pip install 'tinychat\[plots\]'"
    ):
        plots.draw(card(compared=True), tmp_path)
    assert not list(tmp_path.iterdir())


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = plots.draw(card(compared=True), tmp_path / "new")
    assert [path.name for path in made] == [plots.LAYERS, plots.ALONG]
    for path in made:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape == (420, 840, 3)
        assert ((pixels == (31, 119, 180)).all(2)).sum() > 50, "no line is drawn"


def test_nothing_is_drawn_without_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plots.draw(card(compared=False), tmp_path) == [] and not list(tmp_path.iterdir())


def test_layers_without_error_have_no_point() -> None:
    assert plots._outputs(card(compared=True).columns["quantized"]) == ([1], [18])
    assert plots._weights(card(compared=True).columns["quantized"]) == ([0], [20])


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(TinychatError, match="file/quality-layers.png cannot be written: "):
        plots.draw(card(compared=True), tmp_path / "file")
