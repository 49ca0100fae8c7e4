"""However wide a vocabulary is, only so many logits are in memory; they are those of the whole model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from same import assert_same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from make_tiny_model import make_tiny_model
from tinychat import load
from tinychat.core import Request, StoppingParams, Text
from tinychat.engine.engine import Engine
from tinychat.eval import divergence, logits
from tinychat.eval.card import CardPlan, Subject, make_card
from tinychat.eval.heldout import Item
from tinychat.eval.logits import Predictions, without_logits

VOCABULARY = 9001  # of which not all logits are kept
ROWS = 5


class Widest(TorchDispatchMode):
    """Notes the most rows of so many numbers that any operation gives."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.numel() // self.width)
        return out


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_tiny_model(tmp_path_factory.mktemp("wide") / "text", "text", vocab_size=VOCABULARY)
    ready = load.load_folder(folder, load.Placement(torch.float32))
    return Engine(ready.model, ready.processor)


def test_a_card_has_few_logits_at_once(wide: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "NUMBERS", ROWS * VOCABULARY + 7)
    subject = Subject.of("16 bit", wide)
    with Widest(VOCABULARY) as widest:
        make_card(subject, subject, plan=CardPlan(samples=1, seqlen=64, measures=("ppl", "divergence")))
    assert widest.rows == ROWS


def test_they_are_those_of_the_whole_model(wide: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "NUMBERS", 3 * VOCABULARY)
    request = Request("a", parts=(Text("Once upon a time"),), stopping=StoppingParams(4, ignore_eos=True))
    held = divergence.continued(wide, Item("text", request, True))
    reading = divergence.read(wide, held)
    pieces = list(reading.logits)
    assert len(pieces) == math.ceil(len(held.scored) / 3)
    with torch.no_grad():
        whole = wide.model(input_ids=torch.tensor([(*held.prompt.ids, *held.answer)])).logits[0]  # type: ignore[operator]
    assert_same(torch.cat(pieces), whole[list(held.scored)])


def test_the_model_is_as_before(wide: Engine) -> None:
    ids = torch.arange(9)[None]
    model: Any = wide.model
    with without_logits(model) as seen, torch.no_grad():
        assert model(input_ids=ids).logits.shape == (1, 1, VOCABULARY)
    assert [tuple(hidden.shape) for hidden in seen] == [(1, 9, model.llm.config.hidden_size)]
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (1, 9, VOCABULARY)


def test_a_vocabulary_beyond_all_bounds_has_one_row() -> None:
    head = torch.nn.Linear(2, logits.NUMBERS + 1, bias=False)
    assert [len(piece) for piece in Predictions(torch.zeros(2, 2), head, logits.NUMBERS + 1)] == [1, 1]
