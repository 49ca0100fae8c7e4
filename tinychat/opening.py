"""From flags to a model that is ready to be asked: what the verbs that answer have in common."""

from __future__ import annotations

import atexit
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from tinychat.errors import UsageError
from tinychat.flags import ModelFlags, parse_device_map, parse_max_memory

if TYPE_CHECKING:
    import torch

    from tinychat.core import Progress
    from tinychat.engine.engine import Engine
    from tinychat.load import Placement, Ready
    from tinychat.terminal.ending import Ending


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to be asked. `ending`: what ends this process when another rank has ended."""

    model: Any
    processor: Any
    engine: Engine
    ending: Ending | None = None


def open_model(flags: ModelFlags, plain: bool = False, rows: int = 1, for_all: bool = False) -> Loaded:
    """Find the model, check it against the memory, and load it; progress goes to a terminal on stderr, and notes.

    `rows` requests are answered together, each with a context of its own. Flags that are `for_all` models of a verb
    may have nothing to do in one of them; else they are refused there. With --tp, or under torchrun, other processes
    load parts of it, which end with this one.

    Raises UsageError, ModelError, FormatError or CapacityError, and all but the last weights' own before the loading.
    """
    from tinychat.engine.engine import Engine

    placement = _placement(flags, frozenset() if for_all else flags.asked)
    ending = _ending_of_ranks(flags, placement, for_all)
    started = time.perf_counter()
    with progress(plain) as report:
        if ending is None:
            ready, model = _load(flags, placement, rows, report)
        else:
            ready, model = _load_shared(flags, placement, rows, ending, report)
    load_s = time.perf_counter() - started
    for line in ready.notes:
        note(line)
    options = {"context": ready.context, "chunk": flags.chunk, "rows": rows, "speculate": flags.speculate}
    return Loaded(ready.model, ready.processor, Engine(model, ready.processor, load_s=load_s, **options), ending)


def _load(flags: ModelFlags, placement: Placement, rows: int, report: Callable[[Progress], None]) -> tuple[Ready, Any]:
    import torch

    from tinychat import load

    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    ready = load.load_folder(
        load.resolve(flags.model, flags.revision), placement, context=flags.context, chunk=flags.chunk, rows=rows,
        template=flags.template, progress=report,
    )  # fmt: skip
    return ready, ready.model


def _ending_of_ranks(flags: ModelFlags, placement: Placement, for_all: bool) -> Ending | None:
    """How this process ends when another rank of --tp or torchrun does; None where there is no other one.

    Raises UsageError for what several ranks cannot do.
    """
    from tinychat.ranks.world import asked_ranks
    from tinychat.terminal.ending import Ending

    if asked_ranks(flags.tp) == 1:
        return None
    own_device = placement.device is not None and str(placement.device) not in ("cpu", "cuda")
    for wrong, message, remedy in (
        (for_all, "several ranks share a model in chat, ask and bench only", "leave --tp out"),
        (flags.device_map is not None, "both --tp and a --device-map are given", "give one of the two"),
        (own_device, f"--device is {placement.device}, and every rank has its own", "give cpu or cuda"),
    ):
        if wrong:
            raise UsageError(message, remedy)
    return Ending()


def _load_shared(
    flags: ModelFlags, placement: Placement, rows: int, ending: Ending, report: Callable[[Progress], None]
) -> tuple[Ready, Any]:
    """With the other ranks, which end with this process."""
    from tinychat.ranks.begin import leader
    from tinychat.ranks.lead import Order

    told = "rank 0 was told to end, as torchrun does when another rank ends; start again"
    signal.signal(signal.SIGTERM, lambda *_: ending(told))
    leading = leader(flags.tp, ending)
    atexit.register(leading.end)
    order = Order(flags.model, flags.revision, placement, flags.context, flags.chunk, rows, flags.template)
    ready = leading.load(order, report)
    return ready, leading.led(ready)


def _placement(flags: ModelFlags, asked: frozenset[str]) -> Placement:
    """The flags in the loader's words; raises UsageError for a device that is not here."""
    from tinychat.load import Placement

    device = checked_device(flags.device)
    return Placement(
        dtype=flags.dtype, device=device,
        device_map=parse_device_map(flags.device_map), max_memory=parse_max_memory(flags.max_memory),
        dequantize=flags.dequantize, exact=flags.exact, head=flags.head or "int8", tower=flags.tower or "int8",
        threads=flags.threads, kv_cache_dtype=flags.kv_cache_dtype, asked=asked,
    )  # fmt: skip


def checked_device(name: str | None) -> torch.device | None:
    """A device by its name. Raises UsageError for one that is not here."""
    import torch

    try:
        device = torch.device(name) if name else None
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}", "give cpu, cuda or cuda:N") from error
    if device is not None and device.type not in ("cpu", "cuda"):
        raise UsageError(f"{device} is a device that tinychat does not use", "give cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device is not None and device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"torch finds {count} CUDA devices, not {device}", "see `tinychat doctor`, or give --device cpu"
        )
    return device


@contextmanager
def progress(plain: bool) -> Iterator[Callable[[Progress], None]]:
    """What shows the loading on stderr, taken away at the end."""
    from tinychat.terminal.answers import is_plain
    from tinychat.terminal.progress import make_indicator

    indicator = make_indicator(sys.stderr, is_plain(sys.stderr, plain))
    try:
        yield indicator.show
    finally:
        indicator.stop()


def note(text: str) -> None:
    """One line on stderr, cleaned of what a terminal would obey."""
    from tinychat.terminal.clean import clean_line

    typer.echo(clean_line(text), err=True)
