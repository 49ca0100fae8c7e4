"""The last stage: a new checkpoint is measured against its original, and the quality card is written into its folder.

Each model is measured whole, as floats, where memory allows; else all of them side by side, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tinychat import load
from tinychat.checkpoint import EMBEDDINGS
from tinychat.core import Progress
from tinychat.engine.engine import Engine
from tinychat.eval.card import TEXT_ONLY, Making, Note, Subject, card_in_making, sees
from tinychat.inputs.processor import Processor
from tinychat.placement import Placement
from tinychat.quantize.card_plan import LAYERS, plan_of
from tinychat.quantize.facts import title_of
from tinychat.quantize.job import Job, Source
from tinychat.quantize.layered import Layered, base_side, nearest_side, packed_side, weights_of
from tinychat.quantize.nearest import round_to_nearest
from tinychat.quantize.plan import size

TOO_LARGE = (
    "The models were compared a layer at a time, on given tokens: a whole one takes {size} of memory, more than the "
    "run was allowed. Answers of their own and probes are left out; for these, where there is more memory: "
    "tinychat eval {out} --against {model} --card."
)


class CardStage:
    """How a job's card is made: `how` is a dtype's name, or LAYERS."""

    def __init__(self, job: Job, source: Source, how: str, whole: int) -> None:
        self.job, self.source, self.how, self.whole = job, source, how, whole
        self.device = torch.device(job.device)
        self.processor = Processor.from_folder(job.folder, source.config, job.calibration.template)
        self.plan = plan_of(self.processor, job.card_samples)
        bits = job.spec.bits
        self.titles = {
            "base": title_of("", 8 * source.index.dtype(EMBEDDINGS).itemsize),
            "nearest": title_of("rtn", bits),
            "quantized": title_of(job.method, bits, job.pseudo),
        }

    def events(self, folder: Path, work: Path, facts: Mapping[str, Any]) -> Iterator[Progress | Note]:
        """Write the card of the checkpoint in `folder`; `work` is a folder for what is needed on the way."""
        making = self._in_layers(folder, work, facts) if self.how == LAYERS else self._of_whole(folder, facts)
        found = yield from making
        found.write(folder)

    def _of_whole(self, folder: Path, facts: Mapping[str, Any]) -> Making:
        base = Subject(self.titles["base"], lambda: self._engine(self.job.folder), weights_of(self.source.index))
        quantized = Subject(self.titles["quantized"], lambda: self._engine(folder))
        nearest = Subject(self.titles["nearest"], self._rounded) if self.job.method != "rtn" else None
        return card_in_making(base, quantized, nearest, plan=self.plan, facts=facts)

    def _engine(self, folder: Path) -> Engine:
        """A model in the dtype of all, no weight packed."""
        opened = load.open_source(folder)
        placement = Placement(self.how, self.device, dequantize=True)
        processor = Processor.from_folder(folder, opened.config, self.job.calibration.template)
        return Engine(load.assemble(opened, placement), processor)

    def _rounded(self) -> Engine:
        engine = self._engine(self.job.folder)
        round_to_nearest(engine.model, self.job.spec)  # type: ignore[arg-type]  # what assemble has made
        return engine

    def _in_layers(self, folder: Path, work: Path, facts: Mapping[str, Any]) -> Making:
        base = base_side(self.source, self.device, self.titles["base"])
        sides = {"base": base}
        if self.job.method != "rtn":
            sides["nearest"] = nearest_side(base, self.job.spec, self.titles["nearest"])
        sides["quantized"] = packed_side(folder, self.device, self.titles["quantized"])
        return Layered(sides, self.processor, self.plan, work).making(self.device, facts, self._left_out)

    @property
    def _left_out(self) -> tuple[str, ...]:
        name = self.job.name or self.job.folder.name
        told = TOO_LARGE.format(size=size(self.whole), out=self.job.out.name, model=name)
        return (told,) if sees(self.processor) else (told, TEXT_ONLY)
