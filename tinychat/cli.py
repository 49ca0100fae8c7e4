"""The command line: verbs, exceptions -> one line and an exit code. What is heavy is imported inside the verbs."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinychat import __version__
from tinychat.errors import ModelError, TinychatError, UsageError
from tinychat.flags import (
    VERBOSE,
    AskFlags,
    BenchFlags,
    ChatFlags,
    ConvertFlags,
    DoctorFlags,
    EvalFlags,
    ModelFlags,
    QuantizeFlags,
    SamplingFlags,
    Verbose,
    checkpoint_sampling,
    with_flags,
)
from tinychat.opening import checked_device, note, open_model, progress
from tinychat.search_flags import SearchFlags

if TYPE_CHECKING:
    from tinychat.ask import Asker, Query
    from tinychat.engine.engine import Engine
    from tinychat.ranks.world import World

INTERRUPTED = 130
BROKEN_PIPE = 141  # what a shell shows of a process that SIGPIPE ended
EMBEDDED = "embedded"  # the model's name where --model is not given
BadUsage = typer.BadParameter.__bases__[0]  # the parser's error for any wrong flag, argument or verb

app = typer.Typer(
    name="tinychat",
    help="Chat with pictures on your own machine.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"tinychat {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Chat with pictures on your own machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@with_flags
def chat(flags: ChatFlags, model: ModelFlags, sampling: SamplingFlags) -> int:
    """Talk with a model about pictures."""
    from tinychat.ask import read_picture
    from tinychat.session import Session
    from tinychat.store import Store
    from tinychat.terminal.repl import run_chat

    images = [read_picture(path) for path in flags.image]
    loaded = open_model(model, plain=flags.plain)
    draw = sampling.sampling(checkpoint_sampling(loaded.processor.generation))
    session = Session(loaded.engine, system=flags.system, sampling=draw, stopping=sampling.stopping(), store=Store())
    if loaded.ending is not None:
        loaded.ending.rescue = session.rescue
    title = model.model or EMBEDDED
    return run_chat(session, plain=flags.plain, images=images, title=f"tinychat with {title}", stats=flags.stats)


@app.command()
@with_flags
def ask(flags: AskFlags, model: ModelFlags, sampling: SamplingFlags) -> int:
    """Ask one question, with or without pictures."""
    from tinychat import ask as asking
    from tinychat.core import SamplingParams

    query, files = asking.gather(flags.words or (), flags.image, asking.stdin_bytes(), note)
    asker = asking.Asker(
        model=model.model or EMBEDDED,
        open=lambda: open_model(model, plain=flags.plain, rows=flags.concurrency or 1).engine,
        system=flags.system,
        sampling=sampling.sampling(SamplingParams()),
        stopping=sampling.stopping(),
    )
    if flags.jsonl is not None:
        return asking.ask_each(asker, query, files, Path(flags.jsonl), note)
    whole = asking.Query(query.question, (*query.images, *map(asking.read_picture, files)))
    if flags.json:
        typer.echo(json.dumps(asking.ask_json(asker, whole)))
        return 0
    return _print_answer(asker, whole, flags, limited=sampling.max_new_tokens is not None)


def _print_answer(asker: Asker, query: Query, flags: AskFlags, limited: bool) -> int:
    from tinychat.ask import why_cut
    from tinychat.core import Failed
    from tinychat.terminal.answers import print_answer, stats_line

    engine = asker.open()
    events = engine.run([asker.request("ask", query)])
    end = print_answer(events, out=sys.stdout, err=sys.stderr, plain=flags.plain, stream=flags.stream)
    if isinstance(end, Failed):
        return end.exit_code
    if cut := why_cut(end, engine.context, limited):
        note(cut)
    if flags.stats:
        note(stats_line(end, engine.context))
    return 0


@app.command()
@with_flags
def search(flags: SearchFlags) -> int:
    """Find pictures in a folder by what they show.

    \b
    tinychat search photos "a dog on a beach" --model openai/clip-vit-base-patch32
    tinychat search photos --like dog.jpg -n 5 --model openai/clip-vit-base-patch32
    """
    from tinychat import search as searching
    from tinychat.terminal.found import draw_found, write_paths

    device = checked_device(flags.device)
    with progress(flags.plain) as report:
        found = searching.perform(flags, device, report)
    for line in found.notes:
        note(line)
    if flags.json:
        typer.echo(json.dumps(found.json))
    elif flags.print0:
        write_paths(found.shown(flags.folder or ""), sys.stdout.buffer)
    elif flags.query or flags.like is not None:
        draw_found(found.shown(flags.folder or ""), sys.stdout, flags.plain)
    else:
        _say(searching.sentence(flags, found))
    return 0


@app.command()
@with_flags
def bench(flags: BenchFlags, model: ModelFlags) -> int:
    """Measure the speed and memory of a model."""
    from tinychat import bench as benching

    if flags.startup:
        found = benching.startup(flags.rounds)
    else:
        loaded = open_model(benching.roomy(model, flags))
        subject = benching.Subject(model.model or EMBEDDED, loaded.model, loaded.processor, loaded.engine)
        work = benching.Workload(
            flags.prompt_tokens, flags.new_tokens, flags.images, flags.rounds, flags.depths, flags.breakdown
        )
        found = benching.measure(subject, work, note)
    if flags.json:
        typer.echo(json.dumps(found))
    else:
        _say(benching.headline(found))
        _draw_table(benching.rows(found))
        for stages in (benching.encode_rows(found), benching.stage_rows(found)):
            if stages:
                _draw_table(stages)
        if foot := benching.foot(found):
            _say(foot)
    return 0


@app.command(name="eval")
@with_flags
def evaluate(flags: EvalFlags, model: ModelFlags) -> int:
    """Measure how well a model answers, and what quantizing has cost it."""
    from tinychat import evaluate as evaluating

    named = flags.words[0] if flags.words else model.model
    if flags.words and model.model not in (None, named):
        raise UsageError(f"both {named} and --model {model.model} are given", "give one of the two")

    def opened(name: str | None, floats: str | None = None) -> Engine:
        wanted = replace(model, model=name, revision=model.revision if name == named else None)
        if floats is not None and model.device_map is None:
            wanted = replace(wanted, dtype=model.dtype or floats, dequantize=True)
        return open_model(wanted, for_all=True).engine

    end = evaluating.perform(evaluating.job_of(flags, named, model.revision), opened, note)
    if flags.json:
        typer.echo(json.dumps(end.found))
    else:
        for table in end.tables:
            _draw_table(table)
        for line in end.lines:
            _say(line)
    for sentence in end.failed:
        note(f"--fail-under: {sentence}")
    return int(bool(end.failed))


@app.command()
@with_flags
def quantize(flags: QuantizeFlags) -> int:
    """Make a 4-bit checkpoint of a model, a layer at a time, within a memory limit, resumable."""
    from tinychat.quantize import verb
    from tinychat.terminal.answers import is_plain
    from tinychat.terminal.quantizing import make_board

    checked_device(flags.device)
    return verb.perform(flags, make_board(sys.stderr, is_plain(sys.stderr, flags.plain)), _say)


@app.command()
@with_flags
def convert(flags: ConvertFlags) -> int:
    """Write a 4-bit checkpoint in another format, for other programs to read; nothing of it is rounded."""
    from tinychat import convert as converting
    from tinychat import load

    folder = load.resolve(flags.model, flags.revision)
    with progress(flags.plain) as report:
        found = converting.perform(folder, flags, report)
    _say(json.dumps(found) if flags.json else converting.sentence(found))
    return 0


@app.command()
@with_flags
def doctor(flags: DoctorFlags) -> int:
    """Show what is installed and what this machine can do."""
    from tinychat import doctor as doctoring

    if flags.clear:
        note(f"deleted {doctoring.size(doctoring.clear_cache())}")
    looks = {flags.cache: doctoring.cache, flags.kernels: doctoring.kernels}
    found = looks.get(True, doctoring.report)()
    _say(json.dumps(found) if flags.json else doctoring.to_text(found))
    return int(flags.kernels and not all(one["right"] for one in found["kernels"]["results"]))


def _draw_table(rows: Sequence[Sequence[str]]) -> None:
    """A table by rich on a terminal, columns of text elsewhere; the first row is the head."""
    from tinychat.terminal.answers import is_plain

    if is_plain(sys.stdout):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for label, *cells in rows:
            numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            typer.echo("  ".join([label.ljust(widths[0]), *numbers]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


def _say(text: str, err: bool = False) -> None:
    """Text for people, cleaned of what a terminal would obey; names and paths in it are cleaned as lines before."""
    from tinychat.terminal.clean import clean

    typer.echo(clean(text), err=err)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code, whatever happens."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what a Latin-1 terminal cannot show
    state: dict[str, bool] = {}
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv), state)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the last resort: whatever it is ends as one line and a code
        return _end(error, verbose=state.get(VERBOSE, False))
    return code


def _world() -> World | None:
    """Which of torchrun's ranks this is; None where there is no torchrun, which costs the start nothing."""
    if "WORLD_SIZE" not in os.environ:
        return None
    from tinychat.ranks.world import world_of

    try:
        return world_of(os.environ)
    except UsageError:  # said by the verbs that open a model
        return None


