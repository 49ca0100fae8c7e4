"""bench: what a round asks for, how rounds become numbers, and the objects and tables that come out."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import json_keys
import pytest
import torch
from PIL import Image as pillow
from scripted_engine import ScriptedEngine

from make_tiny_model import make_tiny_model
from tinychat import bench
from tinychat.core import Event, Failed, Finished, Image, Request, Text
from tinychat.errors import CapacityError, UsageError
from tinychat.flags import BenchFlags, ModelFlags
from tinychat.load import load_folder
from tinychat.placement import Placement
from tinychat_kernels import cpu


@dataclass
class TimedEngine(ScriptedEngine):
    """A scripted engine whose answer number i decodes at i tokens a second, and which remembers its resets."""

    resets: int = 0

    def reset(self) -> None:
        self.resets += 1

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        for event in super().run(requests):
            if isinstance(event, Finished):
                event = replace(event, timings=replace(event.timings, decode_tps=float(len(self.requests)), load_s=2.5))
            yield event


def tokens_of(request: Request) -> SimpleNamespace:
    """A processor whose tokens are letters; a raw prompt begins with one of its own."""
    return SimpleNamespace(ids=["<s>", *"".join(part.text for part in request.parts if isinstance(part, Text))])


def subject(engine: TimedEngine) -> bench.Subject:
    model = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cpu"), modules=list)
    return bench.Subject("tiny", model, tokens_of, engine)


def measured(engine: TimedEngine, work: bench.Workload) -> tuple[dict[str, object], list[str]]:
    reports: list[str] = []
    return bench.measure(subject(engine), work, reports.append), reports


def test_the_object_is_the_document_s():
    found, _ = measured(TimedEngine(), bench.Workload(prompt_tokens=30, rounds=2))
    json_keys.check(json.loads(json.dumps(found)), "tinychat.bench/1")
    assert (found["model"], found["dtype"], found["device"], found["load_s"]) == ("tiny", "bfloat16", "cpu", 2.5)


def test_the_first_round_does_not_count_and_each_begins_with_an_empty_cache():
    engine = TimedEngine()
    found, reports = measured(engine, bench.Workload(rounds=4))
    assert found["decode_tps"] == {"median": 3.5, "min": 2.0, "max": 5.0}
    assert engine.resets == len(engine.requests) == 5
    assert reports == ["warm-up", "round 1 of 4", "round 2 of 4", "round 3 of 4", "round 4 of 4"]


def test_a_round_is_a_raw_prompt_with_a_fixed_length_of_answer():
    engine = TimedEngine()
    measured(engine, bench.Workload(prompt_tokens=40, new_tokens=9, images=2, rounds=1))
    for request in engine.requests:
        assert [type(part) for part in request.parts] == [Image, Image, Text]
        assert (request.stopping.max_new_tokens, request.stopping.ignore_eos) == (9, True)
        assert request.sampling.temperature == 0


def test_no_picture_comes_twice():
    engine = TimedEngine()
    measured(engine, bench.Workload(images=2, rounds=2))
    pictures = [part.data for request in engine.requests for part in request.parts if isinstance(part, Image)]
    assert len(set(pictures)) == len(pictures) == 6


def test_pictures_are_pictures_and_the_same_for_the_same_seed():
    assert bench.picture(3) == bench.picture(3) != bench.picture(4)
    with pillow.open(io.BytesIO(bench.picture(3))) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("JPEG", bench.PICTURE_SIZE)


@pytest.mark.parametrize("tokens", [1, 4, 20, 100, 512])
def test_the_prompt_is_as_long_as_fits(tokens: int):
    text = bench.prompt_text(tokens_of, tokens)
    longer = bench._words(len(text.split()) + 1)
    assert longer.startswith(text)
    assert len(text) + 1 <= max(tokens, len("the") + 1) < len(longer) + 1


def test_a_failed_round_is_its_error():
    engine = TimedEngine([Failed("bench-0", "600 tokens do not fit into 512", "ask for fewer", 5)])
    with pytest.raises(CapacityError, match="600 tokens do not fit into 512; ask for fewer"):
        measured(engine, bench.Workload())


def test_the_peak_is_in_bytes_and_the_process_own():
    """A parent's memory, which getrusage counts in until the child has had more, is not the child's."""
    held = torch.ones(100_000_000)
    assert held.nbytes < bench.peak_ram() < 1e12
    assert bench.peak_ram() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.5)
    told = subprocess.run(
        [sys.executable, "-c", "from tinychat.bench import peak_ram; print(peak_ram())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 5e6 < int(told.stdout) < held.nbytes


def test_the_table_has_a_row_for_each_number():
    found, _ = measured(TimedEngine(), bench.Workload(rounds=1))
    rows = bench.rows(found)
    assert rows[0] == ("", "median", "min", "max")
    assert rows[1:3] == [("prefill, tokens/s", "200.0", "200.0", "200.0"), ("decode, tokens/s", "2", "2", "2")]
    assert len(rows) == 1 + len(bench.METRICS)
    assert bench.headline(found).startswith("tiny, bfloat16 on cpu, ")
    assert f", 4 ranks of {found['threads']} threads, " in bench.headline({**found, "ranks": 4})
    assert "; backend torch; keys and values bfloat16; " in bench.headline(found)
    assert bench.foot(found).startswith("peak memory: RAM ") and bench.foot(found).endswith("loaded in 2.5 s")


def test_a_depth_keeps_its_context_and_counts_decoding_alone():
    engine = TimedEngine()
    work = bench.Workload(rounds=2, depths=(0, 40), new_tokens=5)
    found, reports = measured(engine, work)
    assert [at["tokens"] for at in found["depths"]] == [0, 40]
    assert found["depths"][1]["decode_tps"] == {"median": 8.5, "min": 8.0, "max": 9.0}
    assert reports[-3:] == ["depth 40, warm-up", "depth 40, round 1 of 2", "depth 40, round 2 of 2"]
    assert engine.resets == 3 + 2  # a depth's context is computed once
    deep = engine.requests[-3:]
    assert len({request.parts for request in deep}) == 1 and len(tokens_of(deep[0]).ids) <= 40
    assert all(request.stopping.max_new_tokens == 5 for request in deep)
    assert ("decode after 40, tokens/s", "8.5", "8", "9") in bench.rows(found)


def test_deep_contexts_get_room(tmp_path: Path):
    flags = BenchFlags(depth="0,8192", new_tokens=64)
    model = ModelFlags(str(make_tiny_model(tmp_path, "text", max_positions=9000)))
    assert bench.roomy(model, flags).context == 8192 + 64 + 16
    assert bench.roomy(replace(model, context=8256), flags).context == 8256
    assert bench.roomy(model, BenchFlags(depth="100")) == bench.roomy(model, BenchFlags()) == model
    with pytest.raises(UsageError, match="--depth is '1,x'; give lengths of 0 or more, such as 0,2048,8192"):
        BenchFlags(depth="1,x")


def test_a_depth_that_does_not_fit_is_refused_with_one_that_does(tmp_path: Path):
    model = ModelFlags(str(make_tiny_model(tmp_path, "text", max_positions=600)))
    wanted = "--depth 99999 and 64 new tokens make 100063, the context holds 600; give a --depth of 536 or less$"
    with pytest.raises(UsageError, match=wanted):
        bench.roomy(model, BenchFlags(depth="0,99999"))
    assert bench.roomy(model, BenchFlags(depth="0,536")) == model
    with pytest.raises(UsageError, match="the context holds 100; give a --depth of 36 or less, or raise --context"):
        bench.roomy(replace(model, context=100), BenchFlags(depth="37"))


def test_a_model_on_ref_says_why_the_kernels_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    ready = load_folder(make_tiny_model(tmp_path, quantize=32), Placement(device="cpu"))
    assert ready.model.one_call is None
    why = dict.fromkeys(("decoder",), "TINYCHAT_BACKEND asks for ref")
    assert bench._obstacles(ready.model) == why
    monkeypatch.delenv("TINYCHAT_BACKEND")
    monkeypatch.setattr(cpu, "available", lambda: (False, "no compiler"))
    assert bench._obstacles(ready.model) == {"decoder": "cpu is off: no compiler"}


def test_threads_are_those_that_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_tiny_model(tmp_path, "text", quantize=32)
    ran, reason = cpu.available()
    if not ran:
        pytest.skip(reason)
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "threads", lambda: 77)
    assert bench._threads(load_folder(folder, Placement(device="cpu")).model) == 77
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    assert bench._threads(load_folder(folder, Placement(device="cpu")).model) == torch.get_num_threads()


def test_a_breakdown_needs_the_kernels():
    with pytest.raises(UsageError, match="--breakdown reads the CPU kernels' clock, and tiny runs on torch"):
        measured(TimedEngine(), bench.Workload(rounds=1, breakdown=True))


class Clock:
    """A decoder's profile that goes on by a second a stage whenever it is read, in rounds of other speeds."""

    reads = 0
    rounds = 0

    def start_profile(self) -> None:
        self.reads = 0
        self.rounds += 1

    def profile(self) -> dict[str, float]:
        self.reads += 1
        slowness = (1.0, 8.0, 0.5)[self.rounds % 3 - 1]
        return {"qkv": self.reads * slowness, "head": 2.0 * self.reads * slowness}


