"""What the GPU check says of its figures: tables, targets, and the block to paste."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from gpu_checks import report, targets

FACTS = {"gpu": "NVIDIA H100", "arch": "sm_90", "build": "0123456789", "dry": False, "torch": "2.11", "cuda": "13.0"}
FACTS |= {"compiler": "NVRTC 13.0", "date": "2026-11-21"}


def linear(name: str, seconds: float, of_copy: float, float16: float) -> dict[str, Any]:
    ours = {"ours": seconds, "bytes": 1, "of_copy": of_copy}
    return {f"linear {name}": ours, f"float16 linear {name}": {"seconds": float16}}


def decoded(seconds: float, **more: float) -> dict[str, Any]:
    row = {"rows": 1, "depth": 512, "seconds": seconds, "tokens_per_second": 1 / seconds, **more}
    return {"decode": [row], "prefill": [{"tokens": 512, "seconds": 0.02, "tokens_per_second": 25600}]}


def attended(bandwidth: float) -> dict[str, Any]:
    return {"ours": 1e-5, "bytes": 1, "bytes_per_second": bandwidth}


MARLIN = {"marlin": {"missing": "No module named 'marlin'"}}
DATA: dict[str, Any] = {
    "facts": FACTS,
    "stages": {
        "correctness": {"golden norm float16": {"right": True, "said": "off by 1e-4"}},
        "sanitize": {"memcheck": {"missing": "compute-sanitizer is not here"}},
        "kernels": {
            "copy": {"bytes_per_second": 3e12},
            "rivals": {"float16": {"version": "2.11"}, "tinygemm": {"version": "2.11"}, **MARLIN},
            **linear("4k x 14k 4096x14336 rows 1", 1e-5, 0.61, 4e-5),
            **linear("8k x 28k 8192x28672 rows 1", 4e-5, 0.79, 1.6e-4),
            **linear("4k x 14k 4096x14336 rows 16", 1e-5, 0.49, 4e-5),
            **linear("4k x 14k 4096x14336 rows 512", 1e-4, 0.1, 0.85e-4),
            **linear("8k x 28k 8192x28672 rows 2048", 1e-4, 0.1, 0.95e-4),
            "tinygemm linear 4k x 14k 4096x14336 rows 1": {"missing": "no kernel image"},
            "attention Llama-3-8B length 4096 rows 1 f16": attended(1.8e12),
            "attention Llama-3-8B length 512 rows 1 f16": attended(1e11),
        },
        "endtoend": {
            "Llama-3-8B, int8 head": decoded(0.002, of_roofline=0.75),
            "Llama-3-8B, transformers float16": decoded(0.0061),
            "Llama-3-8B, transformers float16 compiled": {"missing": "OutOfMemoryError"},
        },
    },
}


@pytest.mark.parametrize(
    "line",
    [
        "| linear 4k x 14k, 1 row: of the copy's bandwidth | 0.61 | 0.6 | yes |",
        "| linear 8k x 28k, 1 row: of the copy's bandwidth | 0.79 | 0.8 | NO |",
        "| linear 4k x 14k, 2 to 16 rows: of the copy's bandwidth, at worst | 0.49 | 0.5 | NO |",
        "| attention from 4096 keys on: of the copy's bandwidth, at worst | 0.60 | 0.5 | yes |",
        "| linears from 512 rows on: times float16's speed, at worst | 0.85 | 0.9 | NO |",
        "| geometric mean over the shapes: times float16's speed | 2.20 | 1 | yes |",
        "| no shape far behind float16: times its speed, at worst (4k x 14k 4096x14336 rows 512) | 0.85 | 0.9 | NO |",
        "| Llama-3-8B, decoding: of the byte roofline | 0.75 | 0.6 | floor yes, goal 0.8 NO |",
        "| Llama-3-8B, decoding: times the speed of transformers float16 | 3.05 | 2.5 | yes |",
    ],
)
def test_targets_are_held_or_not(line: str) -> None:
    text = report.markdown(DATA)
    assert line in text[text.index("## Targets") :]


def test_what_did_not_run_is_named_and_not_claimed() -> None:
    text = report.markdown(DATA)
    assert "| marlin | not run | No module named 'marlin' | - |" in text
    assert text.count("no kernel image") == 1 and "| tinygemm | not run | no kernel image | 2.11 |" in text
    assert "| memcheck | not run | compute-sanitizer is not here |" in text
    assert "| Llama-3-8B, transformers float16 compiled | not run | OutOfMemoryError |" in text
    assert not any("marlin" in one.aim or "compiled" in one.aim for one in targets.targets(DATA["stages"]))


def test_a_missed_target_is_shown_and_is_no_failure() -> None:
    pasted = report.paste(DATA)
    assert "all of 1 checks are right" in pasted and report.wrong_results(DATA) == []
    assert "Llama-3-8B, int8 head, 1 row at 512: 500.0 tokens/s, 75% of the byte roofline" in pasted
    assert "missed: linear 8k x 28k, 1 row: of the copy's bandwidth: 0.79" in pasted


def test_what_is_wrong_is_said_with_its_reason() -> None:
    data = copy.deepcopy(DATA)
    data["stages"]["kernels"]["linear 4k x 14k 4096x14336 rows 1"] = {"right": False, "said": "error 700"}
    assert report.wrong_results(data) == ["linear 4k x 14k 4096x14336 rows 1"]
    assert "WRONG: linear 4k x 14k 4096x14336 rows 1" in report.paste(data)
    assert "WRONG: kernels: linear 4k x 14k 4096x14336 rows 1: error 700" in report.summary(data, ["kernels"])
    assert "4k x 14k, 1 row" not in report.markdown(data)
