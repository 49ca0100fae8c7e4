"""Rank 0: it has the model loaded everywhere, runs its own part, and ends the others when it is done."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.core import Progress
from tinychat.errors import ModelError, TinychatError
from tinychat.layers.local_ranks import LocalRanks, gathered
from tinychat.ranks.led import LedModel
from tinychat.ranks.words import leave, speak
from tinychat.ranks.world import World
from tinychat_kernels import build
from tinychat_kernels.cpu import cache_folder, usable_cores

if TYPE_CHECKING:
    from tinychat.load import Ready
    from tinychat.placement import Placement
    from tinychat.ranks.launch import Launched

KINDS = (".json", ".safetensors", ".bin", ".pt", ".pth")
PARTING = 0.1  # seconds in which gloo's threads let the last tensors go: they cannot while Python is shut down
NOTICED = 5.0  # seconds in which the watch says which rank has ended, before the connection's own error is shown


class RanksLost(Exception):
    """The ranks can go on no more: one of them has ended, or has failed in the midst of a step. (message, remedy)"""


@dataclass(frozen=True, slots=True)
class Order:
    """What every rank is to load; the fields are those of tinychat.load.load_folder."""

    model_id: str | None
    revision: str | None
    placement: Placement
    context: int | None
    chunk: int
    rows: int
    template: str | None


@dataclass(frozen=True, slots=True)
class Loading:
    """How it went on one rank: an error's message, remedy and code, or what was loaded."""

    error: tuple[str, str, int] | None
    weights: str = ""


class Leader:
    """Speaks for rank 0. Call `end` when all is done."""

    def __init__(self, world: World, group: Any, launched: Launched | None = None) -> None:
        self.world = world
        self.group = group
        self._launched = launched
        self._broken = False
        self._ended = False

    def load(self, order: Order, progress: Callable[[Progress], None] | None = None) -> Ready:
        """Every rank loads its part; raises the first rank's error that has one."""
        from tinychat import load

        if self._launched is not None:  # on the same disk: what is to be downloaded is downloaded once
            folder = load.resolve(order.model_id, order.revision)
            order = replace(order, model_id=str(folder), revision=None)
        with self._together():
            speak(self.group, "load", order)
            ready, loading = load_part(order, self.world, self.group, progress)
            check_loading(gathered(self.group, loading))
        assert ready is not None
        return ready

    def led(self, ready: Ready) -> LedModel:
        """The model for the engine."""
        return LedModel(ready.model, lambda name, *arguments: speak(self.group, name, *arguments), self._together)

    def end(self) -> None:
        """Send the others home, and wait for those that were started here; once."""
        if self._ended:
            return
        self._ended = True
        if self._launched is not None:
            self._launched.expect_end()
        if not self._broken:
            with suppress(RuntimeError):
                speak(self.group, "end")
                leave()
                time.sleep(PARTING)
        if self._launched is not None:
            self._launched.end(at_once=self._broken)

    @contextmanager
    def _together(self) -> Generator[None, None, None]:
        """What is wrong for all alike is raised; all else leaves the ranks out of step, and ends them."""
        try:
            yield
        except TinychatError:
            raise
        except (RuntimeError, MemoryError) as error:
            self._broken = True
            if self._launched is not None and "onnection" in str(error):
                time.sleep(NOTICED)  # the watch ends this process meanwhile, with a better sentence
            what = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise RanksLost(f"the {self.world.size} ranks are out of step ({what})", "start again") from error
        except BaseException:
            self._broken = True
            raise


def load_part(
    order: Order, world: World, group: Any, progress: Callable[[Progress], None] | None = None
) -> tuple[Ready | None, Loading]:
    """Load this rank's part, or say why not. On one machine's CPU the parts' sums go through memory."""
    import torch

    from tinychat import load

    on_cpu = _is_for_cpu(order.placement)
    if progress is not None and on_cpu and build.waits_for_compiler(cache_folder()):
        progress(Progress("", "compile", 0, 1))
    members = LocalRanks.of(group, wanted=on_cpu)  # by all alike, before anything can fail
    try:
        placement = world.placed(order.placement, usable_cores())
        if placement.main_device.type == "cuda":
            torch.cuda.set_device(placement.main_device)
        elif placement.threads is not None:
            torch.set_num_threads(placement.threads)
        folder = load.resolve(order.model_id, order.revision)
        ready = load.load_folder(
            folder, placement, context=order.context, chunk=order.chunk, rows=order.rows, template=order.template,
            progress=progress, group=members,
        )  # fmt: skip
    except TinychatError as error:
        return None, Loading((error.message, error.remedy, error.exit_code))
    return ready, Loading(None, fingerprint(folder))


def _is_for_cpu(placement: Placement) -> bool:
    try:
        return placement.main_device.type == "cpu"
    except TinychatError:  # said where the model is loaded
        return False


def fingerprint(folder: Path) -> str:
    """What tells one model folder from another: its configs, and the names and sizes of its files of weights."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in KINDS and path.is_file()):
        found.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        if path.name == "config.json":
            found.update(path.read_bytes())
    return found.hexdigest()


def check_loading(found: list[Loading]) -> None:
    """Raises the error of the first rank that has one, and ModelError where a rank has other weights than rank 0."""
    for rank, one in enumerate(found):
        if one.error is not None:
            message, remedy, code = one.error
            wrong = TinychatError(message if rank == 0 else f"rank {rank}: {message}", remedy)
            wrong.exit_code = code
            raise wrong
    for rank, one in enumerate(found):
        if one.weights != found[0].weights:
            message = f"rank {rank} has loaded other weights than rank 0"
            raise ModelError(message, "put the same model folder on every machine")
