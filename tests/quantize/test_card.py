"""The card that every new checkpoint has: what is on it, how it is made with little memory, and how it is resumed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import json_keys
import pytest
import torch

from awq import quantize as searching
from make_tiny_model import make_tiny_model
from tinychat.core import Progress
from tinychat.errors import ModelError, UsageError
from tinychat.eval import divergence, heldout, tasks
from tinychat.eval.card import TEXT_ONLY, Note
from tinychat.inputs.processor import Processor
from tinychat.load import EMBEDDED, open_source
from tinychat.quantize.card_plan import LAYERS, NONE, plan_of
from tinychat.quantize.job import Calibration, Job
from tinychat.quantize.plan import costs, with_card
from tinychat.quantize.run import Began, Event, LayerDone, Run, Written
from tinychat_kernels.layout import QuantSpec

QUICK = {"scale_grid": 2, "clip_grid": 2, "loss_tokens": 64}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (heldout, tasks):
        monkeypatch.setattr(module, "ANSWER_TOKENS", 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {layout: make_tiny_model(root / layout, layout, dtype="float16") for layout in ("text", "vila")}


def job(folder: Path, out: Path, **changes: Any) -> Job:
    quick: dict[str, Any] = {
        "spec": QuantSpec(group_size=32),
        "search": QUICK,
        "calibration": Calibration(samples=2, seqlen=24),
        "card_samples": 1,
    }
    wanted = quick | changes
    return Job(folder, out, **(wanted if wanted.get("card", True) else wanted | {"card_samples": None}))


def run(wanted: Job, resume: bool = False) -> list[Event]:
    events = [*Run(wanted).events(resume)]
    assert isinstance(events[-1], Written)
    return events


def quality(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quality.json").read_text("utf-8"))


def told(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "quality.json").read_bytes(), (folder / "README.md").read_bytes()


def test_a_checkpoint_has_its_card(models: dict[str, Path], tmp_path: Path) -> None:
    events = run(job(models["vila"], tmp_path / "out"))
    found, readme = quality(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text("utf-8")
    json_keys.check(found, "tinychat.card/1")
    columns = found["models"]
    assert [column["title"] for column in columns.values()] == ["16 bit", "RTN 4 bit", "AWQ 4 bit"]
    assert {score["kind"] for score in columns["nearest"]["probes"]} == {"read", "count", "colour", "chart"}
    assert columns["quantized"]["divergence"]["pictures"]["first"] and len(columns["quantized"]["layers"]) == 2
    facts = json.loads((tmp_path / "out" / "quantize.json").read_text("utf-8"))
    assert found["facts"]["calibration"] == facts["calibration"] and found["facts"]["options"]["group_size"] == 32
    assert "AWQ 4 bit" in readme and facts["calibration"]["sha256"] in readme
    steps = [event for event in events if isinstance(event, Progress) and event.stage == "card"]
    assert steps[-1].done == steps[-1].total == len(steps)
    assert any(isinstance(event, Note) and event.text.startswith("AWQ 4 bit: KL") for event in events)


def test_what_is_only_rounded_is_compared_with_the_original_alone(models: dict[str, Path], tmp_path: Path) -> None:
    run(job(models["text"], tmp_path / "out", method="rtn"))
    assert list(quality(tmp_path / "out")["models"]) == ["base", "quantized"]
    assert quality(tmp_path / "out")["models"]["quantized"]["title"] == "RTN 4 bit"


def test_floats_that_stand_for_few_bits_are_called_so(models: dict[str, Path], tmp_path: Path) -> None:
    run(job(models["text"], tmp_path / "out", pseudo=True, spec=QuantSpec(3, 32)))
    titles = [column["title"] for column in quality(tmp_path / "out")["models"].values()]
    assert titles == ["16 bit", "RTN 3 bit", "AWQ 3 bit, as floats"]


def test_no_card_is_made_where_none_is_wanted(models: dict[str, Path], tmp_path: Path) -> None:
    made = Run(job(models["text"], tmp_path / "out", method="rtn", card=False))
    assert made.plan.card == NONE and "card" not in made.plan.ram
    assert isinstance([*made.events()][-1], Written)
    assert not {"quality.json", "README.md"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_a_layer_that_fell_back_is_listed(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = searching.quantize_block, list[int]()

    def harmed(*args: Any, **kwargs: Any) -> Any:
        """The second layer's search finds a scale that does harm."""
        calls.append(1)
        with pytest.MonkeyPatch.context() as patch:
            if len(calls) == 2:
                patch.setattr(searching, "search_scale", lambda layers, *_: torch.logspace(-3, 3, _width(layers)))
            return real(*args, **kwargs)

    monkeypatch.setattr(searching, "quantize_block", harmed)
    run(job(models["text"], tmp_path / "out", search={**QUICK, "clip": False, "compensate": False, "duo": False}))
    assert quality(tmp_path / "out")["facts"]["fallbacks"] == [1]
    assert "\n- fallbacks: 1\n" in (tmp_path / "out" / "README.md").read_text("utf-8")


