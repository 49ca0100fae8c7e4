"""The card: a model beside itself is without fault, one model at a time is in memory, and the files keep the rest."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import json_keys
import pytest
import torch

from make_tiny_model import make_tiny_model
from tinychat import load
from tinychat.core import Progress
from tinychat.engine.engine import Engine
from tinychat.errors import FormatError, ModelError, TinychatError, UsageError
from tinychat.eval import heldout, page, tasks
from tinychat.eval.card import NO_BASE, NO_WEIGHTS, TEXT_ONLY, Card, CardPlan, Note, Subject, card_in_making, make_card
from tinychat.eval.page import BEGIN, END, sparkline, with_part
from tinychat.eval.probes import ProbeScore

FACTS = {"method": "awq", "calibration": {"sha256": "0f" * 32, "samples": 8}, "fell_back": ["3", "7"], "odd": "a|b <i>"}
COMPARE = CardPlan(samples=1, measures=("divergence",))


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (heldout, tasks):
        monkeypatch.setattr(module, "ANSWER_TOKENS", 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "vision": make_tiny_model(root / "vision"),
        "quantized": make_tiny_model(root / "quantized", quantize=64),
        "text": make_tiny_model(root / "text", "text"),
        "small": make_tiny_model(root / "small", "text", vocab_size=264),
    }


def engine(folder: Path) -> Engine:
    ready = load.load_folder(folder, load.Placement())
    return Engine(ready.model, ready.processor)


@pytest.fixture(scope="module")
def full(folders: dict[str, Path]) -> Card:
    """All three columns: the original, a corrupted one, and the original again."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (heldout, tasks):
            patch.setattr(module, "ANSWER_TOKENS", 5)
        original = engine(folders["vision"])
        plan = CardPlan(samples=1, seqlen=64)
        subjects = Subject.of("16 bit", original), Subject.of("AWQ", original), Subject.of("RTN", corrupted(folders))
        return make_card(*subjects, plan=plan, facts=FACTS)


def corrupted(folders: dict[str, Path]) -> Engine:
    broken = engine(folders["vision"])
    torch.nn.init.normal_(broken.model.llm.model.layers[1].mlp.down_proj.weight, std=1.0)  # type: ignore[attr-defined]
    return broken


def test_a_model_beside_itself_is_without_fault(full: Card) -> None:
    column, base = full.columns["quantized"], full.columns["base"]
    whole = column.divergence["all"]
    assert (whole.kl.value, whole.kl.high, whole.kl_p99.value) == (0, 0, 0)
    assert (whole.top1.value, whole.top1.low, whole.unchanged, whole.median_first) == (1, 1, 1, None)
    assert set(column.divergence) == {"all", "text", "pictures"} and set(whole.first) == {None}
    assert all(layer.output.sqnr_db == float("inf") for layer in column.layers)
    assert all(layer.weights and layer.weights.sqnr_db == float("inf") for layer in column.layers)
    assert column.perplexity == base.perplexity and column.probes == base.probes


def test_figures_keep_their_digits(full: Card) -> None:
    column = replace(full.columns["base"], perplexity=1.00004)
    row = next(row for row in page.rows(replace(full, columns={"base": column})) if row[0].startswith("perplexity"))
    assert row[1] == "1.000"


def test_a_corrupted_model_is_seen(full: Card) -> None:
    column = full.columns["nearest"]
    assert column.divergence["all"].kl.value > 0.1 and column.divergence["all"].unchanged < 1
    first, second = column.layers
    assert first.output.sqnr_db == float("inf") and second.output.sqnr_db < 10
    assert second.linears["down_proj"] < 1 and second.linears["up_proj"] == float("inf")


def test_the_object_is_as_documented(full: Card) -> None:
    found = json.loads(json.dumps(full.as_json(), allow_nan=False))
    json_keys.check(found, "tinychat.card/1")
    assert list(found["models"]) == ["base", "nearest", "quantized"] and found["facts"] == FACTS
    assert found["models"]["quantized"]["layers"][0]["output"]["sqnr_db"] is None


