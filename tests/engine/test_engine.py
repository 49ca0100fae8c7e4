"""The engine's life of a request: re-used prefixes, pictures at any turn, chunks, limits, cancelling, failing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Pictures

from make_tiny_model import make_tiny_model
from tinychat.core import (
    Event,
    Failed,
    Finished,
    Image,
    Message,
    Progress,
    Request,
    SamplingParams,
    Started,
    StoppingParams,
    Text,
    Token,
)
from tinychat.engine import rows as rows_module
from tinychat.engine.engine import Engine
from tinychat.inputs.processor import Processor
from tinychat.load import load
from tinychat.models.vila_llama import VilaLlamaForCausalLM

SHORT = StoppingParams(max_new_tokens=6, ignore_eos=True)
Loaded = tuple[VilaLlamaForCausalLM, Processor]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(make_tiny_model(tmp_path_factory.mktemp("model"), layout="vila", seed=3), device="cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Image]:
    out: list[Image] = []
    for i, colour in enumerate(("red", "green", "blue")):
        path = tmp_path / f"{colour}.png"
        Pictures.new("RGB", (40 + 9 * i, 30), colour).save(path)
        out.append(Image(path=str(path)))
    return out


def engine_of(loaded: Loaded, **options: int) -> Engine:
    return Engine(*loaded, **options)


def user(text: str, *images: Image) -> Message:
    return Message("user", (*images, Text(text)))


def said(end: Finished) -> Message:
    return Message("assistant", (Text(end.text),), end.token_ids)


def ask(engine: Engine, *messages: Message, stopping: StoppingParams = SHORT, **sampling: float) -> list[Event]:
    return list(engine.run([Request("r", messages, sampling=SamplingParams(**sampling), stopping=stopping)]))  # type: ignore[arg-type]


def finish(events: list[Event]) -> Finished:
    end = events[-1]
    assert isinstance(end, Finished), end
    return end


def test_events_come_in_order_and_add_up(loaded: Loaded, pictures: list[Image]) -> None:
    events = ask(engine_of(loaded, load_s=2.5), user("what is it?", pictures[0]))
    started, end = events[0], finish(events)
    assert isinstance(started, Started) and started.image_tokens == 16 and started.cached_tokens == 0
    stages = [event.stage for event in events if isinstance(event, Progress)]
    assert stages == ["images", "vision", "prefill"]
    tokens = [event for event in events if isinstance(event, Token)]
    assert tuple(token.id for token in tokens) == end.token_ids and len(tokens) == 6
    assert "".join(token.text for token in tokens) + end.tail == end.text
    assert end.usage.prompt_tokens == started.prompt_tokens and end.usage.completion_tokens == 6
    assert end.timings.load_s == 2.5 and end.timings.ttft_s > 0 and end.timings.decode_tps > 0
    assert end.finish_reason == "length" and end.seed is None


def test_greedy_tokens_are_the_models_own(loaded: Loaded) -> None:
    model, processor = loaded
    engine = engine_of(loaded)
    end = finish(ask(engine, user("count to three")))
    ids = list(processor(Request("r", (user("count to three"),))).ids)
    with torch.no_grad():
        for token in end.token_ids:
            assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_chunks_change_nothing(loaded: Loaded, pictures: list[Image], chunk: int) -> None:
    whole = finish(ask(engine_of(loaded), user("compare", *pictures[:2])))
    assert finish(ask(engine_of(loaded, chunk=chunk), user("compare", *pictures[:2]))).token_ids == whole.token_ids


def test_a_turn_computes_only_what_is_new_and_says_what_a_fresh_engine_says(
    loaded: Loaded, pictures: list[Image]
) -> None:
    engine = engine_of(loaded)
    messages: list[Message] = []
    questions = [user("first", pictures[0]), user("second"), user("third", pictures[1]), user("fourth")]
    held = 0
    for question in questions:
        messages.append(question)
        end, fresh = finish(ask(engine, *messages)), finish(ask(engine_of(loaded), *messages))
        assert end.token_ids == fresh.token_ids
        assert end.usage.cached_tokens == held and fresh.usage.cached_tokens == 0
        held = engine.cached_tokens  # all but the last token, which was drawn but never read
        assert held == end.usage.prompt_tokens + len(end.token_ids) - 1
        messages.append(said(end))


def test_only_pictures_that_are_not_cached_are_encoded(loaded: Loaded, pictures: list[Image]) -> None:
    engine = engine_of(loaded)
    first = finish(ask(engine, user("one", pictures[0])))
    events = ask(engine, user("one", pictures[0]), said(first), user("two", pictures[1]))
    assert [(e.stage, e.total) for e in events if isinstance(e, Progress)][:2] == [("images", 1), ("vision", 1)]


def test_another_picture_under_the_same_words_is_not_taken_for_the_first(loaded: Loaded, pictures: list[Image]) -> None:
    engine = engine_of(loaded)
    ask(engine, user("what?", pictures[0]))
    end = finish(ask(engine, user("what?", pictures[2])))
    assert end.token_ids == finish(ask(engine_of(loaded), user("what?", pictures[2]))).token_ids
    before = len(loaded[1](Request("r", (user("what?"),))).ids)
    assert end.usage.cached_tokens < before


def test_undo_then_asking_again_equals_asking_afresh(loaded: Loaded, pictures: list[Image]) -> None:
    engine = engine_of(loaded)
    first = finish(ask(engine, user("one", pictures[0])))
    ask(engine, user("one", pictures[0]), said(first), user("this turn is taken back", pictures[1]))
    again = finish(ask(engine, user("one", pictures[0]), said(first), user("two")))
    fresh = finish(ask(engine_of(loaded), user("one", pictures[0]), said(first), user("two")))
    assert again.token_ids == fresh.token_ids and again.usage.cached_tokens > 16


def test_the_same_question_twice_reads_one_token_again(loaded: Loaded) -> None:
    engine = engine_of(loaded)
    first, second = (finish(ask(engine, user("again"))) for _ in range(2))
    assert second.token_ids == first.token_ids
    assert second.usage.cached_tokens == second.usage.prompt_tokens - 1


def test_reset_forgets(loaded: Loaded) -> None:
    engine = engine_of(loaded)
    ask(engine, user("hello"))
    engine.reset()
    assert engine.cached_tokens == 0
    assert finish(ask(engine, user("hello"))).usage.cached_tokens == 0


def test_raw_parts_take_no_template(loaded: Loaded) -> None:
    request = Request("r", parts=(Text("abc"),), stopping=SHORT)
    end = finish(list(engine_of(loaded).run([request])))
    assert end.usage.prompt_tokens == len(loaded[1](request).ids) <= 4


def test_a_seed_repeats_and_is_told(loaded: Loaded) -> None:
    draw = {"temperature": 1.5}
    first = finish(ask(engine_of(loaded), user("draw"), **draw))
    assert first.seed is not None
    again = finish(ask(engine_of(loaded), user("draw"), **draw, seed=first.seed))
    assert again.token_ids == first.token_ids and again.seed == first.seed
    others = {finish(ask(engine_of(loaded), user("draw"), **draw, seed=i)).token_ids for i in range(4)}
    assert len(others) > 1


def test_penalties_leave_placeholders_out(
    loaded: Loaded, pictures: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A placeholder's id is a real token elsewhere: a picture must not make it less likely."""
    given: list[list[int]] = []
    real = rows_module.make_sampler

    def noted(params: SamplingParams, prompt_ids: list[int], device: torch.device) -> object:
        given.append(list(prompt_ids))
        return real(params, prompt_ids, device)

    monkeypatch.setattr(rows_module, "make_sampler", noted)
    ask(engine_of(loaded), user("x", pictures[0]))
    ids = list(loaded[1](Request("r", (user("x", pictures[0]),))).ids)
    [slot] = loaded[1](Request("r", (user("x", pictures[0]),))).slots
    assert given == [ids[: slot.start] + ids[slot.end :]]


