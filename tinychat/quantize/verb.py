"""The command `tinychat quantize`: flags become a job, and its events lines, a bar, or JSON."""

from __future__ import annotations

import json
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tinychat.core import Progress
from tinychat.errors import TinychatError, UsageError
from tinychat.eval.card import Note
from tinychat.eval.fidelity import decibels
from tinychat.eval.page import FILE, README
from tinychat.quantize.card_plan import LAYERS, NONE
from tinychat.quantize.facts import SCHEMA
from tinychat.quantize.job import Calibration, Job
from tinychat.quantize.plan import Plan, size
from tinychat.quantize.run import Began, Event, LayerDone, Run, Written
from tinychat.quantize.tower import TowerLayerDone
from tinychat.terminal.quantizing import Board, duration
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import PER_ROW, QuantSpec

if TYPE_CHECKING:
    from tinychat.flags import QuantizeFlags

Say = Callable[[str], None]
CALIBRATION = ("calib", "calib_samples", "calib_seqlen")
SEARCH = ("clip", "duo", "compensate", "scale_grid", "loss_tokens")
STAGES = {
    "check": "checking the weights",
    "load": "reading the model's files",
    "vision": "reading the calibration data",
    "tower": "quantizing the vision tower",
    "quantize": "quantizing",
    "card": "making the quality card",
}


def job_of(flags: QuantizeFlags) -> Job:
    """The job that the flags describe. Raises UsageError, and ModelError where there is no such model."""
    from tinychat import load
    from tinychat.flags import parse_size
    from tinychat.placement import default_device

    try:
        spec = QuantSpec(flags.bits, flags.group_size, not flags.symmetric)
    except LayoutError as error:
        raise UsageError(str(error), "give other --bits or another --group-size") from error
    _check_idle(flags)
    folder = load.resolve(flags.model, flags.revision)
    wanted = Calibration(tuple(flags.calib), flags.calib_samples, flags.calib_seqlen, flags.seed, flags.template)
    return Job(
        folder=folder,
        out=Path(flags.out or "").expanduser(),
        name=folder.resolve().name if Path(flags.model or "").expanduser().is_dir() else flags.model or "",
        method=flags.method,  # type: ignore[arg-type]  # checked by Job
        vision=flags.vision,  # type: ignore[arg-type]  # checked by Job
        spec=spec,
        pseudo=flags.pseudo,
        search={name: getattr(flags, name) for name in SEARCH},
        search_results=Path(flags.search_results).expanduser() if flags.search_results else None,
        calibration=wanted,
        device=flags.device or str(default_device()),
        threads=flags.threads,
        max_ram=parse_size("--max-ram", flags.max_ram),
        max_disk=parse_size("--max-disk", flags.max_disk),
        card=flags.card,
        card_samples=flags.card_samples,
    )


def _check_idle(flags: QuantizeFlags) -> None:
    """Raise UsageError for what would have no say where nothing is searched."""
    if flags.method != "rtn":
        return
    usual = {field.name: field.default for field in fields(flags)} | {"calib": []}
    for name in (*CALIBRATION, *SEARCH):
        if (value := getattr(flags, name)) != usual[name]:
            option = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise UsageError(f"--method rtn searches nothing, and {option} is given as well", "give one of the two")


def command(flags: QuantizeFlags) -> str:
    """The command line that goes on with a run of these flags."""
    words = ["tinychat", "quantize", str(flags.model), str(flags.out)]
    for field in fields(flags):
        value, name = getattr(flags, field.name), field.name.replace("_", "-")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in ("model", "out", "resume", "dry_run") or value == default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [f"--{name}", str(item)]
    return shlex.join([*words, "--resume"])


def perform(flags: QuantizeFlags, board: Board, say: Say) -> int:
    """Plan, and unless only that is asked for, run; `say` prints to stdout. Raises TinychatError."""
    run = Run(job_of(flags))
    if flags.dry_run:
        say(json.dumps(_json("plan", run.plan.to_json())) if flags.json else plan_text(run.plan, flags))
        run.plan.check(run.job.out)
        return 0
    begun = False
    try:
        with terminable():
            for event in run.events(flags.resume):
                begun = begun or isinstance(event, Began)
                _show(event, flags.json, board, say)
    except (TinychatError, KeyboardInterrupt) as error:
        board.stop()
        if begun or isinstance(error, KeyboardInterrupt):
            why = "interrupted; " if isinstance(error, KeyboardInterrupt) else ""
            board.say(f"{why}the work so far is kept in {run.job.partial}; go on with: {command(flags)}")
        raise
    finally:
        board.stop()
    return 0