def test_one_model_at_a_time_is_in_memory(folders: dict[str, Path]) -> None:
    alive: list[Any] = []

    def opened(name: str) -> Engine:
        assert not [model for model in alive if model() is not None], "the model before is still there"
        made = engine(folders[name])
        alive.append(weakref.ref(made.model))
        return made

    index = load.open_source(folders["vision"]).index
    base = Subject("16 bit", lambda: opened("vision"), lambda name: index.get(f"{name}.weight"))
    card = make_card(base, Subject("4 bit", lambda: opened("quantized")), base, plan=COMPARE)
    assert len(alive) == 3
    quantized, again = card.columns["quantized"], card.columns["nearest"]
    assert all(layer.weights and 15 < layer.weights.sqnr_db < 30 for layer in quantized.layers)
    assert not quantized.others and not again.others
    assert all(layer.weights and layer.weights.sqnr_db == float("inf") for layer in again.layers)


def test_progress_ends_where_it_said(folders: dict[str, Path]) -> None:
    base, other = (Subject.of(name, engine(folders[name])) for name in ("vision", "quantized"))
    made = [*card_in_making(base, other, plan=CardPlan(samples=1, seqlen=64))]
    steps = [event for event in made if isinstance(event, Progress)]
    assert [step.done for step in steps] == [*range(1, len(steps) + 1)] and {step.total for step in steps} == {
        len(steps)
    }
    assert sum(isinstance(event, Note) for event in made) == 6


def test_what_is_put_aside_on_disk_changes_nothing(folders: dict[str, Path]) -> None:
    base, other = (Subject.of(name, engine(folders[name])) for name in ("vision", "quantized"))
    in_ram, on_disk = (make_card(base, other, plan=replace(COMPARE, spill_limit=limit)) for limit in (2**30, 0))
    assert in_ram == on_disk


def test_without_an_original_its_figures_are_left_out(folders: dict[str, Path]) -> None:
    card = make_card(None, Subject.of("4 bit", engine(folders["text"])), plan=CardPlan(seqlen=64))
    assert list(card.columns) == ["quantized"] and card.left_out == (NO_BASE, TEXT_ONLY)
    column = card.columns["quantized"]
    assert column.perplexity and not column.divergence and not column.layers and not column.probes
    assert NO_BASE in page.markdown(card) and card.measured.heldout_sha256 is None


def test_an_original_without_weights_to_read(folders: dict[str, Path]) -> None:
    original = engine(folders["text"])
    card = make_card(Subject("4 bit", lambda: original), Subject.of("4 bit", original), plan=COMPARE)
    assert NO_WEIGHTS in card.left_out
    assert [layer.weights for layer in card.columns["quantized"].layers] == [None, None]


def test_a_demo_model_is_scored_on_right_answers(folders: dict[str, Path]) -> None:
    plan = CardPlan("demo", samples=2, measures=("ppl",))
    card = make_card(None, Subject.of("4 bit", engine(folders["vision"])), plan=plan)
    assert card.measured.text == "right answers, set demo" and card.measured.seqlen is None
    assert (card.columns["quantized"].perplexity or 0) > 1


def test_models_that_do_not_belong_together_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="the models have 320 and 264 tokens of vocabulary"):
        subjects = (Subject.of(name, engine(folders[name])) for name in ("text", "small"))
        make_card(*subjects, plan=COMPARE)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"heldout": "none"}, "there is no held-out set 'none'; the sets are demo, plain"),
        ({"samples": 0}, "samples is 0; give 1 or more"),
        ({"seqlen": 1}, "seqlen is 1; give 2 or more"),
    ],
)
def test_plans_that_cannot_work_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        CardPlan(**wrong)


def test_windows_beyond_the_positions_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="windows of 4096 tokens are asked for, the model is made for 2048; try --seq"):
        make_card(None, Subject.of("a", engine(folders["text"])), plan=CardPlan(seqlen=4096, measures=("ppl",)))


# The files


def test_the_table_has_a_column_a_model(full: Card) -> None:
    head, *body = page.rows(full)
    assert head == ["", "16 bit", "RTN", "AWQ"] and all(len(row) == 4 for row in body)
    cells = {row[0]: row[1:] for row in body}
    assert cells["KL divergence a token, mean"][2] == "0 (0 to 0)" and not cells["KL divergence a token, mean"][0]
    assert cells["lowest SQNR of a layer's output"][2] == "no error"
    assert cells["lowest SQNR of a layer's output"][1].endswith("dB (layer 1)")


