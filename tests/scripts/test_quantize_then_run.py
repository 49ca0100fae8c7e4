"""The script that quantizes a model and asks it: the folder it writes, what it prints, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image as pillow

from make_tiny_model import make_tiny_model
from quantize_then_run import main
from tinychat.config import read_config
from tinychat.eval import heldout, tasks
from tinychat.load import quant_spec
from tinychat.quantize import card_plan

QUICK = ("--group", "32", "--samples", "2")


@pytest.fixture(autouse=True)
def small_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (heldout, tasks):
        monkeypatch.setattr(module, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(card_plan, "SHARE", 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "vila")


def test_a_quantized_model_is_written_and_answers(model, tmp_path, capsys):
    pillow.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    out = tmp_path / "out"
    assert main([str(model), str(out), "What is it?", str(tmp_path / "red.png"), *QUICK]) == 0
    printed = capsys.readouterr()
    assert printed.out
    assert printed.out.replace("\n", "").replace("\t", "").isprintable()
    assert [line[:12] for line in printed.err.splitlines()] == ["layer 1 of 2", "layer 2 of 2"]
    spec = quant_spec(read_config(out))
    assert spec is not None and spec.group_size == 32 and (out / "quality.json").is_file()


@pytest.mark.parametrize(
    ("source", "more", "code", "sentence"),
    [
        ("/nope\x1b[31m", (), 3, "error: there is no folder /nope[31m; "),
        (None, (), 3, "cannot be quantized: in_features=64 is not a multiple of group_size=128; choose another"),
        (None, ("gone.png", *QUICK), 4, "gone.png does not exist"),
    ],
)
def test_what_cannot_work_is_one_line_and_a_code(model, tmp_path, capsys, source, more, code, sentence):
    assert main([source or str(model), str(tmp_path / "out"), "What?", *more]) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("layer ")]
    assert (out, len(lines)) == ("", 1)
    assert sentence in lines[0] and "\x1b" not in lines[0]


def test_the_model_is_not_overwritten(model, capsys):
    assert main([str(model), str(model), "What?", "--group", "32"]) == 2
    assert "is the model itself; give another folder to write" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(model, capsys):
    assert main([str(model), "/dev/null/out", "What?", *QUICK]) == 2
    assert "/dev/null/out.partial cannot be written or read: Not a directory" in capsys.readouterr().err


def test_other_groups_are_refused(model, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(model), str(tmp_path), "What?", "--group", "48"])
    assert "argument --group: invalid choice" in capsys.readouterr().err
