"""bench_peers: what a comparison computes from its rounds, and how a program that is not there or fails is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

import bench_peers
from peers import report
from peers.process import Peer, PeerError, Process
from peers.protocol import Decoder, Setup, timed, token_ids

SHAPE = Decoder(vocab_size=96, hidden_size=128, intermediate_size=256, layers=2, heads=4, kv_heads=2)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


def setup(folder: Path, **options: object) -> Setup:
    return Setup(SHAPE, threads=1, context=32, folder=str(folder), options=dict(options))


def test_a_token_reads_every_linear_once():
    wide, inner, kv = 128, 256, 64
    layer = wide * wide * 2 + wide * kv * 2 + 3 * wide * inner
    assert SHAPE.linear_bytes(0.5, 2) == (2 * layer) // 2 + 96 * wide * 2


def test_ratios_are_taken_round_by_round():
    samples = {("tinychat", "decode"): [10.0, 20.0, 30.0], ("other", "decode"): [10.0, None, 10.0]}
    (found,) = report.ratios(samples)
    assert (found["peer"], found["values"], found["median"]) == ("other", [1.0, 3.0], 2.0)
    assert [row["median"] for row in report.speeds(samples)] == [20.0, 10.0]


def test_quartiles_lie_between_the_values():
    assert report.quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert report.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_tokens_are_the_same_for_all_and_in_the_vocabulary():
    first, again = list(token_ids(200, 96)), list(token_ids(200, 96))
    assert first == again and set(first) <= set(range(96)) and len(set(first)) > 40


def test_a_short_call_is_repeated():
    calls: list[int] = []
    assert 0 < timed(lambda: calls.append(1), least=0.001) <= 0.001 and len(calls) > 1


def test_only_names_the_beginnings():
    assert [peer.name for peer in bench_peers.chosen(["llama"])] == ["llama.cpp Q4_0", "llama.cpp Q4_K_M"]
    assert [peer.name for peer in bench_peers.chosen(["tinychat"])] == ["tinychat"]
    with pytest.raises(SystemExit, match="no program's name begins with nothing"):
        bench_peers.chosen(["nothing"])


def test_what_is_not_installed_is_named(tmp_path: Path):
    with pytest.raises(PeerError, match="scripts/setup_peers makes it"):
        Process(Peer("x", "torch_peer", "none"), tmp_path / "bin/python", setup(tmp_path))


def test_what_does_not_open_says_why(tmp_path: Path):
    with pytest.raises(PeerError, match="KeyError: 'int5'"):
        Process(Peer("x", "torch_peer", "own", {"kind": "int5"}), Path(sys.executable), setup(tmp_path, kind="int5"))


def test_what_dies_is_named_with_its_code(tmp_path: Path):
    with pytest.raises(PeerError, match="it ended with code 1; its log says why"):
        Process(Peer("x", "no_such_peer", "own"), Path(sys.executable), setup(tmp_path))
    assert "no_such_peer" in (tmp_path / "x.log").read_text()


def test_a_setup_arrives_as_it_was_sent(tmp_path: Path):
    for tower in (None, bench_peers.TOWERS["tiny"]):
        sent = dataclasses.replace(setup(tmp_path, kind="bf16"), tower=tower)
        assert Setup.of(json.loads(json.dumps(dataclasses.asdict(sent)))) == sent


def test_a_picture_is_the_only_task_where_it_is_asked_for(tmp_path: Path):
    def plan(*arguments: str) -> bench_peers.Plan:
        return bench_peers.plan_of(bench_peers.parser().parse_args([*arguments, "--folder", str(tmp_path)]))

    found = plan("--picture", "32")
    assert [task.name for task in found.tasks] == ["encode 1", "picture 32"]
    assert found.setup.tower == bench_peers.CLIP_L and found.setup.tower.image_tokens == 576
    assert {peer.name for peer in found.peers} >= {"tinychat", "transformers bf16"}
    assert plan().setup.tower is None and not any(task.is_once for task in plan().tasks)


def test_a_page_says_what_one_takes_in_milliseconds():
    row = {"program": "tinychat", "task": "encode 1", "milliseconds": 333.333, **report.spread([3.0])}
    assert report._speed_lines({"speeds": [row]})[-1].endswith("|  | 333.3 |")


@pytest.mark.slow
@needs_compiler
def test_pictures_are_compared_with_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shape = Decoder(vocab_size=320, hidden_size=128, intermediate_size=256, layers=1, heads=2, kv_heads=1)
    monkeypatch.setattr(bench_peers, "SHAPES", {"tiny": shape})
    arguments = ["--shape", "tiny", "--rounds", "2", "--threads", "1", "--picture", "6", "--folder", str(tmp_path)]
    assert bench_peers.main(arguments) == 0
    found = json.loads(next(tmp_path.glob("result-*.json")).read_text())
    assert found["tower"]["image_size"] == 56 and set(found["programs"]) == {p.name for p in bench_peers.WITH_PICTURES}
    rows = {(row["task"], row["program"]): row for row in found["speeds"]}
    assert len(rows) == 2 * len(bench_peers.WITH_PICTURES)
    for (task, _), row in rows.items():
        tokens = {"encode 1": 1, "picture 6": 6}[task]
        assert row["rounds"] == 2 and row["milliseconds"] == pytest.approx(1000 * tokens / row["median"])
    assert ("picture 6", "transformers bf16") in {(row["task"], row["peer"]) for row in found["ratios"]}
    assert "| encode 1 | transformers bf16 |" in capsys.readouterr().out


@pytest.mark.slow
@needs_compiler
def test_a_comparison_becomes_an_object_a_page_and_a_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shape = Decoder(vocab_size=320, hidden_size=128, intermediate_size=256, layers=1, heads=2, kv_heads=1)
    monkeypatch.setattr(bench_peers, "SHAPES", {"tiny": shape})
    arguments = [
        "--shape",
        "tiny",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--only",
        "tinychat,tinychat exact,torch bf16,llama.cpp Q4_0",
    ]
    arguments += ["--decode", "8", "--depth", "0,4", "--prefill", "8", "--linears", "1,4"]
    arguments += ["--seconds", "0.01", "--folder", str(tmp_path), "--peers", str(tmp_path / "none")]
    assert bench_peers.main(arguments) == 0
    found = json.loads(next(tmp_path.glob("result-*.json")).read_text())
    tasks = {row["task"] for row in found["speeds"] if row["program"] == "tinychat"}
    assert tasks == {"decode 8", "decode 8 at 4", "prefill 8", "linears 1", "linears 4", "rows 8"}
    assert all(row["rounds"] == 2 for row in found["speeds"])
    assert {(row["task"], row["peer"]) for row in found["ratios"]} == {
        ("linears 1", "torch bf16"), ("linears 4", "torch bf16"), *((task, "tinychat exact") for task in tasks),
    }  # fmt: skip
    assert found["programs"]["llama.cpp Q4_0"]["error"] == "q4_0.gguf was not made"
    assert found["machine"]["read"]["rounds"] == 6 and found["machine"]["read"]["min"] > 0
    page = capsys.readouterr().out
    assert "| llama.cpp Q4_0 | left out: q4_0.gguf was not made |" in page
    assert "| linears 1 | torch bf16 |" in page
    assert next(tmp_path.glob("result-*.png")).read_bytes().startswith(b"\x89PNG")
    assert "torch bf16" in report.text_chart(found)
