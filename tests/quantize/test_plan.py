"""The plan: what it refuses, what it does where memory is short, and whether the result is as it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from quantize_runs import begun, job, made, model

from tinychat.errors import CapacityError
from tinychat.flags import parse_size
from tinychat.quantize import plan, room
from tinychat.quantize.card_plan import LAYERS
from tinychat.quantize.job import Calibration
from tinychat.quantize.plan import size as size_of
from tinychat.quantize.run import Run


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(models, tmp_path):
    source = model(models)
    for limit, sentence in (
        ({"max_ram": 2**20}, r"of memory are needed and 1\.0 MiB are allowed or free"),
        ({"max_disk": 2**10}, r"are needed on the disk of .*, 1\.0 KiB are allowed or free"),
    ):
        with pytest.raises(CapacityError, match=sentence):
            made(job(source, tmp_path / "out", **limit))
    assert not [*tmp_path.iterdir()]


def test_the_remedy_is_what_would_help(models, tmp_path):
    made = Run(job(model(models), tmp_path / "out")).plan
    needed, least = made.peak_ram, made.peak_ram - 2**20
    enough = plan.enough(needed)
    replace(made, ram_limit=parse_size("--max-ram", enough)).check(tmp_path)
    for limit, ending in ((needed - 1, ", or give a shorter --calib-seqlen"), (least - 1, "")):
        with pytest.raises(CapacityError) as found:
            replace(made, least_ram=least, ram_limit=limit).check(tmp_path)
        assert str(found.value).endswith(f"; allow {enough} with --max-ram, or free memory{ending}")


@pytest.mark.parametrize("layout", ["text", "vila"])
def test_the_least_is_below_any_calibration(models, tmp_path, layout):
    runs = [
        Run(job(model(models, layout), tmp_path / "out", calibration=Calibration(samples=3, seqlen=n)))
        for n in (500, 1000)
    ]
    least, other = (room.least_bytes(run.job, run.source, run.data) for run in runs)
    needed = [room.block_bytes(run.job, run.source, max(run.data.lengths)) for run in runs]
    assert least == other and needed[0] < needed[1]
    assert room.block_bytes(runs[0].job, runs[0].source, 1) <= least


@pytest.mark.parametrize("kind", ["memory", "disk", "device"])
def test_what_only_the_card_needs_is_called_so(models, tmp_path, kind):
    made = Run(job(model(models), tmp_path / "out", card=True, card_samples=1)).plan
    ample = replace(made, card_device=2**30, device_limit=2**31, card_disk=made.work_disk + 2**20)
    needed, without, limit = {
        "memory": (ample.peak_ram, max(size for stage, size in ample.ram.items() if stage != "card"), "ram_limit"),
        "disk": (ample.disk, ample.work_disk, "disk_limit"),
        "device": (ample.device, ample.work_device, "device_limit"),
    }[kind]
    assert needed > without
    ample.check(tmp_path)
    tight = replace(ample, **{limit: without})
    sentence = (
        rf"^{size_of(needed)} .*needed.* {size_of(without)} are allowed or free, while {size_of(without)} would do "
        r"without the quality card; give --no-card \(tinychat eval OUT --against MODEL --card makes one later\), or "
    )
    with pytest.raises(CapacityError, match=sentence):
        tight.check(tmp_path)
    replace(tight, card="none", ram={"layers": without}, card_disk=0, card_device=0).check(tmp_path)
    if without:
        with pytest.raises(CapacityError, match="needed") as found:
            replace(ample, **{limit: without - 1}).check(tmp_path)
        assert "quality card" not in str(found.value)


def test_states_are_spilled_and_the_tower_streamed_where_memory_is_short(models, tmp_path):
    source = model(models, "vila")
    ample = Run(job(source, tmp_path / "out")).plan
    assert ample.hold and not ample.stream
    tight = Run(job(source, tmp_path / "out", max_ram=ample.ram["layers"] - 1)).plan
    assert not tight.hold


def test_work_that_is_there_needs_no_further_disk(models, tmp_path, monkeypatch):
    wanted = job(model(models), tmp_path / "out")
    needed = Run(wanted).plan.disk
    begun(wanted)
    there = sum(path.stat().st_size for path in wanted.partial.rglob("*") if path.is_file())
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - there))
    assert made(wanted, resume=True)["layers"]
    with pytest.raises(CapacityError, match="are needed on the disk"):
        made(job(model(models), tmp_path / "another"))


def test_the_plan_knows_the_size_of_the_result(models, tmp_path):
    wanted = job(model(models, "vila"), tmp_path / "out")
    run = Run(wanted)
    *_, _end = run.events()
    weights = sum(path.stat().st_size for path in wanted.out.rglob("*.safetensors"))
    assert abs(weights - run.plan.output) < 0.05 * weights + 20_000


MEASURE = """
import json, sys
from pathlib import Path
from tinychat.eval import prose
prose.PROSE = prose.PROSE[:1200]  # before it is put into a set
from quantize_runs import job
from tinychat.eval import heldout, tasks
from tinychat.quantize.plan import costs, with_card
from tinychat.quantize.run import Run
heldout.ANSWER_TOKENS = tasks.ANSWER_TOKENS = 4
run = Run(job(Path(sys.argv[1]), Path(sys.argv[2]), method="rtn", card=True, card_samples=1, threads=1))
run.plan = with_card(run.plan, run.job, costs(run.job, run.source).of(sys.argv[3]))
*_, end = run.events()
print(json.dumps({"peak": end.facts["peak_ram"], "planned": run.plan.peak_ram, **run.plan.ram}))
"""


@pytest.mark.parametrize("way", ["float32", LAYERS])
def test_the_card_of_a_wide_vocabulary_keeps_to_the_plan(models, tmp_path, way):
    """In a process of its own: memory that other tests gave back would hide what is taken."""
    source = model(models, vocab_size=2**17, layers=1)
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out"), way]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert found["card"] == found["planned"] > found["peak"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_run_keeps_to_the_plan(capfd):
    import bench_quantize_memory

    code = bench_quantize_memory.main(["--hidden-size", "512", "--intermediate-size", "1536", "--tokens", "1024"])
    assert code == 0, capfd.readouterr().out
