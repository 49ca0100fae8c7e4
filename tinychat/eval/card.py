"""The quality card: what quantizing has cost a model, measured on data that it was not calibrated on.

Models are measured one after the other, so that only one is in memory: the original first, whose predictions are put
aside; then, where they are given, the model rounded to nearest and the quantized one.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from tinychat.core import Progress
from tinychat.engine.engine import Engine
from tinychat.errors import UsageError
from tinychat.eval import divergence, fidelity, page, probes
from tinychat.eval.divergence import Compared, Divergence, Held
from tinychat.eval.fidelity import Fidelity, LayerFidelity, OutputErrors, Weight
from tinychat.eval.heldout import KINDS, Heldout, Item, fingerprint, heldout
from tinychat.eval.perplexity import answer_perplexity, perplexity, read_text, text_ids, windows_in
from tinychat.eval.probes import Posed, ProbeScore
from tinychat.eval.spill import LIMIT, Spill, spilling
from tinychat.inputs.processor import Processor

MEASURES = ("ppl", "probes", "divergence")
WINDOW = 2048  # tokens of a window of a text that the caller gives
OWN_WINDOW = 256  # and of ours, which is short
PACKAGES = ("tinychat", "torch", "transformers")
NO_BASE = "There is no original model to compare with: divergence and fidelity are left out."
NO_WEIGHTS = "The original's weights are quantized themselves: only the layers' outputs are compared."
TEXT_ONLY = "The model reads text only: what needs pictures is left out."
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to measure: `open` loads it, or gives it where it is loaded; `weight` reads the weight `[N, K]` of one
    of the decoder's linears, by its name."""

    title: str
    open: Callable[[], Engine]
    weight: Weight | None = None

    @classmethod
    def of(cls, title: str, engine: Engine) -> Subject:
        """A model that is loaded and stays so."""
        return cls(title, lambda: engine, fidelity.weights_in(engine.model))


