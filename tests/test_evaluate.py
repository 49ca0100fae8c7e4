"""tinychat eval: what flags ask for, and whole runs on tiny models, as a gate and with a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import json_keys
import pytest
import torch
from safetensors.torch import load_file, save_file

from make_tiny_model import make_tiny_model
from tinychat import evaluate
from tinychat.cli import main
from tinychat.errors import UsageError
from tinychat.eval import heldout, tasks
from tinychat.flags import EvalFlags


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (heldout, tasks):
        monkeypatch.setattr(module, "ANSWER_TOKENS", 5)


def tasks_of(**flags: Any) -> tuple[str, ...]:
    return evaluate.job_of(EvalFlags(**flags), None, None).tasks


def test_tasks_follow_from_the_flags() -> None:
    assert tasks_of() == ("demo",) and tasks_of(tasks="ppl, demo,ppl") == ("ppl", "demo")
    assert tasks_of(against="base") == tasks_of(card=True) == ("ppl", "probes")
    assert not evaluate.job_of(EvalFlags(), None, None).makes_card
    assert evaluate.job_of(EvalFlags(tasks="demo", against="base"), None, None).makes_card


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"tasks": "smell"}, "--tasks names 'smell'; give some of demo,ppl,probes"),
        ({"tasks": "demo", "card": True}, "the demo tasks are no part of a card; add --tasks ppl,probes"),
        ({"plots": "out"}, "--plots needs a model to compare with; add --against BASE"),
        ({"nearest": True}, "--nearest needs a model to compare with; add --against BASE"),
        ({"fail_under": "kl=0.1"}, "names kl, which is not measured; add --against BASE"),
        ({"only": ["smell"]}, "there is no task 'smell'"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        evaluate.job_of(EvalFlags(**flags), None, None)


def test_a_quantized_model_beside_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny_model(tmp_path / "base", "text", hidden_size=128)
    folder = make_tiny_model(tmp_path / "rtn", "text", hidden_size=128, quantize=64)
    (folder / "quality.json").write_text(json.dumps({"facts": {"method": "awq"}}))
    gate = "top1=1.01,kl=9,ppl_ratio=2"
    flags = ["--against", str(base), "--samples", "1", "--card", "--fail-under", gate, "--json"]
    assert main(["eval", str(folder), *flags]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    json_keys.check(found, "tinychat.eval/1 with a card")
    models = found["card"]["models"]
    assert [model["title"] for model in models.values()] == ["32 bit", "RTN 4 bit", "AWQ 4 bit"]
    # the folder was rounded to nearest with scales of 16 bit, as BASE is here
    assert models["nearest"]["divergence"]["all"]["kl"] == pytest.approx(
        models["quantized"]["divergence"]["all"]["kl"], rel=0.02
    )
    assert models["quantized"]["divergence"]["all"]["kl"]["value"] > 0
    assert [sentence.partition(" is ")[0] for sentence in found["failed"]] == ["top1"]
    assert "--fail-under: top1 is 0." in err and "it must be at least 1.01" in err
    assert found["card"]["facts"] == {"method": "awq"}
    assert json.loads((folder / "quality.json").read_text("utf-8")) == found["card"]
    assert "AWQ 4 bit" in (folder / "README.md").read_text("utf-8")


def test_the_quantizer_s_notes_are_the_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_model(tmp_path / "m", "text", hidden_size=128, quantize=64)
    notes = {"options": {"method": "awq"}, "fallbacks": [1], "calibration": {"sha256": "0f"}, "layers": [{}]}
    (folder / "quantize.json").write_text(json.dumps(notes))
    assert main(["eval", str(folder), "--tasks", "ppl", "--seqlen", "64", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)["card"]
    assert card["facts"] == {name: notes[name] for name in ("options", "calibration", "fallbacks")}
    assert card["models"]["quantized"]["title"] == "AWQ 4 bit" and list(card["models"]) == ["quantized"]


def test_floats_that_stand_for_few_bits_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_model(tmp_path / "m", "text", dtype="float16")
    notes = {"options": {"method": "awq", "bits": 3, "pseudo": True}, "format": "float"}
    (folder / "quantize.json").write_text(json.dumps(notes))
    assert main(["eval", str(folder), "--tasks", "ppl", "--seqlen", "64"]) == 0
    assert "AWQ 3 bit, as floats" in capsys.readouterr().out


def test_a_corrupted_model_fails_the_gate_that_it_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny_model(tmp_path / "base", "text")
    folder = make_tiny_model(tmp_path / "copy", "text")
    flags = ["--against", str(base), "--tasks", "ppl", "--samples", "1", "--seqlen", "64"]
    gate = ["--fail-under", "top1=0.99,kl=0.001,unchanged=1,sqnr=60,ppl_ratio=1.001"]
    assert main(["eval", str(folder), *flags, *gate]) == 0
    assert "error of the layers' outputs" in capsys.readouterr().out
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    save_file({**weights, name: torch.randn(weights[name].shape)}, path, {"format": "pt"})
    assert main(["eval", str(folder), *flags, *gate]) == 1
    err = capsys.readouterr().err
    assert "--fail-under: kl is " in err and "it must be at most 0.001" in err and "--fail-under: sqnr is " in err


def test_a_text_of_the_user_s_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = make_tiny_model(tmp_path / "m", "text"), tmp_path / "words.txt"
    text.write_text("Some words, again and again. " * 20)
    assert main(["eval", str(folder), "--tasks", "ppl", "--text", str(text), "--seqlen", "100"]) == 0
    assert "perplexity (words.txt, windows of 100)" in capsys.readouterr().out
    assert main(["eval", str(folder), "--tasks", "ppl", "--text", str(text)]) == 2
    assert "one window takes 2048; give a longer text, or --seqlen 580 or less" in capsys.readouterr().err


@pytest.mark.parametrize("quantize", [None, 64])
def test_rounding_needs_a_float_base_and_a_quantized_model(
    quantize: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_model(tmp_path / "m", "text", hidden_size=128, quantize=quantize)
    assert main(["eval", str(folder), "--against", str(folder), "--nearest"]) == 2
    assert ("is quantized already" if quantize else "is not quantized") in capsys.readouterr().err


def test_a_card_is_refused_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_model(tmp_path / "m", "text")
    (folder / "README.md").write_text("<!-- tinychat card: begin -->")
    assert main(["eval", str(folder), "--card"]) == 3
    out, err = capsys.readouterr()
    assert (
        not out and "README.md has 1 marks where a card begins and 0 where one ends" in err and "perplexity" not in err
    )
