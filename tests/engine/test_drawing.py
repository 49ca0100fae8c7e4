"""A model that draws tokens where it computes: the engine's answers are those of a sampler beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from make_tiny_model import make_tiny_model
from tinychat.core import Event, Failed, Finished, Message, Request, SamplingParams, StoppingParams, Text, Token
from tinychat.engine.engine import Engine
from tinychat.engine.sampler import make_sampler
from tinychat.inputs.processor import Processor
from tinychat.layers.kv_cache import KVCache
from tinychat.load import load
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat_kernels import ref

Loaded = tuple[VilaLlamaForCausalLM, Processor]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(make_tiny_model(tmp_path_factory.mktemp("model"), layout="text", seed=3), device="cpu")


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The numbers that a model drew by, once this is in use."""
    numbers: list[float] = []

    def draw(
        self: VilaLlamaForCausalLM,
        tokens: Sequence[int],
        cache: KVCache,
        temperatures: Sequence[float],
        uniform: Sequence[float],
    ) -> tuple[list[int], list[float]]:
        numbers.extend(uniform)
        logits = self.decode(torch.tensor([tokens]).T, cache)[:, 0]
        drawn, logprobs = ref.sample(logits, torch.tensor(temperatures), torch.tensor(uniform, dtype=torch.float64))
        return drawn.tolist(), logprobs.tolist()

    monkeypatch.setattr(VilaLlamaForCausalLM, "can_draw", True)
    monkeypatch.setattr(VilaLlamaForCausalLM, "draw", draw)
    return numbers


def ask(engine: Engine, text: str, **sampling: float) -> list[Event]:
    request = Request(
        "r", (Message("user", (Text(text),)),), sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        stopping=StoppingParams(max_new_tokens=12, ignore_eos=True),
    )  # fmt: skip
    return list(engine.run([request]))


def tokens(events: list[Event]) -> list[tuple[int, float]]:
    assert isinstance(events[-1], Finished), events[-1]
    return [(event.id, event.logprob or 0.0) for event in events if isinstance(event, Token)]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 0.8, "seed": 7}, {"temperature": 1, "seed": 1}]
)
def test_the_model_draws_what_the_sampler_does(
    loaded: Loaded, request: pytest.FixtureRequest, sampling: dict[str, float]
) -> None:
    beside = [tokens(ask(Engine(*loaded), text, **sampling)) for text in ("one", "two")]
    numbers = request.getfixturevalue("draws")
    engine = Engine(*loaded)
    for text, expected in zip(("one", "two"), beside, strict=True):
        ids, logprobs = zip(*tokens(ask(engine, text, **sampling)), strict=True)
        assert ids == tuple(token for token, _ in expected)
        assert logprobs == pytest.approx([logprob for _, logprob in expected], abs=1e-4)
    assert len(numbers) == 22 and all(0 <= number < 1 for number in numbers)
    assert (len(set(numbers)) == 1) == (sampling["temperature"] == 0)


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_p": 0.9},
        {"top_k": 3},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"watermark": True},
        {"top_n_tokens": 2},
    ],
    ids=lambda sampling: next(iter(sampling)),
)
def test_what_needs_more_than_a_temperature_is_drawn_beside_it(
    loaded: Loaded, draws: list[float], sampling: dict[str, float]
) -> None:
    assert len(tokens(ask(Engine(*loaded), "one", temperature=0.7, seed=1, **sampling))) == 12
    assert not draws


def test_a_samplers_temperature_is_all_there_is() -> None:
    def temperature(**params: object) -> float | None:
        return make_sampler(SamplingParams(**params), [], "cpu").temperature  # type: ignore[arg-type]

    assert temperature(temperature=0, top_p=0.5) == 0
    assert temperature(temperature=1) == 1 and temperature(temperature=0.3) == 0.3
    assert temperature(temperature=0, logit_bias={3: 1.0}) is None
    assert temperature(temperature=0, frequency_penalty=0.1) is None
    assert temperature(temperature=1, typical_p=0.5) is None
    assert temperature(temperature=0, watermark=True) is None
    assert temperature(temperature=0, top_n_tokens=1) is None


def test_logits_that_are_no_numbers_are_an_error(loaded: Loaded, draws: list[float], monkeypatch) -> None:
    monkeypatch.setattr(VilaLlamaForCausalLM, "draw", lambda self, *args: ([0], [float("nan")]))
    (*_, end) = ask(Engine(*loaded), "one", temperature=0)
    assert isinstance(end, Failed) and end.message == "the model's logits are not numbers"
    assert "try --dtype float32" in end.remedy


def test_a_cpu_does_not_draw(loaded: Loaded, tmp_path: Path) -> None:
    model, _ = loaded
    assert not model.can_draw