@contextmanager
def terminable() -> Iterator[None]:
    """A request to terminate ends the work as Ctrl-C does, with everything in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _show(event: Event, as_json: bool, board: Board, say: Say) -> None:
    if as_json:
        say(json.dumps(to_json(event)))
    elif isinstance(event, Progress):
        board.stage(STAGES[event.stage], event.done, event.total)
    elif isinstance(event, Note):
        board.say(event.text)
    elif isinstance(event, Began):
        for line in (began_text(event), *warning_lines(event.plan)):
            board.say(line)
    elif isinstance(event, TowerLayerDone):
        board.say(tower_text(event))
        board.stage(STAGES["tower"], event.index + 1, event.total)
    elif isinstance(event, LayerDone):
        board.say(layer_text(event))
        board.stage(STAGES["quantize"], event.index + 1, event.total, event.left)
    else:
        board.stop()
        say(written_text(event))


def to_json(event: Event) -> dict[str, Any]:
    """An event as plain data."""
    if isinstance(event, Progress):
        return _json("progress", {"stage": event.stage, "done": event.done, "total": event.total})
    if isinstance(event, Note):
        return _json("figure", {"text": event.text})
    if isinstance(event, Began):
        return _json("began", {"done": event.done, "plan": event.plan.to_json()})
    if isinstance(event, TowerLayerDone):
        return _json("tower_layer", asdict(event))
    if isinstance(event, LayerDone):
        return _json("layer", asdict(event))
    return _json("written", {"out": str(event.out), "facts": event.facts})


def _json(kind: str, rows: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "event": kind, **rows}


def began_text(event: Began) -> str:
    """What is ahead, in a line."""
    plan = event.plan
    layers = (plan.seconds - plan.card_seconds) * (plan.layers - event.done) / plan.layers
    left = duration(layers + plan.card_seconds)
    before = f"{event.done} of {plan.layers} layers were done before; " if event.done else ""
    return f"{before}about {left} with {size(plan.peak_ram)} of memory and {size(plan.disk)} of disk at most"


def layer_text(event: LayerDone) -> str:
    """One layer in a line."""
    place = f"layer {event.index + 1} of {event.total}"
    ending = f"{duration(event.seconds)}, {duration(event.left)} left"
    if event.loss is None:
        given = "scaled and clipped as the search results say, " if event.kept == "given" else ""
        return f"{place}: {given}rounded to the nearest, {ending}"
    loss = f"loss {event.loss['rtn']:.3g} rounded to the nearest, {event.loss['awq']:.3g} searched"
    return f"{place}: {loss}{', which is not kept' if event.kept == 'rtn' else ''}, {ending}"


def tower_text(event: TowerLayerDone) -> str:
    """One layer of the vision tower in a line."""
    place = f"vision layer {event.index + 1} of {event.total}"
    left = f", {', '.join(event.spared)} left in 16 bit" if event.spared else ""
    if event.error is None:
        return f"{place}: rounded to 8 bits{left}, {duration(event.seconds)}"
    plain, smooth = (decibels(event.error[name]) for name in ("plain", "smooth"))
    error = f"{plain:.1f} dB of signal to noise in 8 bits, {smooth:.1f} dB smoothed"
    return f"{place}: {error}{', which is not kept' if event.kept == 'plain' else ''}{left}, {duration(event.seconds)}"


def written_text(event: Written) -> str:
    """The end in a line."""
    facts, back = event.facts, event.facts["fallbacks"]
    losses = [layer["loss"] for layer in facts["layers"] if layer.get("loss")]
    total = sum(path.stat().st_size for path in event.out.rglob("*") if path.is_file())
    text = f"{event.out}: {size(total)}, {len(facts['layers'])} layers in {duration(facts['wall_s'])}"
    if losses:
        kept = sum(min(loss.values()) for loss in losses) / max(sum(loss["rtn"] for loss in losses), 1e-30)
        text += f"; the layers' error is {100 * (1 - kept):.0f} % below that of rounding to the nearest"
    if (event.out / FILE).is_file():
        text += f"; its quality is told in {README}"
    if back:
        text += f"; {len(back)} layers are rounded to the nearest, since no search did better: {back}"
    return text


def plan_text(plan: Plan, flags: QuantizeFlags) -> str:
    """The plan in a few lines."""
    stages = ", ".join(f"{name} {size(count)}" for name, count in plan.ram.items())
    where = "in memory" if plan.hold else "on the disk"
    data = f"{plan.sequences} sequences, {plan.tokens:,} tokens, {plan.pictures} pictures; hidden states {where}"
    tower = ", the vision tower a layer at a time" if plan.stream else ""
    groups = "a row a group" if flags.group_size == PER_ROW else f"in groups of {flags.group_size}"
    lines = (
        f"quantized:   {plan.linears} linears of {plan.layers} layers, {plan.weights / 1e6:,.1f} million weights, "
        f"to {flags.bits} bits {groups}",
        f"stays:       {', '.join(plan.spared)}, embeddings and norms",
        f"calibration: {data}{tower}" if plan.sequences else "calibration: none is needed",
        f"memory:      {size(plan.peak_ram)} at most ({stages}); {size(plan.ram_limit)} are allowed or free",
        f"disk:        {size(plan.disk)} while it runs, {size(plan.output)} in the end; "
        f"{size(plan.disk_limit)} are allowed or free",
        f"card:        {card_text(plan)}",
        f"time:        about {duration(plan.seconds)} on this machine",
        *warning_lines(plan),
    )
    return "\n".join(lines)


def warning_lines(plan: Plan) -> list[str]:
    """What a user should know beforehand."""
    return [f"warning: {text}" for text in plan.warnings]


def card_text(plan: Plan) -> str:
    """How the quality card is made, in words."""
    if plan.card == NONE:
        return "none"
    how = f"whole models in {plan.card}"
    if plan.card == LAYERS:
        how = f"a layer at a time, without answers of its own and probes: a whole model takes {size(plan.card_whole)}"
    return f"{how}; about {duration(plan.card_seconds)}"