def test_readme_keeps_what_is_not_the_card(full: Card, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes(b"---\nlicense: mit\n---\n# Mine\r\n")
    full.write(tmp_path)
    readme.write_text(readme.read_text("utf-8") + "\nMore of mine.\n", "utf-8")
    once = readme.read_text("utf-8")
    replace(full, facts={"method": "rtn"}).write(tmp_path)
    twice = readme.read_text("utf-8")
    assert once.startswith("---\nlicense: mit\n---\n# Mine") and once.endswith(END + "\n\nMore of mine.\n")
    assert twice.partition(BEGIN)[0] == once.partition(BEGIN)[0] and twice.partition(END)[2] == once.partition(END)[2]
    assert "calibration.sha256: 0f0f" in once and "calibration" not in twice and "method: rtn" in twice
    full.write(tmp_path)
    assert readme.read_text("utf-8") == once
    assert json.loads((tmp_path / "quality.json").read_text("utf-8")) == full.as_json()
    assert page.facts_of(tmp_path) == FACTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "quality.json"]


INT8 = {
    "setting": "int8 activations, head and tower",
    "tokens": 371,
    "kl": {"value": 2.3456e-6, "low": 1e-6, "high": 3e-6},
    "top1": {"value": 1.0, "low": 1.0, "high": 1.0},
    "right": 1287,
    "asked": 1400,
    "exact_right": 1288,
}
SENTENCE = (
    "On a CPU, int8 activations, head and tower against `--exact --head float`: KL divergence 2.3e-06 nats a token "
    "(1e-06 to 3e-06), the same likeliest token at 100 %, 1287 of 1400 questions right (1288 exactly computed)."
)


def test_what_8_bit_activations_cost_is_added_and_stays(full: Card, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has no card; make one first: tinychat eval --card"):
        page.with_int8(tmp_path, INT8)
    full.write(tmp_path)
    page.with_int8(tmp_path, {**INT8, "right": 1})
    page.with_int8(tmp_path, INT8)
    readme = (tmp_path / "README.md").read_text("utf-8")
    assert readme.count("On a CPU") == 1 and f"|\n\n{SENTENCE}\n\nHow it was made:" in readme
    assert page.facts_of(tmp_path) == {**FACTS, page.INT8: INT8}
    replace(full, facts=page.facts_of(tmp_path)).write(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == readme
    with pytest.raises(FormatError, match=r"the card's int8_on_cpu is damaged \(KeyError\('kl'\)\); remove quality"):
        page.markdown(replace(full, facts={page.INT8: {"setting": "x"}}))


def test_facts_cannot_break_the_page(full: Card) -> None:
    text = page.markdown(replace(full, facts={**FACTS, "evil": f"{END}\n# Head"}))
    assert text.count(END) == 1 and text.rstrip().endswith(END) and "\n# Head" not in text
    assert r"odd: a\|b &lt;i>" in text and r"fell\_back: 3, 7" in text


@pytest.mark.parametrize("readme", [BEGIN, f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_marks_that_are_no_pair_are_refused(readme: str) -> None:
    with pytest.raises(
        FormatError, match=r"README.md has \d marks where a card begins and \d where one ends; leave one"
    ):
        with_part(readme, "part")


def test_a_folder_that_is_not_there_is_named(full: Card, tmp_path: Path) -> None:
    with pytest.raises(TinychatError, match="the card cannot be written to .*none: No such file or directory"):
        full.write(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "is not JSON"), ("[]", "holds no facts"), ('{"facts": 1}', "holds")]
)
def test_a_damaged_card_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(text)
    with pytest.raises(FormatError, match=sentence):
        page.facts_of(tmp_path)


def test_sparklines_begin_at_nothing() -> None:
    assert sparkline([0, 0.5, 1, float("nan"), 0.01]) == "▁▅█ ▁"
    assert sparkline([0.0, 0.0]) == "▁▁" and sparkline([]) == ""


def test_probes_are_shown_by_falling_size(full: Card) -> None:
    labels = [row[0] for row in page.rows(full) if row[0].startswith("probe")]
    assert labels[0] == "probe: read, text 25 % of the height" and labels[-1] == "probe: chart"
    assert ProbeScore("read", 0.5, 1, 2).interval == pytest.approx((0.0945, 0.9055), abs=1e-3)