def test_eos_ends_the_answer_and_is_not_part_of_it(loaded: Loaded) -> None:
    model, processor = loaded
    end_id = min(processor.stop_ids)
    request = Request("r", (user("x"),), sampling=SamplingParams(logit_bias={end_id: 1000.0}))
    end = finish(list(engine_of(loaded).run([request])))
    assert (end.finish_reason, end.token_ids, end.text) == ("eos", (), "")
    ignored = replace(request, stopping=SHORT)
    assert finish(list(Engine(model, processor).run([ignored]))).token_ids == (end_id,) * 6


def test_a_stop_string_ends_the_answer(loaded: Loaded) -> None:
    whole = finish(ask(engine_of(loaded), user("stop"), temperature=1.0, seed=5))
    assert len(whole.text) >= 3
    mark = whole.text[2]
    stopping = replace(SHORT, stop=(mark,))
    end = finish(ask(engine_of(loaded), user("stop"), stopping=stopping, temperature=1.0, seed=5))
    assert end.finish_reason == "stop" and end.text == whole.text[: whole.text.index(mark)]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_cancel_keeps_what_was_said(loaded: Loaded, after: int) -> None:
    engine = engine_of(loaded)
    events: list[Event] = []
    for event in engine.run([Request("r", (user("go on"),), stopping=replace(SHORT, max_new_tokens=50))]):
        events.append(event)
        if (after == 0 and isinstance(event, Started)) or sum(isinstance(e, Token) for e in events) == after > 0:
            engine.cancel()
    end = finish(events)
    assert end.finish_reason == "cancelled" and len(end.token_ids) == after
    following = finish(ask(engine, user("go on"), said(end), user("and now?")))
    assert following.token_ids == finish(ask(engine_of(loaded), user("go on"), said(end), user("and now?"))).token_ids


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_a_picture_that_was_half_read_is_gone_on_with(
    loaded: Loaded, pictures: list[Image], chunks: int, other: bool
) -> None:
    """Cancelled inside the picture's slot: what follows takes the rows that are missing, or another picture's."""
    engine, read = engine_of(loaded, chunk=5), 0
    for event in engine.run([Request("r", (user("what?", pictures[0]),), stopping=SHORT)]):
        read += isinstance(event, Progress) and event.stage == "prefill"
        if read == chunks:
            engine.cancel()
    assert engine.cached_tokens == 5 * chunks
    again = pictures[1] if other else pictures[0]
    end = finish(ask(engine, user("what?", again)))
    assert end.token_ids == finish(ask(engine_of(loaded), user("what?", again))).token_ids
    assert end.usage.cached_tokens == 5 * chunks or other


