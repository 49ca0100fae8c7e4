"""A card made a layer at a time: the figures are those of whole models that read the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from make_tiny_model import make_tiny_model
from tinychat import load
from tinychat.core import Progress
from tinychat.engine.engine import Engine
from tinychat.eval import divergence
from tinychat.eval.card import Card, CardPlan, by_kind
from tinychat.eval.fidelity import OutputErrors, compare_weights, joined
from tinychat.eval.perplexity import answer_perplexity, perplexity, text_ids
from tinychat.inputs.processor import Processor
from tinychat.placement import Placement
from tinychat.quantize.job import Job, open_job
from tinychat.quantize.layered import Layered, base_side, nearest_side, packed_side, weights_of
from tinychat.quantize.nearest import round_to_nearest
from tinychat_kernels.layout import QuantSpec

CPU = torch.device("cpu")
SPEC = QuantSpec(group_size=64)


def engine(folder: Path) -> Engine:
    ready = load.load_folder(folder, Placement("float32", CPU, dequantize=True))
    return Engine(ready.model, ready.processor)


def layered(base: Path, packed: Path, plan: CardPlan, work: Path) -> Layered:
    source = open_job(Job(base, work / "none", method="rtn", spec=SPEC))
    original = base_side(source, CPU, "16 bit")
    sides = {
        "base": original,
        "nearest": nearest_side(original, SPEC, "RTN 4 bit"),
        "quantized": packed_side(packed, CPU, "AWQ 4 bit"),
    }
    return Layered(sides, Processor.from_folder(base, source.config), plan, work / "states")


def drained(made: Layered) -> tuple[Card, list[Progress]]:
    making, steps = made.making(CPU, {"method": "awq"}, ("why",)), list[Progress]()
    while True:
        try:
            event = next(making)
        except StopIteration as end:
            return end.value, steps
        if isinstance(event, Progress):
            steps.append(event)


@pytest.mark.parametrize(("layout", "heldout"), [("llava_hf", "plain"), ("vila", "demo"), ("text", "plain")])
def test_the_figures_are_those_of_whole_models(tmp_path: Path, layout: str, heldout: str) -> None:
    base = make_tiny_model(tmp_path / "base", layout, dtype="float16")
    packed = make_tiny_model(tmp_path / "packed", layout, dtype="float16", quantize=64)
    plan = CardPlan(heldout, samples=2, seqlen=64)
    made = layered(base, packed, plan, tmp_path)
    card, steps = drained(made)
    assert [step.done for step in steps] == [1, 2, 3, 4] and {step.total for step in steps} == {4}
    assert card.left_out == ("why",)

    original, rounded, quantized = engine(base), engine(base), engine(packed)
    round_to_nearest(rounded.model, SPEC)  # type: ignore[arg-type]
    read = {"base": original, "nearest": rounded, "quantized": quantized}
    assert list(card.columns) == list(read)
    for name, one in read.items():
        if heldout == "demo":
            expected = answer_perplexity(one, [item for item in made.items if item.answer is not None])
        else:
            expected = perplexity(one.model, text_ids(one.processor, plan.data.text or ""), 64)  # type: ignore[arg-type]
        assert card.columns[name].perplexity == pytest.approx(expected, rel=1e-4)
    for name in ("nearest", "quantized"):
        same_as(card, name, original, read[name], made)
    assert card.columns["quantized"].layers[0].weights is not None and not card.columns["base"].layers


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    base = make_tiny_model(tmp_path / "base", "text", dtype="float16")
    packed = make_tiny_model(tmp_path / "packed", "text", dtype="float16", quantize=64)
    plan = CardPlan("plain", samples=2, seqlen=64)
    whole, _ = drained(layered(base, packed, plan, tmp_path / "whole"))

    making = layered(base, packed, plan, tmp_path).making(CPU, {"method": "awq"}, ("why",))
    for _ in range(steps):
        next(making)
    making.close()
    (tmp_path / "states" / f"quantized-{steps}").mkdir()  # begun, and not to be counted on
    done = list[int]()
    run = Layered._layer
    monkeypatch.setattr(Layered, "_layer", lambda self, i, last: (done.append(i), run(self, i, last)))
    card, _ = drained(layered(base, packed, plan, tmp_path))
    assert card == whole
    assert done == list(range(steps - 1, 2))


def test_what_was_found_of_another_plan_is_not_used(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", "text", dtype="float16")
    packed = make_tiny_model(tmp_path / "packed", "text", dtype="float16", quantize=64)
    other = layered(base, packed, CardPlan("plain", samples=1, seqlen=32), tmp_path)
    assert len(drained(other)[1]) == 4
    plan = CardPlan("plain", samples=2, seqlen=64)
    card, steps = drained(layered(base, packed, plan, tmp_path))
    assert len(steps) == 4
    assert card == drained(layered(base, packed, plan, tmp_path / "new"))[0]


def same_as(card: Card, name: str, original: Engine, other: Engine, made: Layered) -> None:
    compared, errors = list[divergence.Compared](), OutputErrors()
    for held in (passage.held for passage in made.passages if passage.compared):
        ours, theirs = divergence.read(other, held), divergence.read(original, held)
        compared.append(divergence.compare(held, divergence.coded(theirs.logits), ours.logits))
        errors.add(ours.outputs, theirs.outputs)
    column, expected = card.columns[name], by_kind(compared)
    assert set(column.divergence) == set(expected)
    for kind, found in expected.items():
        assert column.divergence[kind].kl.value == pytest.approx(found.kl.value, rel=1e-2, abs=1e-7)
        assert column.divergence[kind].top1.value == pytest.approx(found.top1.value, abs=0.02)
        assert column.divergence[kind].unchanged is None and column.divergence[kind].first == ()
    weights = list(compare_weights(other.model, weights_of(made.base.source.index)))  # type: ignore[arg-type]
    for ours, theirs in zip(column.layers, joined(errors.layers(), weights), strict=True):
        assert ours.output.sqnr_db == pytest.approx(theirs.output.sqnr_db, abs=0.05)
        assert ours.output.cosine == pytest.approx(theirs.output.cosine, abs=1e-5)
        assert ours.weights and theirs.weights and ours.weights.sqnr_db == pytest.approx(theirs.weights.sqnr_db)
        assert same_numbers(ours.linears, theirs.linears)


def same_numbers(ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    return list(ours) == list(theirs) and all(math.isclose(ours[n], theirs[n], rel_tol=1e-6) for n in ours)