def _run(args: list[str], state: dict[str, bool]) -> int:
    world = _world()
    if world is not None and world.rank > 0:
        from tinychat.ranks.follow import follow

        return follow(world)
    try:
        command = typer.main.get_command(app)
        with command.make_context("tinychat", args, obj=state) as context:
            code = command.invoke(context) or 0
    except typer.Exit as end:  # after --help, for one
        code = end.exit_code
    if world is not None:
        from tinychat.ranks.begin import dismiss

        dismiss(world)
    return code


def _end(error: BaseException, verbose: bool) -> int:
    """The exit code of what ended the run, after its line on stderr."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains
        return BROKEN_PIPE
    if verbose:
        _say("".join(traceback.format_exception(error)).rstrip(), err=True)
    known = _as_ours(error)
    note(f"error: {known}" if known else f"tinychat hit a bug: {type(error).__name__}: {error}; {BUG_REMEDY}")
    return known.exit_code if known else 1


BUG_REMEDY = "run it again with --verbose, and report what it shows with `tinychat doctor`"


def _as_ours(error: BaseException) -> TinychatError | None:
    """The error as one of ours; None where it is a bug."""
    if isinstance(error, TinychatError):
        return error
    if isinstance(error, BadUsage):
        return _bad_usage(error)
    if (ranks := sys.modules.get("tinychat.ranks.lead")) and isinstance(error, ranks.RanksLost):
        return TinychatError(*error.args)
    if (kernels := sys.modules.get("tinychat_kernels.errors")) and isinstance(error, kernels.KernelError):
        return _kernel_error(error)
    if isinstance(error, ModuleNotFoundError):
        return TinychatError(f"{error.name} is not installed", f"install it: pip install {error.name}")
    return None


def _kernel_error(error: BaseException) -> TinychatError:
    """A kernel's error in our form: the user's where a variable asks for what is not here, else the model's."""
    message = str(error).partition(": see ")[0]
    if (variable := getattr(error, "variable", None)) is not None:
        return UsageError(message, f"set {variable} to one of them, or to nothing")
    return ModelError(message, "see `tinychat doctor`")


def _bad_usage(error: Any) -> UsageError:
    """The parser's error in our form: what is wrong; the nearest name, or where to look."""
    path = error.ctx.command_path if error.ctx else "tinychat"
    message, _, near = str(error.message or error.format_message()).rstrip(".?").partition(". Did you mean ")
    if isinstance(error, typer.BadParameter):
        message = _misfit(error) or error.format_message().rstrip(".")
    near = near or " or ".join(getattr(error, "possibilities", None) or ())
    message = message[:1].lower() + message[1:]
    return UsageError(message, f"did you mean {near}?" if near else f"`{path} --help` shows what there is")


def _misfit(error: Any) -> str | None:
    """A value that is none of its option's, in words, where the parser tells the reason apart from the rest."""
    reasons = getattr(error.__cause__, "errors", None)
    if reasons is None or error.param is None:
        return None
    reason = reasons()[0]
    wanted = str(reason["msg"]).partition(",")[0].removeprefix("Input should be ")
    return f"{error.param.opts[0]} is {reason['input']}, it must be {wanted}"