def test_a_breakdown_is_of_the_prompt_and_of_a_token():
    model = SimpleNamespace(
        dtype=torch.bfloat16, device=torch.device("cpu"), modules=list, one_call=SimpleNamespace(kernel=Clock())
    )
    engine = TimedEngine()
    found = bench.measure(
        bench.Subject("tiny", model, tokens_of, engine), bench.Workload(rounds=3, breakdown=True), lambda _: None
    )
    tokens = next(event for event in engine.run([engine.requests[-1]]) if isinstance(event, Finished)).usage
    each = max(tokens.completion_tokens - 1, 1)
    assert found["breakdown"] == [
        {"stage": "qkv", "prefill_s": 1.0, "decode_s": 1 / each},
        {"stage": "head", "prefill_s": 2.0, "decode_s": 2 / each},
    ]
    rows = bench.stage_rows(found)
    prompt = f"prompt of {found['prompt_tokens']}, us"
    assert rows[0] == ("median of 3", prompt, "%", "token after it, us", "%")
    assert [row[0] for row in rows[1:]] == ["qkv", "head", "all"] and rows[1][2] == rows[1][4] == "33.3"
    assert bench.stage_rows({"breakdown": []}) == []


def test_what_runs_by_modules_is_told_with_the_reason():
    model = SimpleNamespace(
        dtype=torch.bfloat16, device=torch.device("cpu"), modules=list, one_call=None, obstacle="hooks watch it",
        vision_tower=SimpleNamespace(obstacle=None),
    )  # fmt: skip
    subject = bench.Subject("tiny", model, tokens_of, TimedEngine())
    found = bench.measure(subject, bench.Workload(rounds=1), lambda _: None)
    assert found["obstacles"] == {"decoder": "hooks watch it"}
    assert bench.foot(found).endswith("; decoder by modules, since hooks watch it")
    with pytest.raises(UsageError, match="tiny runs on torch, its decoder by modules, since hooks watch it; take a"):
        bench.measure(subject, bench.Workload(rounds=1, breakdown=True), lambda _: None)


