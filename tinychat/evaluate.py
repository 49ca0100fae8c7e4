"""The command `tinychat eval`: which models are opened one after the other, what is measured, and how it is shown."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tinychat.checkpoint import EMBEDDINGS
from tinychat.errors import CapacityError, ModelError, TinychatError, UsageError
from tinychat.eval import gate, page, report
from tinychat.eval.card import Card, CardPlan, Subject, make_card
from tinychat.eval.heldout import speaks_demo

if TYPE_CHECKING:
    from tinychat.engine.engine import Engine
    from tinychat.flags import EvalFlags
    from tinychat.load import Source
    from tinychat_kernels.layout import QuantSpec

TASKS = ("demo", "ppl", "probes")
NOTHING: Mapping[str, Any] = {}
Note = Callable[[str], None]


class Open(Protocol):
    """Loads a model by its name; with `floats` as what the card is measured with: in that dtype, no weight packed."""

    def __call__(self, name: str | None, floats: str | None = None) -> Engine: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What the flags ask for, checked before anything is loaded; `model` None is the embedded one."""

    model: str | None
    revision: str | None
    tasks: tuple[str, ...]
    flags: EvalFlags
    bounds: tuple[gate.Bound, ...]
    demo: report.Plan

    @property
    def makes_card(self) -> bool:
        """Whether anything but the demo tasks is measured."""
        return self.tasks != ("demo",) or self.flags.against is not None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The JSON object, the tables and lines that say the same to people, and a sentence for each bound not met."""

    found: Mapping[str, Any]
    tables: list[list[list[str]]]
    lines: list[str]
    failed: list[str]


def job_of(flags: EvalFlags, model: str | None, revision: str | None) -> Job:
    """The job that the flags describe. Raises UsageError where they contradict each other."""
    whole = flags.card or flags.against is not None
    tasks = _tasks(flags.tasks or ("ppl,probes" if whole else "demo"))
    bounds = gate.parse(flags.fail_under) if flags.fail_under else ()
    gate.check_measured(bounds, tasks, flags.against is not None)
    job = Job(
        model, revision, tasks, flags, bounds, report.Plan(model or "embedded", flags.per_task, tuple(flags.only))
    )
    if flags.card and not job.makes_card:
        raise UsageError("--card is given, and the demo tasks are no part of a card", "add --tasks ppl,probes")
    if flags.against is None and (flags.nearest or flags.plots):
        name = "--nearest" if flags.nearest else "--plots"
        raise UsageError(f"{name} needs a model to compare with", "add --against BASE")
    if flags.plots:
        from tinychat.eval.plots import check_matplotlib

        check_matplotlib()
    return job


def _tasks(text: str) -> tuple[str, ...]:
    named = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in named:
        if name not in TASKS:
            raise UsageError(f"--tasks names {name!r}", f"give some of {','.join(TASKS)}")
    return named


def perform(job: Job, open_engine: Open, note: Note) -> Outcome:
    """Measure everything that the job asks for; write the card and draw the plots where asked."""
    started = time.perf_counter()
    if not job.makes_card:
        found = report.measure(job.demo, open_engine(job.model), note)
        failed = gate.shortfalls(job.bounds, gate.figures(None, found["scores"]))
        return Outcome(found, [report.rows(found)], [], failed)
    card, lines = _measured_card(job, open_engine, note)
    demo = report.measure(job.demo, open_engine(job.model), note) if "demo" in job.tasks else {"scores": []}
    failed = gate.shortfalls(job.bounds, gate.figures(card, demo["scores"]))
    found = {
        "schema": report.SCHEMA,
        "model": job.demo.model,
        "against": job.flags.against,
        "tasks": ",".join(job.tasks),
        "scores": demo["scores"],
        "card": card.as_json(),
        "failed": failed,
        "seconds": round(time.perf_counter() - started, 3),
    }
    tables = [page.rows(card), *([report.rows(demo)] if demo["scores"] else [])]
    return Outcome(found, tables, [*page.foot(card), *lines], failed)


def _measured_card(job: Job, open_engine: Open, note: Note) -> tuple[Card, list[str]]:
    """The card, and where it and its plots were written."""
    source = _source(job.model, job.revision)
    if job.flags.card:
        _check_folder(job, source.folder)
    facts = _facts(source)
    models = _Models(open_engine, "auto" if job.flags.card else None)
    quantized = Subject(_title(source, facts), lambda: models.other(job.model))
    base, nearest = _others(job, source, models)
    card = make_card(base, quantized, nearest, plan=_plan(job, source), facts=facts, report=note)
    lines: list[str] = []
    if job.flags.card:
        card.write(source.folder)
        lines.append(f"the card is in {source.folder / page.FILE} and {source.folder / 'README.md'}")
    if job.flags.plots:
        from tinychat.eval import plots

        lines += [f"wrote {path}" for path in plots.draw(card, Path(job.flags.plots))]
    return card, lines


def _source(model: str | None, revision: str | None = None) -> Source:
    from tinychat import load

    return load.open_source(load.resolve(model, revision))


def _facts(source: Source) -> dict[str, Any]:
    """What `tinychat quantize` noted in the folder, else the facts of its card, else what the config says."""
    from tinychat.quantize.facts import FACTS, for_card, of_folder

    before = page.facts_of(source.folder)
    if (source.folder / FACTS).is_file():
        int8 = {page.INT8: before[page.INT8]} if page.INT8 in before else {}
        return for_card(of_folder(source.folder)) | int8
    return before or {"quantization": asdict(source.spec) if source.spec else "none"}


def _check_folder(job: Job, folder: Path) -> None:
    """Whether a card can be written there, before anything is measured."""
    if job.model is not None and not Path(job.model).expanduser().is_dir():
        message = f"--card writes into the model's folder, and {job.model} is on the hub"
        raise UsageError(message, "download it to a folder of yours, and give that")
    if not os.access(folder, os.W_OK):
        raise TinychatError(f"the card cannot be written to {folder}", "give a folder that can be written")
    page.check_readme(folder)


def _title(source: Source, facts: Mapping[str, Any] = NOTHING) -> str:
    """How a model's weights are held, and what they were made by: `16 bit`, `AWQ 4 bit`."""
    from tinychat.quantize.facts import title_of

    options = facts.get("options") or {}
    method = str(facts.get("method") or options.get("method") or "")
    if source.spec is None and options.get("pseudo"):
        return title_of(method, options["bits"], pseudo=True)
    return title_of(method, source.spec.bits if source.spec else 8 * source.index.dtype(EMBEDDINGS).itemsize)


