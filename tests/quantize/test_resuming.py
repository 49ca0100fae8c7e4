"""Work that was cut off goes on to the same bytes; what is not the same work is refused."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantize_runs import LAYERS, QUICK, begun, content, cut_off_at_every_file, job, made, model, spawn

from awq import save
from tinychat.checkpoint import Index, write_safetensors
from tinychat.errors import CapacityError, UsageError
from tinychat.quantize.job import Calibration
from tinychat.quantize.run import Began, LayerDone, Run, Written
from tinychat_kernels.layout import QuantSpec


def test_cut_off_at_every_file_the_result_is_the_same(models, tmp_path, monkeypatch):
    source = model(models)
    made(job(source, tmp_path / "whole"))
    wanted = job(source, tmp_path / "out")
    assert cut_off_at_every_file(wanted, monkeypatch) > LAYERS + 2
    assert content(wanted.out) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def wait_for_layers(child: subprocess.Popen[str], count: int) -> None:
    assert child.stdout is not None
    while count and (line := child.stdout.readline()):
        count -= json.loads(line)["event"] == "layer"


def kill_and_resume(source: Path, folder: Path, kills: int, number: int) -> None:
    """Kills the command where layers are being done, again and again; then lets it finish, twice over."""
    chance = random.Random(number)
    with spawn(source, folder / "whole", "--card-samples", "1") as child:
        assert child.wait() == 0, child.communicate()[1]
    for _ in range(kills):
        with spawn(source, folder / "out", "--card-samples", "1") as child:
            wait_for_layers(child, chance.randrange(2))
            time.sleep(chance.random() / 4)
            child.send_signal(signal.SIGKILL)
    with spawn(source, folder / "out", "--card-samples", "1") as child:
        _, errors = child.communicate()
        assert child.returncode == 0, errors
    assert content(folder / "out") == content(folder / "whole")


@pytest.mark.timeout(900)
def test_killed_for_good_it_goes_on(models, tmp_path):
    kill_and_resume(model(models, layers=5), tmp_path, 2, 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_ten_times_it_goes_on(models, tmp_path):
    kill_and_resume(model(models, "vila", layers=8), tmp_path, 10, 1)


def test_states_on_the_disk_give_the_same_as_states_in_memory(models, tmp_path):
    source = model(models, "vila")
    made(job(source, tmp_path / "memory"))
    run = Run(job(source, tmp_path / "disk"))
    run.plan = replace(run.plan, hold=False, stream=True)
    assert isinstance([*run.events()][-1], Written)
    assert content(tmp_path / "memory") == content(tmp_path / "disk")


def test_a_result_that_stands_is_not_made_again(models, tmp_path):
    wanted = job(model(models), tmp_path / "out", method="rtn")
    facts = made(wanted)
    events = [*Run(wanted).events(resume=True)]
    assert not [event for event in events if isinstance(event, Began | LayerDone)]
    assert events[-1] == Written(wanted.out, facts)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spec": QuantSpec(group_size=64)}, "options: group_size was 32 and is 64"),
        ({"calibration": Calibration(samples=2, seqlen=40)}, "calibration was "),
        ({"search": {**QUICK, "clip": False}}, "options: clip was True and is False"),
        ({"method": "rtn"}, "options: method was awq and is rtn"),
    ],
)
def test_other_options_are_not_mixed_in(models, tmp_path, changes, sentence):
    wanted = job(model(models), tmp_path / "out")
    begun(wanted)
    with pytest.raises(UsageError, match=f"was begun with something else: .*{sentence}"):
        made(replace(wanted, **changes), resume=True)
    assert len(Run(wanted).source.index.names()) and (wanted.partial / save.MANIFEST).exists()


@pytest.fixture
def own_threads():
    """What a test makes of torch's threads is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("own_threads")
def test_it_is_computed_on_as_many_threads_as_it_was_begun_with(models, tmp_path):
    whole, wanted = (job(model(models), tmp_path / name, threads=1) for name in ("whole", "out"))
    made(whole)
    begun(wanted)
    sentence = "was computed on 1 CPU thread, which its last bits depend on, and --threads 2 is given; leave --threads"
    with pytest.raises(UsageError, match=sentence):
        made(replace(wanted, threads=2), resume=True)
    torch.set_num_threads(2)  # a machine of more cores
    made(replace(wanted, threads=None), resume=True)
    assert torch.get_num_threads() == 1
    assert content(wanted.out) == content(whole.out)
    with pytest.raises(UsageError, match=sentence):
        made(replace(wanted, threads=2), resume=True)


def test_another_model_is_not_mixed_in(models, tmp_path):
    source = shutil.copytree(model(models), tmp_path / "model")
    wanted = job(source, tmp_path / "out")
    begun(wanted)
    index = Index.of(source)
    tensors = {name: index.get(name).clone() for name in index.names()}
    tensors["model.norm.weight"] += 1
    write_safetensors(tensors.items(), source)
    with pytest.raises(UsageError, match=r"model: model\.safetensors was [0-9a-f]{12}\.\.\. and is [0-9a-f]{12}\.\.\."):
        made(wanted, resume=True)


def test_damaged_work_is_refused(models, tmp_path):
    wanted = job(model(models), tmp_path / "out")
    begun(wanted)
    with (wanted.partial / "block-00000.safetensors").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match=r"block-00000\.safetensors \(block-00000\) is missing or damaged; delete "):
        made(wanted, resume=True)


def test_a_full_disk_loses_nothing(models, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    wanted, whole = (job(model(models), tmp_path / name) for name in ("out", "whole"))
    made(whole)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, before[1]))  # a layer's file is larger than that
    try:
        with pytest.raises(CapacityError, match=r"the disk of .*out\.partial is full; the work so far is kept there"):
            made(wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not wanted.out.exists()
    made(wanted, resume=True)
    assert content(wanted.out) == content(whole.out)