class LookingEngine(TimedEngine):
    """Its tower and projector take 5 s."""

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        for event in super().run(requests):
            yield replace(event, timings=replace(event.timings, vision_s=5.0)) if isinstance(event, Finished) else event


def test_a_breakdown_of_pictures_is_of_each():
    """Two pictures take the tower 3 s by its own clock."""
    tower, decoder = SimpleNamespace(kernel=Clock()), SimpleNamespace(kernel=Clock())
    model = SimpleNamespace(
        dtype=torch.bfloat16, device=torch.device("cpu"), modules=list, one_call=decoder,
        vision_tower=SimpleNamespace(one_call=tower),
    )  # fmt: skip
    subject = bench.Subject("tiny", model, tokens_of, LookingEngine())
    found = bench.measure(subject, bench.Workload(images=2, rounds=1, breakdown=True), lambda _: None)
    assert found["encode"] == [
        {"stage": "qkv", "seconds": 0.5}, {"stage": "head", "seconds": 1.0}, {"stage": "projector", "seconds": 1.0},
    ]  # fmt: skip
    rows = bench.encode_rows(found)
    assert rows[0] == ("stage", "picture, us", "%") and rows[-1] == ("all", "2500000.0", "100.0")
    assert [row[0] for row in rows[1:]] == ["qkv", "head", "projector", "all"] and rows[1][2] == "20.0"
    without = bench.measure(subject, bench.Workload(rounds=1, breakdown=True), lambda _: None)
    assert without["encode"] == [] and bench.encode_rows(without) == []


def test_startup_is_measured_in_new_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "STARTUP", {name: (label, ("-c", "pass")) for name, (label, _) in bench.STARTUP.items()})
    found = bench.startup(2)
    json_keys.check(found, "tinychat.bench/1 with --startup")
    assert [row[0] for row in bench.rows(found)] == ["", "python -c pass", "import tinychat", "tinychat --help"]
    assert found["startup"]["python_s"]["min"] > 0
