"""The engine's answers about the sample pictures: the decoder in one call gives the tokens that its modules give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tinychat.core import Finished, Image, Message, Request, Text
from tinychat.engine.engine import Engine
from tinychat.eval.demo.showcase import QUESTIONS
from tinychat.layers.cpu_decoder import CpuDecoder
from tinychat.layers.head import PackedHead
from tinychat.layers.linear import QuantLinear
from tinychat.load import EMBEDDED, load
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat_kernels import cpu
from tinychat_kernels.cpu import Packed

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)

SAMPLES = EMBEDDED.parent / "samples"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*load(device="cpu"))


def prepare(model: VilaLlamaForCausalLM, exact: bool) -> None:
    for module in model.llm.modules():
        if isinstance(module, QuantLinear):
            module.prepare(module.packed if isinstance(module.packed, Packed) else None, exact=exact)
        if isinstance(module, PackedHead):
            module.exact = exact


def answers(engine: Engine) -> Iterator[tuple[int, ...]]:
    """The token ids of each answer; the questions follow each other in one cache, as far as they share a beginning."""
    engine.reset()
    for question in QUESTIONS:
        parts = (*(Image(path=str(SAMPLES / picture)) for picture in question.pictures), Text(question.question))
        *_, end = engine.run([Request("r", (Message("user", parts),))])
        assert isinstance(end, Finished)
        yield end.token_ids


@pytest.mark.parametrize("exact", [True, False])
def test_tokens_are_those_of_the_modules(engine: Engine, exact: bool, monkeypatch: pytest.MonkeyPatch):
    model = engine.model
    assert isinstance(model, VilaLlamaForCausalLM)
    prepare(model, exact)
    ours = list(answers(engine))
    assert model._one_call is not None
    monkeypatch.setattr(CpuDecoder, "of", classmethod(lambda cls, llm, config: None))
    model._one_call = None
    assert list(answers(engine)) == ours
    assert model._one_call is None
    assert sum(map(len, ours)) > len(QUESTIONS)