def test_a_cancel_before_the_first_event_counts(loaded: Loaded) -> None:
    engine = engine_of(loaded)
    stream = engine.run([Request(name, (user("go on"),), stopping=SHORT) for name in "ab"])
    engine.cancel()
    ends = [event for event in stream if isinstance(event, Finished)]
    assert [end.finish_reason for end in ends] == ["cancelled", "length"]


def test_picture_time_is_that_of_pictures(loaded: Loaded, pictures: list[Image]) -> None:
    assert finish(ask(engine_of(loaded), user("no picture"))).timings.image_s == 0
    assert finish(ask(engine_of(loaded), user("one", pictures[0]))).timings.image_s > 0


def test_closing_the_stream_leaves_a_usable_engine(loaded: Loaded) -> None:
    engine = engine_of(loaded)
    stream = engine.run([Request("r", (user("go on"),))])
    while not isinstance(next(stream), Token):
        pass
    stream.close()  # type: ignore[attr-defined]
    assert finish(ask(engine, user("else"))).token_ids == finish(ask(engine_of(loaded), user("else"))).token_ids


def test_a_full_context_says_so_and_ends_at_its_edge(loaded: Loaded) -> None:
    engine = engine_of(loaded, context=60)
    failed = ask(engine, user("word " * 80))[-1]
    assert isinstance(failed, Failed) and failed.exit_code == 5
    assert "the context holds 60" in failed.message and "--context" in failed.remedy
    end = finish(ask(engine, user("short"), stopping=StoppingParams(max_new_tokens=None, ignore_eos=True)))
    assert end.finish_reason == "length" and end.usage.prompt_tokens + len(end.token_ids) == 60


def test_a_bad_picture_fails_alone(loaded: Loaded, pictures: list[Image], tmp_path: Path) -> None:
    engine = engine_of(loaded)
    bad = Image(path=str(tmp_path / "missing.png"))
    requests = [Request(str(i), (user("x", p),), stopping=SHORT) for i, p in enumerate((pictures[0], bad, pictures[1]))]
    ends = [event for event in engine.run(requests) if isinstance(event, Finished | Failed)]
    assert [type(end) for end in ends] == [Finished, Failed, Finished]
    assert isinstance(ends[1], Failed) and ends[1].exit_code == 4 and "missing.png" in ends[1].message
    assert isinstance(ends[2], Finished)
    assert ends[2].token_ids == finish(ask(engine_of(loaded), user("x", pictures[1]))).token_ids


def test_a_lack_of_memory_becomes_a_sentence(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(loaded)

    def no_memory(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(engine.model, "prefill", no_memory)
    failed = ask(engine, user("x"))[-1]
    assert isinstance(failed, Failed) and failed.exit_code == 5 and "memory ran out" in failed.message


def test_a_bug_is_not_swallowed(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(loaded)

    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine.model, "prefill", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        ask(engine, user("x"))


def test_the_chunk_bounds_what_is_read_at_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    sizes: list[int] = []
    real: Callable[..., torch.Tensor] = model.prefill

    def noted(embeds: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(embeds.shape[1])
        return real(embeds, *rest)

    monkeypatch.setattr(model, "prefill", noted)
    ask(engine_of(loaded, chunk=16), user("many words " * 10))
    assert max(sizes) == 16 and len(sizes) > 3