@dataclass(frozen=True, slots=True)
class CardPlan:
    """What to measure (MEASURES), on which held-out set, on how many samples of a kind, on which text file."""

    heldout: str = "plain"
    samples: int | None = None
    text: Path | None = None
    seqlen: int | None = None
    measures: tuple[str, ...] = MEASURES
    spill_limit: int = LIMIT

    def __post_init__(self) -> None:
        heldout(self.heldout)
        for name, least in (("samples", 1), ("seqlen", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}", f"give {least} or more")

    @property
    def data(self) -> Heldout:
        return heldout(self.heldout)

    @property
    def per_kind(self) -> int:
        """Samples of each kind: those asked for, else the set's own number."""
        return self.samples or self.data.samples


@dataclass(frozen=True, slots=True)
class Measured:
    """What the figures were measured on; None where the measure was not taken."""

    heldout: str
    samples: int
    heldout_sha256: str | None = None
    text: str | None = None
    text_sha256: str | None = None
    seqlen: int | None = None
    windows: int | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """The figures of one model; those against the original by kind of data, `all` among them.

    `others` are head and embeddings, where they are not the original's.
    """

    title: str
    perplexity: float | None = None
    probes: tuple[ProbeScore, ...] = ()
    divergence: Mapping[str, Divergence] = field(default_factory=dict[str, Divergence])
    layers: tuple[LayerFidelity, ...] = ()
    others: Mapping[str, Fidelity] = field(default_factory=dict[str, Fidelity])


@dataclass(frozen=True, slots=True)
class Note:
    """A figure that has come, in words."""

    text: str


Making = Generator[Progress | Note, None, "Card"]


@dataclass(frozen=True, slots=True)
class Card:
    """All figures by model (`base`, `nearest`, `quantized`, those that were given), and the facts of the quantizing."""

    columns: Mapping[str, Column]
    measured: Measured
    facts: Mapping[str, Any]
    left_out: tuple[str, ...]
    versions: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The object that quality.json holds, schema tinychat.card/1."""
        return page.as_json(self)

    def write(self, folder: Path) -> None:
        """Put quality.json and the part of README.md into a model's folder, replacing those of before.

        Raises TinychatError where the folder cannot be written.
        """
        page.write(self, folder)


def make_card(
    base: Subject | None,
    quantized: Subject,
    nearest: Subject | None = None,
    *,
    plan: CardPlan | None = None,
    facts: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> Card:
    """Measure the models one after the other; `report` gets a line for each figure as it comes.

    Raises ModelError where the models do not belong together or give NaN, UsageError for a text that is too short.
    """
    making = card_in_making(base, quantized, nearest, plan=plan, facts=facts)
    while True:
        try:
            event = next(making)
        except StopIteration as end:
            return end.value
        if report is not None and isinstance(event, Note):
            report(event.text)


def card_in_making(
    base: Subject | None,
    quantized: Subject,
    nearest: Subject | None = None,
    *,
    plan: CardPlan | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Making:
    """As make_card, as a generator that yields how far it is."""
    plan = plan or CardPlan()
    subjects = {"base": base, "nearest": nearest, "quantized": quantized}
    given = {name: subject for name, subject in subjects.items() if subject is not None}
    with spilling(plan.spill_limit) as spill:
        exam = _Exam(plan, spill, len(given), None if base is None else base.weight)
        if base is None:
            exam.leave_out(NO_BASE)
        elif base.weight is None and "divergence" in plan.measures:
            exam.leave_out(NO_WEIGHTS)
        columns: dict[str, Column] = {}
        for name, subject in given.items():
            columns[name] = yield from exam.column(subject, original=name == "base")
        return Card(columns, exam.measured(), facts or {}, tuple(exam.left_out), versions())


def versions() -> dict[str, str]:
    """Of what measures."""
    return {name: metadata.version(name) for name in PACKAGES}


Part = Generator[Progress | Note, None, Any]


@dataclass
class _Exam:
    """One card in the making: what the original said is held in `held` and `spill`, entry by entry."""

    plan: CardPlan
    spill: Spill
    models: int
    weight: Weight | None = None  # the original's
    done: int = 0
    items: list[Item] | None = None
    probes: list[Posed] | None = None
    held: list[Held] = field(default_factory=list[Held])
    left_out: list[str] = field(default_factory=list[str])
    text: dict[str, Any] = field(default_factory=dict[str, Any])
    dtype: str | None = None

    def leave_out(self, why: str) -> None:
        if why not in self.left_out:
            self.left_out.append(why)

    def measured(self) -> Measured:
        digest = fingerprint(self.items) if self.held and self.items else None
        return Measured(self.plan.heldout, self.plan.per_kind, digest, **self.text, dtype=self.dtype)

    def column(self, subject: Subject, original: bool) -> Generator[Progress | Note, None, Column]:
        """All figures of a model."""
        gc.collect()  # the model before may lie in a cycle
        engine = subject.open()
        self._prepare(engine)
        column = Column(subject.title)
        if original and "divergence" in self.plan.measures:
            yield from self._hold(engine)
            yield Note(f"{subject.title}: {len(self.held)} held-out answers")
        elif self.held:
            found, outputs = yield from self._compare(engine)
            value = found["all"]
            yield Note(f"{subject.title}: KL {value.kl.value:.4g}, same token {100 * value.top1.value:.1f} %")
            column = replace(column, divergence=found, **self._fidelity(engine, outputs))
        perplexity = yield from self._perplexity(subject, engine)
        scores = yield from self._probes(subject, engine)
        return replace(column, perplexity=perplexity, probes=scores)

    def _prepare(self, engine: Engine) -> None:
        """What all models are asked, drawn once, when the first one tells what it can read."""
        if self.items is None or self.probes is None:
            plan, pictures = self.plan, sees(engine.processor)
            self.dtype = str(_module(engine).dtype).removeprefix("torch.")
            self.items = items_for(plan, engine.processor) if {"divergence", "ppl"} & {*plan.measures} else []
            asked = probes.draw_probes(plan.heldout, plan.per_kind) if pictures and "probes" in plan.measures else ()
            self.probes = [probes.pose(probe) for probe in asked]
            if not pictures:
                self.leave_out(TEXT_ONLY)

    def _step(self) -> Progress:
        measures = self.plan.measures
        each = len(self.probes or ()) + len(self.items or ()) * ("divergence" in measures) + ("ppl" in measures)
        self.done += 1
        return Progress("", "card", self.done, self.models * each)

    def _hold(self, engine: Engine) -> Part:
        for item in self.items or ():
            held = divergence.continued(engine, item)
            reading = divergence.read(engine, held)
            self.held.append(held)
            self.spill.put({**divergence.coded(reading.logits), "outputs": reading.outputs})
            yield self._step()

    def _compare(
        self, engine: Engine
    ) -> Generator[Progress | Note, None, tuple[dict[str, Divergence], list[Fidelity]]]:
        compared: list[Compared] = []
        errors = OutputErrors()
        for index, (item, held) in enumerate(zip(self.items or (), self.held, strict=True)):
            divergence.check_same_tokens(engine, item, held)
            reading, base = divergence.read(engine, held), dict(self.spill.get(index))
            errors.add(reading.outputs, base.pop("outputs"))
            compared.append(divergence.compare(held, base, reading.logits))
            yield self._step()
        return by_kind(compared), errors.layers()

    def _fidelity(self, engine: Engine, outputs: list[Fidelity]) -> dict[str, Any]:
        if self.weight is None:
            return {"layers": fidelity.joined(outputs, ())}
        weights = list(fidelity.compare_weights(_module(engine), self.weight))
        others = fidelity.compare_others(fidelity.weights_in(_module(engine)), self.weight)
        return {"layers": fidelity.joined(outputs, weights), "others": others}

    def _perplexity(self, subject: Subject, engine: Engine) -> Generator[Progress | Note, None, float | None]:
        if "ppl" not in self.plan.measures:
            return None
        if (text := text_for(self.plan)) is None:
            found = self._of_answers(engine)
        else:
            name, words = text
            ids, seqlen = text_ids(engine.processor, words), seqlen_for(self.plan, engine.processor)
            found = perplexity(_module(engine), ids, seqlen)
            digest = hashlib.sha256(words.encode()).hexdigest()
            self.text = {"text": name, "text_sha256": digest, "seqlen": seqlen, "windows": windows_in(ids, seqlen)}
        yield self._step()
        yield Note(f"{subject.title}: perplexity {found:#.4g}")
        return found

    def _of_answers(self, engine: Engine) -> float:
        items = [item for item in self.items or () if item.answer is not None]
        self.text = {"text": f"right answers, set {self.plan.heldout}", "text_sha256": fingerprint(items)}
        return answer_perplexity(engine, items)

    def _probes(self, subject: Subject, engine: Engine) -> Generator[Progress | Note, None, tuple[ProbeScore, ...]]:
        marks: list[probes.Mark] = []
        for posed in self.probes or ():
            marks.append(probes.mark(engine, posed))
            yield self._step()
        scores = probes.tally(marks)
        if scores:
            yield Note(f"{subject.title}: probes {100 * probes.share_right(scores):.1f} % right")
        return scores


def by_kind(compared: Sequence[Compared]) -> dict[str, Divergence]:
    """The figures of all data together, and of each kind that there is."""
    kinds: dict[str, Sequence[Compared]] = {kind: [one for one in compared if one.kind == kind] for kind in KINDS}
    groups = {"all": compared, **{kind: group for kind, group in kinds.items() if group}}
    return {kind: divergence.summarize(group) for kind, group in groups.items()}


def _module(engine: Engine) -> Any:
    """The engine's model as a module that can be called: the engine itself needs less of it."""
    return engine.model


def sees(processor: Processor) -> bool:
    """Whether a model can be shown pictures."""
    return processor.image_processor is not None and bool(processor.tokens_per_image)


def items_for(plan: CardPlan, processor: Processor) -> list[Item]:
    """The held-out items that the model can read."""
    pictures = sees(processor)
    return [item for item in plan.data.items(plan.per_kind) if pictures or item.kind == "text"]


def text_for(plan: CardPlan) -> tuple[str, str] | None:
    """The name and the words of the caller's text, else of the held-out set's own; None where it has none."""
    if plan.text is not None:
        return plan.text.name, read_text(plan.text)
    return None if plan.data.text is None else (f"held-out text, set {plan.heldout}", plan.data.text)


def seqlen_for(plan: CardPlan, processor: Processor) -> int:
    """The window asked for, else the usual one. Raises UsageError beyond what the positions are made for."""
    longest = processor.config.text.max_position_embeddings
    if plan.seqlen is not None and plan.seqlen > longest:
        message = f"windows of {plan.seqlen} tokens are asked for, the model is made for {longest}"
        raise UsageError(message, f"try --seqlen {longest}")
    return plan.seqlen or min(WINDOW if plan.text is not None else OWN_WINDOW, longest)
