"""Results that outlive a fault, a hang or a crash, and the process that is started again."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_checks import supervise
from gpu_checks.store import BrokenDeviceError, Store, blame, read, write

ROOT = Path(__file__).parents[3]
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]
FACTS = {"gpu": "NVIDIA H100", "build": "0123456789", "dry": False, "torch": "2.11"}


def test_a_store_keeps_faults_and_drops_what_is_anothers(tmp_path: Path) -> None:
    def fail() -> Any:
        raise RuntimeError("CUDA error:\n  misaligned address")

    path = tmp_path / "found.json"
    store = Store(path, FACTS)
    assert store.get("kernels", "op", fail) == {"right": False, "said": "RuntimeError: CUDA error: misaligned address"}
    assert store.get("kernels", "rival", fail, ours=False)["missing"].startswith("RuntimeError")
    assert Store(path, FACTS).get("kernels", "op", lambda: {"right": True})["right"] is False
    assert Store(path, {**FACTS, "build": "other"}).stage("kernels") == {}
    path.write_text("{")
    assert Store(path, FACTS).stage("kernels") == {}


def test_a_gpu_that_works_no_more_ends_the_process_but_keeps_the_figure(tmp_path: Path) -> None:
    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    store = Store(tmp_path / "found.json", FACTS, alive=dead)
    with pytest.raises(BrokenDeviceError, match="after op the GPU works no more: an illegal memory access"):
        store.get("kernels", "op", lambda: {"right": False, "said": "700"})
    assert read(store.path)["stages"]["kernels"]["op"]["said"] == "700"


def test_a_dead_worker_blames_the_figure_it_was_at(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert blame(path, "hung") is None
    store = Store(path, FACTS)
    store.save()
    store._begin("endtoend", "theirs", 9.0, False)
    assert blame(path, "hung") == "endtoend: theirs"
    assert read(path)["stages"]["endtoend"] == {"theirs": {"missing": "hung"}}
    assert blame(path, "hung") is None


WORKER = """
import os, sys, time
sys.path[:0] = {paths}
from pathlib import Path
from gpu_checks.store import BrokenDeviceError, Store
store = Store(Path({path!r}), {facts})
get = lambda name, find, seconds=60.0: store.get("kernels", name, find, seconds)
{body}
"""


def worker(folder: Path, body: str, seconds: float = 60.0) -> supervise.Worker:
    path = folder / "found.json"
    text = WORKER.format(paths=PATHS, path=str(path), facts=FACTS, body=textwrap.dedent(body))
    return supervise.Worker([sys.executable, "-c", text], path, time.time() + seconds)


def test_a_figure_that_hangs_or_crashes_costs_that_figure_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
        get("fine", lambda: {"right": True})
        get("hangs", lambda: time.sleep(600), 0.3)
        get("crashes", os.abort)
        get("raises", lambda: 1 / 0 if store.until is None else exec("raise SystemError('what?')"))
        get("last", lambda: {"right": True})
        sys.exit(0)
    """
    assert worker(tmp_path, body).run() == 0
    found = read(tmp_path / "found.json")["stages"]["kernels"]
    assert [name for name, one in found.items() if one["right"]] == ["fine", "last"]
    assert found["hangs"]["said"] == "took longer than 0 seconds and was stopped"
    assert found["crashes"]["said"] == "the process ended with signal 6"
    assert found["raises"]["said"] == "the process ended with code 1"
    assert "kernels: crashes: the process ended with signal 6" in capfd.readouterr().err


def test_a_broken_gpu_gets_another_process_but_not_for_ever(tmp_path: Path) -> None:
    body = f"""
        get(str(len(store.stage("kernels"))), lambda: {{"right": False, "said": "700"}})
        sys.exit({supervise.BROKEN})
    """
    assert worker(tmp_path, body).run() == supervise.BROKEN
    assert len(read(tmp_path / "found.json")["stages"]["kernels"]) == supervise.MOST_RESTARTS


@pytest.mark.parametrize("code", [0, 1, supervise.CUT_OFF, supervise.NO_GPU])
def test_a_worker_without_a_figure_is_not_started_again(tmp_path: Path, code: int) -> None:
    assert worker(tmp_path, f"sys.exit({code})").run() == code


def test_a_worker_is_stopped_when_all_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "GRACE", 0.0)
    assert worker(tmp_path, "get('slow', lambda: time.sleep(600))", seconds=0.5).run() == supervise.CUT_OFF
    assert read(tmp_path / "found.json").get("stages", {}) == {}


def test_stages_are_found_again_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    write(path, {"facts": FACTS, "stages": {"kernels": {"copy": {}}, "sanitize": {"memcheck": {}}}})
    supervise.forget(path, ["kernels"])
    assert list(read(path)["stages"]) == ["sanitize"]