def _plan(job: Job, source: Source) -> CardPlan:
    """The held-out set is the one asked for, else the demo's own for models with its vocabulary."""
    from tinychat.inputs.processor import Processor

    flags = job.flags
    processor = Processor.from_folder(source.folder, source.config)
    return CardPlan(
        heldout=flags.heldout or ("demo" if speaks_demo(processor) else "plain"),
        samples=flags.samples,
        text=Path(flags.text).expanduser() if flags.text else None,
        seqlen=flags.seqlen,
        measures=(*(task for task in job.tasks if task != "demo"), *(["divergence"] if flags.against else [])),
    )


@dataclass
class _Models:
    """Opens the models of a card: the ones after the first compute in its dtype, with float weights."""

    open_engine: Open
    dtype: str | None = None  # none, where nothing is compared: the model computes as it does for its users

    def base(self, name: str | None) -> Engine:
        engine = self.open_engine(name)
        self.dtype = str(engine.model.dtype).removeprefix("torch.")  # pyright: ignore[reportAttributeAccessIssue]
        return engine

    def other(self, name: str | None) -> Engine:
        """Packed weights become floats, which are quicker to compute with, unless memory does not suffice."""
        try:
            return self.open_engine(name, self.dtype)
        except CapacityError:
            return self.open_engine(name)


def _others(job: Job, source: Source, models: _Models) -> tuple[Subject | None, Subject | None]:
    """The model that this one is compared with, and that model rounded to nearest."""
    from tinychat.quantize.layered import weights_of

    against, wanted = job.flags.against, job.flags.nearest
    if against is None:
        return None, None
    base = _source(against)
    weight = None if base.spec else weights_of(base.index)
    subject = Subject(_title(base), lambda: models.base(against), weight)
    spec = None if base.spec else source.spec
    if wanted and spec is None:
        which = f"{against} is quantized already" if base.spec else f"{job.demo.model} is not quantized"
        raise UsageError(f"--nearest rounds BASE as MODEL is quantized, and {which}", "leave --nearest out")
    if spec is None or not (job.flags.card if wanted is None else wanted):
        return subject, None
    return subject, Subject(f"RTN {spec.bits} bit", lambda: rounded(models.other(against), spec))


def rounded(engine: Engine, spec: QuantSpec) -> Engine:
    """The engine's model, its decoder rounded to nearest in place."""
    from tinychat.models.vila_llama import VilaLlamaForCausalLM
    from tinychat.quantize.nearest import round_to_nearest

    if not isinstance(engine.model, VilaLlamaForCausalLM):
        raise ModelError("only a model of this program's own can be rounded", "leave --nearest out")
    round_to_nearest(engine.model, spec)
    return engine
