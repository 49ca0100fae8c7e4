"""`tinychat doctor --kernels`: what it says of a GPU, and without one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import json_keys
import pytest
import torch

from tinychat import cli, doctor, doctor_kernels
from tinychat_kernels import cuda, cuda_compilers, cuda_golden, cuda_gpu
from tinychat_kernels.cuda_golden import Result
from tinychat_kernels.errors import KernelError

NO_GPU = "torch finds no CUDA device; it is built for CUDA 13.0"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(index: int):
        raise KernelError(NO_GPU)

    monkeypatch.setattr(cuda_gpu, "gpu", gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """A GPU without products of bfloat16, and what its ops give."""
    device = SimpleNamespace(index=0, target=SimpleNamespace(arch="sm_75"), made_by="NVRTC 13.5", processors=4)
    found = [Result("linear", torch.float16, 2e-4, 5e-3, "g32 1x384x272")]
    monkeypatch.setattr(cuda_gpu, "gpu", lambda index: device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(cuda, "obstacle", lambda dtype, device: None if dtype == torch.float16 else "too old")
    monkeypatch.setattr(cuda_golden, "results", lambda place: iter(found))
    return found


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compilers, "compilers_here", lambda: "nvcc 13.0 can compile")
    assert cli.main(["doctor", "--kernels"]) == 0
    said = f"CUDA kernels\n  there is no GPU that the CUDA kernels run on: {NO_GPU}; nvcc 13.0 can compile\n"
    assert capsys.readouterr().out == said
    found = doctor.kernels()
    json_keys.check(json.loads(json.dumps(found)), "tinychat.doctor/1 with --kernels")


def test_ops_that_are_right(gpu: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--kernels"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "CUDA kernels",
        "  Tesla T4, sm_75, NVRTC 13.5",
        "  linear float16: right, off by 2.0e-04 at most (g32 1x384x272), 5.0e-03 is allowed",
        "  all are right",
    ]


def test_ops_that_are_wrong(gpu: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    gpu.append(Result("norm", torch.float16, float("inf"), 4e-3, "norm 1x4096"))
    gpu.append(Result("sample", torch.float16, float("inf"), 0.0, "", "sample.cu cannot be compiled"))
    assert cli.main(["doctor", "--kernels"]) == 1
    assert capsys.readouterr().out.splitlines()[3:] == [
        "  norm float16: WRONG, off by not a number at most (norm 1x4096), 4.0e-03 is allowed",
        "  sample float16: WRONG, sample.cu cannot be compiled",
        "  2 of 3 are WRONG: models run on plain torch there",
    ]
    assert cli.main(["doctor", "--kernels", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    json_keys.check(found, "tinychat.doctor/1 with --kernels")
    assert [one["right"] for one in found["kernels"]["results"]] == [True, False, False]


def test_one_look_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--kernels", "--cache"]) == 2
    assert "both --kernels and --cache are given; give one of the two" in capsys.readouterr().err


def test_a_gpus_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"name": "cuda", "available": True, "reason": "on", "taken": False, "taken_on_gpu": True}
    assert "4-bit models on a GPU run on cuda" in doctor.to_text({"backends": [found]})
    assert doctor_kernels.lines({"device": None, "reason": "none", "results": []})
