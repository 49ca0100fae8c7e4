"""The script that proves a real checkpoint: what it prints, and that it sees what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import verify_checkpoint as script
from make_tiny_model import make_tiny_model
from tinychat.errors import CapacityError
from verify_checkpoint import Greedy, agreement, main


def run(capsys, folder, *flags: str) -> tuple[int, dict[str, str]]:
    code = main([str(folder), *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] == "```"
    pairs = (line.split("  ", 1) for line in lines[1:-1])
    return code, {label.strip(): text.strip() for label, text in pairs}


@pytest.mark.parametrize("layout", ["vila", "llava_hf", "llava_next", "text"])
def test_a_right_checkpoint(tmp_path, capsys, layout):
    code, shown = run(capsys, make_tiny_model(tmp_path / "model", layout, vision="siglip"), "--tokens", "6")
    assert code == 0
    assert shown["verdict"] == "right"
    assert shown["against transformers"].startswith("6 of 6 greedy tokens equal, logits differ by ")
    assert shown["model"] == "model"
    assert (shown["missing"], shown["unexpected"]) == ("0", "0")
    tokens = {"text": None, "llava_next": "at most 88 (56 pixels in patches of 14)"}
    assert shown.get("tokens a picture") == tokens.get(layout, "16 (56 pixels in patches of 14)")


@pytest.mark.parametrize(
    ("layout", "group"), [("llava", None), ("llava", 32), ("vila", 64), ("llava_hf", 32), ("text", 32)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_cannot_load_is_compared_by_its_decoder(tmp_path, capsys, layout, group, tied):
    folder = make_tiny_model(tmp_path / "model", layout, text="qwen2", quantize=group, tied=tied)
    code, shown = run(capsys, folder, "--tokens", "6")
    assert (code, shown["verdict"]) == (0, "right")
    assert shown["against transformers"].startswith("6 of 6 greedy tokens equal, logits differ by ")
    assert shown["against transformers"].endswith(script.PART) == (layout != "text")
    assert shown["weights"] == (f"4-bit AWQ, groups of {group}" if group else "float")


def test_numbers_of_4_bit_weights_that_differ_are_seen(tmp_path, capsys, monkeypatch):
    """As if our unpacking took the nibbles in their order."""
    monkeypatch.setattr(script, "NIBBLES", tuple(range(8)))
    code, shown = run(capsys, make_tiny_model(tmp_path, "text", quantize=32))
    assert (code, shown["verdict"]) == (3, "WRONG")


def test_what_was_not_compared_is_not_called_right(tmp_path, capsys, monkeypatch):
    folder = make_tiny_model(tmp_path / "model", "text")
    code, shown = run(capsys, folder, "--keys-only")
    assert "against transformers" not in shown
    assert (code, shown["verdict"]) == (0, "names and shapes are right, numbers were not compared")

    def full(*_args, **_how):
        raise CapacityError("9 GiB are needed", "take less")

    monkeypatch.setattr(script.planner, "check", full)
    code, shown = run(capsys, folder)
    assert (code, shown["against transformers"]) == (0, "not run: 9 GiB are needed")
    assert shown["verdict"] == "names and shapes are right, numbers were not compared"


def test_names_of_a_checkpoint_cannot_steer_the_terminal(tmp_path, capsys):
    folder = make_tiny_model(tmp_path / "a\x1b[31mb", "text")
    tensors = load_file(folder / "model.safetensors")
    tensors["sur\x1b]0;owned\x07\nprise"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    main([str(folder)])
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert "sur]0;owned prise" in out and "a[31mb" in out


def test_wrong_keys_are_listed(tmp_path, capsys):
    folder = make_tiny_model(tmp_path, "text")
    tensors = load_file(folder / "model.safetensors")
    tensors["surprise"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    code, found = run(capsys, folder)
    assert code == 3
    assert found["missing"] == "1: llm.model.norm.weight"
    assert found["unexpected"] == "1: surprise"
    assert found["verdict"] == "WRONG"


def test_numbers_that_differ_are_seen(tmp_path, capsys, monkeypatch):
    """As if our config reader took another theta than transformers does."""
    folder = make_tiny_model(tmp_path, "text")
    ours = script.by_ours

    def other(source, *args):
        assert source.config.llm_cfg is not None
        source.config.llm_cfg["rope_theta"] = 77.0
        return ours(source, *args)

    monkeypatch.setattr(script, "by_ours", other)
    code, found = run(capsys, folder)
    assert code == 3
    assert found["verdict"] == "WRONG"


def test_a_near_tie_is_no_fault():
    ours, theirs = torch.tensor([[1.0, 1.0001, -4.0]]), torch.tensor([[1.0001, 1.0, -4.0]])
    good, words = agreement(Greedy([1], ours), Greedy([0], theirs), torch.float32)
    assert good
    assert words.startswith("0 of 1 greedy tokens equal")
    assert words.endswith("(a near tie, then another text)")
    good, _ = agreement(Greedy([1], ours + 0.1 * ours.abs()), Greedy([0], theirs), torch.float32)
    assert not good


def test_errors_end_in_their_sentence_and_code(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert main([str(tmp_path)]) == 3
    assert "gpt2" in capsys.readouterr().err
