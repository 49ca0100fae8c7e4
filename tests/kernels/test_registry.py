"""Which kernel is picked, and the sentence where there is none."""

from __future__ import annotations

import pytest

from tinychat_kernels import autoawq, cpu, cuda, ref, registry
from tinychat_kernels.errors import KernelError, SettingError


@pytest.fixture
def no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "available", lambda: (False, "no compiler"))


@pytest.mark.usefixtures("no_cpu")
def test_the_reference_is_always_there() -> None:
    assert registry.pick("w4_linear") is ref.w4_linear
    assert registry.pick("w4_linear", "ref") is ref.w4_linear
    assert registry.chosen().name == "ref"


def test_the_fastest_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "available", lambda: (True, "any instructions"))
    assert registry.pick("w4_linear") is cpu.w4_linear
    assert registry.chosen() == registry.Backend("cpu", True, "any instructions")
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    assert registry.pick("w4_linear") is ref.w4_linear
    assert registry.chosen().name == "ref"


@pytest.mark.usefixtures("no_cpu")
def test_what_is_asked_for_and_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCHAT_BACKEND", "cpu")
    with pytest.raises(KernelError, match="the backend cpu is off: no compiler: see `tinychat doctor`"):
        registry.chosen()


def test_every_known_backend_says_how_it_stands() -> None:
    states = registry.backends()
    assert tuple(state.name for state in states) == registry.ORDER
    assert states[-1].name == "ref" and states[-1].available
    assert all(state.reason for state in states)


def test_the_environment_chooses_and_an_argument_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCHAT_BACKEND", "warp")
    with pytest.raises(KernelError, match="there is no backend 'warp'; known are .*ref: see `tinychat doctor`"):
        registry.pick("w4_linear")
    assert registry.pick("w4_linear", "ref") is ref.w4_linear
    monkeypatch.setenv("TINYCHAT_BACKEND", "")
    assert registry.pick("w4_linear") is registry.pick("w4_linear", registry.chosen().name)


@pytest.mark.usefixtures("no_cpu")
def test_why_models_fall_back_is_said_unless_they_were_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.why_not("cpu") == registry.fallback() == "cpu is off: no compiler"
    assert registry.fallback("mps") is None
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    assert registry.why_not("cpu") == "TINYCHAT_BACKEND asks for ref" and registry.fallback() is None
    monkeypatch.delenv("TINYCHAT_BACKEND")
    monkeypatch.setattr(cpu, "available", lambda: (True, "any instructions"))
    assert registry.why_not("cpu") is registry.fallback() is None


def test_wrong_instructions_are_no_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def available() -> tuple[bool, str]:
        raise SettingError("TINYCHAT_ISA is 'avx9', this CPU has generic", "TINYCHAT_ISA")

    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "available", available)
    for choose in (registry.chosen, registry.fallback, lambda: registry.pick("w4_linear")):
        with pytest.raises(SettingError, match="TINYCHAT_ISA is 'avx9'"):
            choose()
    assert registry.Backend("cpu", False, "TINYCHAT_ISA is 'avx9', this CPU has generic") in registry.backends()


@pytest.mark.parametrize("name", ["w5_linear", "torch", "SLICE", "dequantize", "_slice"])
def test_what_is_no_op_is_refused(name: str) -> None:
    with pytest.raises(KernelError, match=f"no backend has an op '{name}': see `tinychat doctor`"):
        registry.pick(name, "ref")


# A GPU's backends


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Which backends run; may be changed."""
    running = {"cuda": True, "autoawq": True, "cpu": True}
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    for module in (cuda, autoawq, cpu):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "available", lambda name=name: (running[name], f"{name} says so"))
    return running


def test_a_device_has_its_own_order(states: dict[str, bool]) -> None:
    assert (registry.chosen("cuda").name, registry.chosen().name) == ("cuda", "cpu")
    assert registry.pick("w4_linear", device="cuda") is cuda.w4_linear
    states["cuda"] = False
    assert registry.chosen("cuda") == registry.Backend("autoawq", True, "autoawq says so")
    assert registry.pick("w4_linear", device="cuda") is autoawq.w4_linear
    assert registry.pick("w8a8_linear", device="cuda") is ref.w8a8_linear  # which autoawq has not
    states["autoawq"] = False
    assert registry.chosen("cuda").name == registry.chosen("mps").name == "ref"
    assert registry.fallback("cuda") == "cuda is off: cuda says so; autoawq is off: autoawq says so"
    assert registry.pick("w4_linear", device="mps") is ref.w4_linear


def test_a_backend_of_another_device_is_named(states: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCHAT_BACKEND", "cpu")
    assert registry.chosen().name == "cpu"
    with pytest.raises(KernelError, match="the backend cpu runs on cpu, the model is on cuda: see `tinychat doctor`"):
        registry.chosen("cuda")
    monkeypatch.setenv("TINYCHAT_BACKEND", "autoawq")
    with pytest.raises(KernelError, match="the backend autoawq runs on cuda, the model is on cpu"):
        registry.chosen()
    assert registry.chosen("cuda").name == "autoawq"
    states["autoawq"] = False
    with pytest.raises(KernelError, match="the backend autoawq is off: autoawq says so"):
        registry.chosen("cuda")
