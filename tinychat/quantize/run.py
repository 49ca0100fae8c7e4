"""The whole way from one folder to another, as a stream of events; killed at any moment, it goes on where it was."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from awq.errors import AwqError
from awq.save import MANIFEST, Part, SaveError, Work, atomic
from tinychat.config import read_json
from tinychat.core import Progress
from tinychat.errors import CapacityError, ModelError, TinychatError, UsageError
from tinychat.eval.card import Note
from tinychat.inputs.processor import Processor
from tinychat.quantize.blocks import METHODS, Blocks, to_disk
from tinychat.quantize.calibration import Data, gather
from tinychat.quantize.card import CardStage
from tinychat.quantize.card_plan import NONE
from tinychat.quantize.embedding import Embedder
from tinychat.quantize.facts import FACTS, facts_of, for_card
from tinychat.quantize.fingerprint import files_of, fingerprint, hash_files
from tinychat.quantize.finite import checked_weights
from tinychat.quantize.job import Job, open_job
from tinychat.quantize.output import BLOCK, LOG, assemble, block_name, publish
from tinychat.quantize.plan import Plan, costs, make_plan, with_card
from tinychat.quantize.states import States, writing
from tinychat.quantize.tower import TowerLayerDone, TowerStage, check_pictures, with_tower

STATES = "states-"
OUTPUT = "out"
CARD = "card"
LOCK = "lock"
KEPT = "the work so far is kept: mend that, and run the same command with --resume"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Began:
    """What will be done, and how many layers are done already."""

    plan: Plan
    done: int


@dataclass(frozen=True)
class LayerDone:
    """Layer `index` of `total` is on the disk. `loss` is that of its output, rounded to nearest and searched.

    `left` are the seconds until all is done, the quality card included.
    """

    index: int
    total: int
    kept: str
    loss: dict[str, float] | None
    seconds: float
    left: float


@dataclass(frozen=True)
class Written:
    """The checkpoint is complete."""

    out: Path
    facts: dict[str, Any] = field(repr=False)


Event = Began | Progress | Note | TowerLayerDone | LayerDone | Written


class Run:
    """One job, from where its work stands."""

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.source = open_job(job)
        self.processor: Processor | None = None
        self.data: Data | None = None
        if job.searches:
            self.processor = Processor.from_folder(job.folder, self.source.config, job.calibration.template)
            self.data = gather(job.calibration, self.processor)
            check_pictures(job, self.data)
        self.plan = make_plan(job, self.source, self.data)

    def events(self, resume: bool = False) -> Iterator[Event]:
        """Do it. Raises UsageError where there is work or a result already, CapacityError where something lacks."""
        with explained(self.job):
            if resume and (self.job.out / FACTS).is_file():
                yield from self._already()
                return
            refuse(self.job, resume)
            self.plan.check(self.job.out)
            if not (self.job.partial / MANIFEST).exists():
                yield from self._checked()
            with locked(self.job.partial):
                yield from self._work()

    def _already(self) -> Iterator[Event]:
        """The result is there: what is left is to see that it is this job's, and to clean up."""
        made = Work(self.job.out, read_json(self.job.out / FACTS)["fingerprint"])
        made.check((yield from self._fingerprint(made)))
        yield Written(self.job.out, _finish(self.job))

    def _checked(self) -> Iterator[Progress]:
        """Look at every weight. Raises ModelError, before anything is written, where one is no number."""
        names = checked_weights(self.job, self.source)
        for done, _ in enumerate(names, 1):
            yield Progress("", "check", done, len(self.source.raw.names()))

    def _work(self) -> Iterator[Event]:
        work = yield from self._opened()
        self._keep_way(work)
        done = sum(name.startswith(BLOCK) for name in work.parts)
        self._log(f"begins with {done} of {self.plan.layers} layers done; {json.dumps(self.plan.to_json())}")
        yield Began(self.plan, done)
        if self.job.vision == "w8a8":
            yield from self._tower(work)
        states: States | None = None
        if self.data is not None and done < self.plan.layers:
            states = yield from self._states(work, done)
        yield from self._layers(work, done, states)
        folder = self.job.partial / OUTPUT
        assemble(self.job, self.source, work, folder)
        yield from self._card(work, folder)
        self._log("complete")
        with atomic(folder / FACTS) as file:
            file.write(json.dumps(facts_of(self.job, self.source.config.layout, self.data, work), indent=1).encode())
        shutil.copyfile(self.job.partial / LOG, folder / LOG)
        publish(folder, self.job.out)
        yield Written(self.job.out, _finish(self.job))

    def _opened(self) -> Generator[Progress, None, Work]:
        """The work on the disk, begun, or checked against this job."""
        if not (self.job.partial / MANIFEST).exists():
            return Work.begin(self.job.partial, (yield from self._fingerprint(None)))
        work = Work.resume(self.job.partial)
        work.check((yield from self._fingerprint(work)))
        return work

    def _keep_way(self, work: Work) -> None:
        """The card is made in the way that was planned when the work began: another one gives other figures."""
        if not self.job.card:
            return
        if (way := work.notes.get(CARD)) is None:
            work.commit({}, card=self.plan.card)
        elif way != self.plan.card:
            self.plan = with_card(self.plan, self.job, costs(self.job, self.source).of(way))
            self.plan.check(self.job.out)

    def _card(self, work: Work, folder: Path) -> Iterator[Event]:
        """Measure the checkpoint in a folder, and put its card there."""
        if self.plan.card == NONE:
            return
        start = time.perf_counter()
        facts = for_card(facts_of(self.job, self.source.config.layout, self.data, work))
        stage = CardStage(self.job, self.source, self.plan.card, self.plan.card_whole)
        try:
            for event in stage.events(folder, self.job.partial / CARD, facts):
                if isinstance(event, Note):
                    self._log(event.text)
                yield event
        except TinychatError as error:
            flags = "--resume --no-card"
            if self.job.card_samples is not None:
                flags = "--resume, and with --no-card in place of --card-samples"
            remedy = f"{error.remedy}; or have the checkpoint without a card, by the same command with {flags}"
            raise type(error)(f"the quality card cannot be made: {error.message}", remedy) from error
        work.commit({}, card_s=time.perf_counter() - start)

    def _fingerprint(self, begun: Work | None) -> Generator[Progress, None, dict[str, Any]]:
        """What decides about the result; it is computed on as many threads as the work was begun with."""
        if begun is not None:
            self._take_threads(begun)
        files, hashes = files_of(self.job, self.source), dict[str, str]()
        for name, digest in hash_files(files):
            hashes[name] = digest
            yield Progress("", "load", len(hashes), len(files))
        return fingerprint(self.job, hashes, self.data.sha256 if self.data else None)

    def _take_threads(self, begun: Work) -> None:
        """Compute on as many as before, since sums depend on how they are split. Raises UsageError for others."""
        before = int(begun.fingerprint["machine"]["threads"])
        if self.job.threads not in (None, before):
            threads = "1 CPU thread" if before == 1 else f"{before} CPU threads"
            message = (
                f"the work in {begun.folder} was computed on {threads}, which its last bits depend on, and "
                f"--threads {self.job.threads} is given"
            )
            raise UsageError(message, f"leave --threads out, or give --threads {before}")
        torch.set_num_threads(before)

    def _tower(self, work: Work) -> Iterator[Event]:
        for event in TowerStage(self.job, self.source, self.processor, self.data).events(work):
            if isinstance(event, TowerLayerDone):
                self._log(json.dumps(asdict(event)))
            yield event

    def _states(self, work: Work, done: int) -> Generator[Progress, None, States]:
        """The hidden states before layer `done`: from the work, or (for the first) from the calibration."""
        name = f"{STATES}{done:05d}"
        if name in work.parts:
            states = States.of(work.parts[name], work.folder)
            return states.hold() if self.plan.hold else states
        assert self.data is not None and self.processor is not None
        start = time.perf_counter()
        source = with_tower(self.source, work)
        embedder = Embedder(source, self.processor, torch.device(self.job.device), self.plan.stream)
        with writing(work.path(name, ".bin"), self.plan.hold) as sink:
            for i, sequence in enumerate(embedder.embed(self.data.prompts, self.data.seqlen)):
                sink.add(i, sequence)
                yield Progress("", "vision", i + 1, self.plan.sequences)
        work.commit({name: sink.part()}, calibration_s=time.perf_counter() - start)
        return sink.states()

    def _layers(self, work: Work, done: int, states: States | None) -> Iterator[Event]:
        blocks, spent = Blocks(self.source, torch.device(self.job.device)), list[float]()
        if done < self.plan.layers:
            yield Progress("", "quantize", done, self.plan.layers)  # the first layer may take minutes
        for i in range(done, self.plan.layers):
            facts, states = self._layer(work, blocks, i, states)
            spent.append(facts["seconds"])
            left = sum(spent) / len(spent) * (self.plan.layers - i - 1) + self.plan.card_seconds
            event = LayerDone(i, self.plan.layers, facts["kept"], facts.get("loss"), spent[-1], left)
            self._log(json.dumps(asdict(event)))
            yield event

    def _layer(self, work: Work, blocks: Blocks, i: int, states: States | None) -> tuple[dict[str, Any], States | None]:
        """Quantize layer i and let it count, together with the states that the next one sees."""
        start = time.perf_counter()
        block, method = blocks.open(i), METHODS[self.job.procedure]
        following, parts, outputs = f"{STATES}{i + 1:05d}", dict[str, Part](), None
        if states is None or i + 1 == self.plan.layers:
            inputs = () if states is None else states.on(blocks.device)
            quantized = method(self.job, blocks, block, i, inputs, None)
        else:
            with writing(work.path(following, ".bin"), self.plan.hold) as sink:
                quantized = method(self.job, blocks, block, i, states.on(blocks.device), sink.add)
            outputs, parts[following] = sink.states(), sink.part()
        tensors = to_disk(quantized, self.job, self.source, i)
        facts = {**quantized.facts, "seconds": time.perf_counter() - start}
        parts[block_name(i)] = work.write(block_name(i), tensors, facts)
        work.commit(parts, drop=[f"{STATES}{i:05d}"])
        return facts, outputs

    def _log(self, line: str) -> None:
        with (self.job.partial / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def refuse(job: Job, resume: bool) -> None:
    """Raise UsageError where a result stands in the way, or work that nobody asked to resume."""
    if job.out.exists():
        raise UsageError(f"{job.out} exists", "give another folder to write, or remove it")
    if (job.partial / MANIFEST).exists() and not resume:
        remedy = "give --resume to go on with it, or remove it"
        raise UsageError(f"{job.partial} holds the work of an earlier run", remedy)


@contextmanager
def explained(job: Job) -> Iterator[None]:
    """Errors of the quantizer and of the system become ours; the work so far is kept in any case."""
    try:
        yield
    except SaveError as error:
        raise UsageError(error.message, error.remedy) from error
    except AwqError as error:
        raise ModelError(error.message, error.remedy) from error
    except torch.OutOfMemoryError as error:
        message = "the device's memory is full; the work so far is kept"
        raise CapacityError(message, "run it again with --resume once it is free, or anew with --device cpu") from error
    except OSError as error:
        if error.errno in FULL:
            message = f"the disk of {job.partial} is full; the work so far is kept there"
            raise CapacityError(message, "free some of it, and run it again with --resume") from error
        message = f"{error.filename or job.partial} cannot be written or read: {error.strerror or error}"
        raise UsageError(message, KEPT if _begun(job) else "mend that, or give another folder to write") from error


def _begun(job: Job) -> bool:
    try:
        return (job.partial / MANIFEST).is_file()
    except OSError:
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time works in a folder. Raises UsageError where another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            lock(file)
        except BlockingIOError as error:
            raise UsageError(f"another run works in {folder}", "wait for it, or stop it") from error
        yield


def lock(file: IO[str]) -> None:
    """Take the lock of a file until it is closed, or the process ends. Raises BlockingIOError."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _finish(job: Job) -> dict[str, Any]:
    """Remove the work, whose result stands; returns the facts."""
    shutil.rmtree(job.partial, ignore_errors=True)
    return read_json(job.out / FACTS)
