"""The plan: what it refuses, what it does where memory is short, and whether the result is as it says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from quantize_runs import begun, job, made, model

from tinychat.errors import CapacityError
from tinychat.quantize import plan
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_run_keeps_to_the_plan(capfd):
    import bench_quantize_memory

    code = bench_quantize_memory.main(["--hidden-size", "512", "--intermediate-size", "1536", "--tokens", "1024"])
    assert code == 0, capfd.readouterr().out
