"""Tiny models quantized from folder to folder: jobs, what they write, and runs that are cut off and go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from awq import save
from make_tiny_model import make_tiny_model
from tinychat.quantize import output
from tinychat.quantize.facts import FACTS
from tinychat.quantize.job import Calibration, Job
from tinychat.quantize.run import LayerDone, Run, Written
from tinychat_kernels.layout import QuantSpec

SPEC = QuantSpec(group_size=32)
QUICK = {"scale_grid": 3, "clip_grid": 4, "loss_tokens": 64}
LAYERS = 3


def model(models: Path, layout: str = "text", **shape: Any) -> Path:
    """A tiny model of so many layers in a folder of `models`, made when first asked for."""
    folder = models / "-".join([layout, *(f"{name}={value}" for name, value in shape.items())])
    if not folder.exists():
        make_tiny_model(folder, layout, **({"dtype": "float16", "layers": LAYERS} | shape))
    return folder


def job(folder: Path, out: Path, **changes: Any) -> Job:
    """A quick one, without a card."""
    quick: dict[str, Any] = {
        "spec": SPEC,
        "search": QUICK,
        "calibration": Calibration(samples=3, seqlen=40),
        "card": False,
    }
    return Job(folder, out, **(quick | changes))


def made(wanted: Job, resume: bool = False) -> dict[str, Any]:
    """Runs a job to its end and gives the facts."""
    *_, end = Run(wanted).events(resume)
    assert isinstance(end, Written)
    return end.facts


def begun(wanted: Job, layers: int = 1) -> None:
    """Work that was stopped after some layers."""
    events = Run(wanted).events()
    for event in events:
        if isinstance(event, LayerDone) and event.index + 1 == layers:
            break
    events.close()  # type: ignore[attr-defined]  # a generator


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of a checkpoint's files; of the facts what does not depend on the hour."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop(output.LOG)
    facts = json.loads(found.pop(FACTS))
    return {**found, "facts": json.dumps({**facts, "wall_s": 0, "peak_ram": 0}).encode()}


class Cut(BaseException):
    """The process is gone: nothing of ours may catch it."""


def cut_off_at_every_file(wanted: Job, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a job to its end, each attempt one file further than the one before; gives the number of attempts."""
    sync, left = save.sync, [0]

    def cut(path: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise Cut
        sync(path)

    monkeypatch.setattr(save, "sync", cut)
    monkeypatch.setattr(output, "sync", cut)
    for count in range(1, 400):
        left[0] = count
        try:
            made(wanted, resume=True)
            return count
        except Cut:
            assert not wanted.out.exists() or (wanted.out / FACTS).exists()
    raise AssertionError("it never came to its end")


def spawn(source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with events as JSON."""
    command = [sys.executable, "-m", "tinychat", "quantize", str(source), str(out), "--group-size", "32", "--json"]
    command += ["--calib-samples", "3", "--calib-seqlen", "40", "--resume", "--threads", "1", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
