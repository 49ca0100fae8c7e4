"""Held-out sets: which one suits a model, and that they are the same at every call."""

from __future__ import annotations

from pathlib import Path

import pytest

from make_tiny_model import make_tiny_model
from tinychat.config import read_config
from tinychat.errors import UsageError
from tinychat.eval.heldout import fingerprint, heldout, speaks_demo
from tinychat.inputs.processor import Processor
from tinychat.load import EMBEDDED


def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder, read_config(folder))


@pytest.mark.parametrize("layout", ["llava_hf", "text"])
def test_the_demo_set_is_for_models_with_its_vocabulary(tmp_path: Path, layout: str) -> None:
    assert speaks_demo(processor(EMBEDDED))
    assert not speaks_demo(processor(make_tiny_model(tmp_path / "m", layout)))


@pytest.mark.parametrize("name", ["demo", "plain"])
def test_a_set_is_the_same_at_every_call(name: str) -> None:
    first, again, other = (fingerprint(heldout(name).items(count)) for count in (2, 2, 3))
    assert first == again != other
    assert {item.kind for item in heldout(name).items(2)} == {"text", "pictures"}


def test_there_is_no_other_set() -> None:
    with pytest.raises(UsageError, match="there is no held-out set 'none'; the sets are demo, plain"):
        heldout("none")
