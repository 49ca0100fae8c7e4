"""Divergence against transformers: its logits, its greedy generation, and torch's own KL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from make_tiny_model import make_tiny_model
from tinychat import load
from tinychat.core import Request, StoppingParams, Text
from tinychat.engine.engine import Engine
from tinychat.errors import ModelError
from tinychat.eval import divergence
from tinychat.eval.divergence import Compared, bootstrap, coded, compare, continued, read, summarize
from tinychat.eval.heldout import Item

NEW = 12
ITEM = Item(
    "text", Request("a", parts=(Text("Once upon a time"),), stopping=StoppingParams(NEW, ignore_eos=True)), True
)


def engine(folder: Path) -> Engine:
    ready = load.load_folder(folder, load.Placement())
    return Engine(ready.model, ready.processor)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two text models: the second one is the first one with slightly other weights."""
    root = tmp_path_factory.mktemp("pair")
    one = make_tiny_model(root / "one", "text")
    other = AutoModelForCausalLM.from_pretrained(one, local_files_only=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    make_tiny_model(root / "other", "text")
    other.save_pretrained(root / "other")
    return one, root / "other"


def generated(folder: Path, ids: tuple[int, ...]) -> tuple[list[int], Any]:
    """transformers' own greedy continuation of so many tokens, and the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    return made[0, len(ids) :].tolist(), model


@torch.no_grad()
def test_kl_agreement_and_first_token_are_those_of_transformers(pair: tuple[Path, Path]) -> None:
    base, other = map(engine, pair)
    held = continued(base, ITEM)
    found = compare(held, coded(read(base, held).logits), read(other, held).logits)

    said, one = generated(pair[0], held.prompt.ids)
    says, two = generated(pair[1], held.prompt.ids)
    assert list(held.answer) == said
    whole = torch.tensor([(*held.prompt.ids, *said)])
    p, q = (model(input_ids=whole).logits[0, :-1].log_softmax(-1) for model in (one, two))
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert len(held.scored) == len(held.prompt.ids) - 1 + NEW
    np.testing.assert_allclose(found.kl, kl.numpy(), atol=1e-5, rtol=1e-3)
    assert found.kl.mean() > 1e-4
    assert found.same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.first == next((i for i, (a, b) in enumerate(zip(said, says, strict=True)) if a != b), None)
    assert found.first is not None


def test_layers_outputs_are_those_of_transformers(pair: tuple[Path, Path]) -> None:
    base = engine(pair[0])
    held = continued(base, ITEM)
    _, model = generated(pair[0], held.prompt.ids)
    with torch.no_grad():
        states = model(torch.tensor([(*held.prompt.ids, *held.answer)]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(read(base, held).outputs, torch.cat(states[1:]), atol=1e-4, rtol=1e-4)


def test_a_model_does_not_diverge_from_itself(pair: tuple[Path, Path]) -> None:
    base = engine(pair[0])
    held = continued(base, ITEM)
    found = compare(held, coded(read(base, held).logits), read(engine(pair[0]), held).logits)
    assert not found.kl.any() and found.same.all() and found.first is None


def test_what_is_kept_of_a_large_vocabulary_bounds_the_kl_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, other = (torch.randn(5, 400, generator=torch.Generator().manual_seed(seed)) * 4 for seed in (0, 1))
    monkeypatch.setattr(divergence, "KEPT", 200)
    held = divergence.Held("text", None, (), (), 5, 400)  # type: ignore[arg-type]
    exact = compare(held, coded([logits]), [other]).kl
    monkeypatch.setattr(divergence, "WHOLE", 399)
    kept = coded([logits])
    coarse = compare(held, kept, [other])
    assert kept["logp"].shape == (5, 201)
    assert (coarse.kl <= exact + 1e-5).all() and (coarse.kl >= 0.9 * exact).all()
    assert not compare(held, kept, [logits]).kl.any()
    assert coarse.same.tolist() == (logits.argmax(1) == other.argmax(1)).tolist()
    pieces = compare(held, coded(logits.split((1, 3, 1))), other.split((2, 3)))
    assert np.array_equal(pieces.kl, coarse.kl) and np.array_equal(pieces.same, coarse.same)


def test_models_that_do_not_belong_together_are_refused(pair: tuple[Path, Path]) -> None:
    base = engine(pair[0])
    held = continued(base, ITEM)
    with pytest.raises(ModelError, match="the models have 319 and 320 tokens of vocabulary"):
        divergence.check_same_tokens(base, ITEM, replace(held, vocabulary=319))
    asked = replace(ITEM, request=replace(ITEM.request, parts=(Text("Once upon another time"),)))
    with pytest.raises(ModelError, match="make different tokens of the same question; compare a model with"):
        divergence.check_same_tokens(base, asked, held)


def test_nan_is_refused(pair: tuple[Path, Path]) -> None:
    base = engine(pair[0])
    held = continued(base, ITEM)
    torch.nn.init.constant_(base.model.llm.model.layers[1].mlp.up_proj.weight, float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="gives NaN or Inf on held-out data; check its weights"):
        read(base, held)


def compared(*same: bool) -> Compared:
    return Compared("text", np.linspace(0, 1, len(same)), np.array(same), 3)


def test_answers_are_summed_up() -> None:
    found = summarize(
        [compared(False, True, True, True), compared(True, True, False, True), compared(True, False, True)]
    )
    assert found.first == (None, 1, 1) and found.unchanged == pytest.approx(1 / 3) and found.median_first == 1
    assert found.same_along == pytest.approx((1, 1 / 3, 1 / 3))
    assert (found.tokens, found.answers, found.top1.value) == (11, 3, pytest.approx(8 / 11))
    assert summarize([compared(True, True, True)]).median_first is None


def test_intervals_resample_sequences_not_tokens() -> None:
    groups = [np.full(50, value) for value in (0.0, 1.0)]
    whole = bootstrap(groups, np.mean)
    assert (whole.value, whole.low, whole.high) == (0.5, 0.0, 1.0)
    rng = np.random.default_rng(0)
    many = bootstrap([rng.normal(3, 1, 1) for _ in range(400)], np.mean)
    assert many.high - many.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap(groups, np.mean) == whole
