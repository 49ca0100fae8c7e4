"""bench_clip: a dry run on tiny towers, and what it makes of its rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bench_clip
from bench_clip import ALONE, INT8, OURS, THEIRS, Case, Turn
from tinychat_kernels import cpu

TINY = ["--models", "clip-tiny,siglip-tiny", "--rounds", "2"]


def test_both_towers_and_types_are_measured_against_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_clip.main([*TINY, "--threads", "1", "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["model"], row["dtype"], row["column"]): row for row in found["rows"]}
    for model in ("clip-tiny", "siglip-tiny"):
        for dtype in ("fp32", "bf16"):
            assert rows[model, dtype, THEIRS]["times_as_fast"]["median"] == 1
            assert len(rows[model, dtype, OURS]["values"]) == 2
            assert rows[model, dtype, OURS]["distance"] < {"fp32": 1e-5, "bf16": 2e-2}[dtype]
        assert ((model, "fp32", INT8) in rows) == cpu.available()[0]
        assert (model, "bf16", INT8) not in rows


@pytest.mark.slow
def test_processes_share_a_tower(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert bench_clip.main(["--models", "clip-tiny", "--dtypes", "fp32", "--rounds", "1", "--threads", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in (OURS, THEIRS, ALONE, "tinychat, 2 processes"))


def test_ratios_are_taken_round_by_round() -> None:
    turns = {OURS: [Turn(1.0, 0), Turn(2.0, 0.3), Turn(4.0, 0)], THEIRS: [Turn(2.0, 0)] * 3}
    ours, theirs = bench_clip.rows_of(Case("clip-tiny", "fp32", 1, 1), turns, {OURS: 0.0})
    assert ours["others"] == 0.3
    assert (ours["times_as_fast"]["median"], ours["times_as_fast"]["min"], ours["seconds"]["median"]) == (1.0, 0.5, 2.0)
    assert (theirs["times_as_fast"]["median"], theirs["distance"]) == (1.0, None)


def test_each_round_runs_every_column_once_and_the_first_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_clip, "busy_times", lambda: (0.0, 0.0, 0.0))
    ran: list[str] = []
    columns = {name: (1, lambda name=name: ran.append(name)) for name in "abc"}
    found = bench_clip.in_rounds(columns, 3)
    assert sorted(ran) == sorted("abc" * 4)
    assert [len(found[name]) for name in "abc"] == [3, 3, 3]
    assert len({"".join(ran[i : i + 3]) for i in range(0, 12, 3)}) > 1


def test_a_turn_that_others_disturb_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 9.0, 9.0])  # others compute during the first turn alone
    monkeypatch.setattr(bench_clip, "busy_times", lambda: (next(clock), 0.0, 0.0))
    ran: list[int] = []
    assert bench_clip.least_disturbed(lambda: ran.append(1)).others <= 0
    assert len(ran) == 2
    monkeypatch.setattr(bench_clip, "busy_times", lambda: (9.0 * len(ran), 0.0, 0.0))
    assert bench_clip.least_disturbed(lambda: ran.append(1)).others > 1
    assert len(ran) == 2 + bench_clip.TRIES


def test_the_sizes_are_those_of_the_published_towers() -> None:
    clip, siglip = (Case(name, "fp32", 1, 1).config for name in ("clip-l-336", "siglip-so400m"))
    assert (clip.hidden_size, clip.num_hidden_layers, clip.image_size, clip.hidden_act) == (1024, 24, 336, "quick_gelu")
    assert (siglip.intermediate_size, siglip.num_hidden_layers, siglip.image_size) == (4304, 27, 384)


def test_a_model_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_clip.main(["--models", "clip-huge"])
    assert "'clip-huge' is none of clip-tiny, siglip-tiny, clip-l-336, siglip-so400m" in capsys.readouterr().err
    assert Path(bench_clip.__file__).stat().st_mode & 0o100