def _width(layers: Any) -> int:
    return next(iter(layers)).weight.shape[1]


# Where memory is short


def in_layers(wanted: Job) -> Run:
    made = Run(wanted)
    made.plan = with_card(made.plan, wanted, costs(wanted, made.source).of(LAYERS))
    return made


def test_memory_decides_how_it_is_made(models: dict[str, Path], tmp_path: Path) -> None:
    ample = Run(job(models["text"], tmp_path / "out")).plan
    assert ample.card == "float32" and ample.ram["card"] > 0 and 0 < ample.card_seconds < ample.seconds
    tight = Run(job(models["text"], tmp_path / "out", max_ram=ample.ram["card"] - 2**26)).plan
    assert tight.card == LAYERS and tight.card_whole > 2**20


@pytest.mark.parametrize("layout", ["text", "vila"])
def test_in_layers_it_says_what_is_left_out(models: dict[str, Path], tmp_path: Path, layout: str) -> None:
    made = in_layers(job(models[layout], tmp_path / "out", name="org/base"))
    assert isinstance([*made.events()][-1], Written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    found = quality(tmp_path / "out")
    json_keys.check(found, "tinychat.card/1")
    why, *more = found["left_out"]
    assert re.search(r"takes [\d.]+ MiB of memory", why) and why.endswith(
        "tinychat eval out --against org/base --card."
    )
    assert more == ([TEXT_ONLY] if layout == "text" else [])
    column = found["models"]["quantized"]
    assert column["probes"] == [] and column["perplexity"] > 1
    whole = column["divergence"]["all"]
    assert whole["kl"]["value"] > 0 and (whole["first"], whole["unchanged"], whole["median_first"]) == ([], None, None)
    assert all(math.isfinite(layer["output"]["sqnr_db"]) for layer in column["layers"])
    assert why.split(":")[0] in (tmp_path / "out" / "README.md").read_text("utf-8")


# Resuming


def until_measuring(events: Iterator[Event], steps: int) -> None:
    """Goes on until so many steps of the card are done, and is gone."""
    for event in events:
        steps -= isinstance(event, Progress) and event.stage == "card"
        if not steps:
            break
    events.close()  # type: ignore[attr-defined]  # a generator


@pytest.mark.parametrize("way", ["float32", LAYERS])
def test_cut_off_while_measuring_only_the_card_is_made_again(models: dict[str, Path], tmp_path: Path, way: str) -> None:
    def began(name: str) -> Run:
        wanted = job(models["text"], tmp_path / name)
        return Run(wanted) if way == "float32" else in_layers(wanted)

    # the same name, since the card tells it
    assert isinstance([*began("whole/out").events()][-1], Written)
    until_measuring(began("cut/out").events(), 2)
    assert not (tmp_path / "cut/out").exists()
    again = run(job(models["text"], tmp_path / "cut/out"), resume=True)  # with room for whole models
    assert not [event for event in again if isinstance(event, LayerDone)]
    assert next(event for event in again if isinstance(event, Began)).plan.card == way
    assert told(tmp_path / "cut/out") == told(tmp_path / "whole/out")


def test_a_card_that_cannot_be_made_costs_no_checkpoint(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise ModelError("the model gives NaN", "check its weights")

    monkeypatch.setattr(divergence, "check_finite", refuse)
    wanted = job(models["text"], tmp_path / "out")
    sentence = (
        "the quality card cannot be made: the model gives NaN; check its weights; or have the checkpoint without a "
        "card, by the same command with --resume, and with --no-card in place of --card-samples$"
    )
    with pytest.raises(ModelError, match=sentence):
        run(wanted)
    assert not wanted.out.exists() and wanted.partial.exists()
    run(replace(wanted, card=False, card_samples=None), resume=True)
    assert wanted.out.exists() and not (wanted.out / "quality.json").exists()


def test_too_few_samples_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--card-samples is 0; give 1 or more, or --no-card"):
        job(models["text"], tmp_path / "out", card_samples=0)


def test_samples_of_no_card_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--no-card makes no card, and --card-samples 2 is given as well; give one of"):
        Job(models["text"], tmp_path / "out", card=False, card_samples=2)


def test_the_set_suits_the_model(models: dict[str, Path], tmp_path: Path) -> None:
    def plan(folder: Path) -> tuple[str, int]:
        found = plan_of(Processor.from_folder(folder, open_source(folder).config), None)
        return found.heldout, found.per_kind

    assert plan(EMBEDDED) == ("demo", 16) and plan(models["text"]) == ("plain", 4)
