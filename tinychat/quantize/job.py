"""What is to be quantized and how; the source, opened and checked before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from awq.errors import AwqError
from awq.options import Options
from tinychat import checkpoint, load
from tinychat.checkpoint import Index
from tinychat.config import VilaConfig
from tinychat.errors import ModelError, UsageError
from tinychat.search_results import SearchResults, check_search, read_search
from tinychat.weight_files import Entry
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import HALVES, QuantSpec

Method = Literal["awq", "rtn"]
METHODS = ("awq", "rtn")
Vision = Literal["16bit", "w8a8"]
VISIONS = ("16bit", "w8a8")
LAYER = re.compile(r"llm\.model\.layers\.(\d+)\.(.+)")
TOWER_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.(.+)")
SPARED = {  # layout -> modules that stay in 16 bit, as the config of the checkpoint names them
    "vila": ("vision_tower", "mm_projector", "lm_head"),
    "llava": ("vision_tower", "mm_projector", "lm_head"),
    "llava_hf": ("vision_tower", "multi_modal_projector", "lm_head"),
    "text": ("lm_head",),
}


@dataclass(frozen=True)
class Calibration:
    """Which data the search looks at: sources (the generated set where there are none), sequences, tokens in each."""

    sources: tuple[str, ...] = ()
    samples: int = 64
    seqlen: int = 512
    seed: int = 0
    template: str | None = None

    def __post_init__(self) -> None:
        if min(self.samples, self.seqlen) < 1:
            raise UsageError(f"{self.samples} samples of {self.seqlen} tokens are asked for", "give 1 or more of both")
        if self.samples < len(self.sources):
            message = f"{len(self.sources)} calibration sources are given for {self.samples} samples"
            raise UsageError(message, "give a --calib-samples of at least one for each --calib")


@dataclass(frozen=True)
class Job:
    """A folder to read, a folder to write, and how. `name` is what the facts call the model (none: as its folder).

    `search` are fields of awq.quantize.Options. `search_results` is a file of llm-awq's, which stands for a search.
    `threads` of the CPU (none: torch decides, or the work that goes on). `card_samples` are held-out dialogues, texts
    and probes of each kind (none: as card_plan says).
    """

    folder: Path
    out: Path
    name: str = ""
    method: Method = "awq"
    vision: Vision = "16bit"
    spec: QuantSpec = field(default_factory=QuantSpec)
    pseudo: bool = False
    search: Mapping[str, Any] = field(default_factory=dict[str, Any])
    search_results: Path | None = None
    calibration: Calibration = Calibration()
    device: str = "cpu"
    threads: int | None = None
    max_ram: int | None = None
    max_disk: int | None = None
    card: bool = True
    card_samples: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method is {self.method!r}", f"give {' or '.join(METHODS)}")
        if self.vision not in VISIONS:
            raise UsageError(f"--vision is {self.vision!r}", f"give {' or '.join(VISIONS)}")
        if self.vision == "w8a8" and self.pseudo:
            raise UsageError(
                "--pseudo writes 16-bit weights, and --vision w8a8 asks for 8-bit ones", "give one of them"
            )
        try:
            self.search_options()
        except AwqError as error:
            raise UsageError(error.message, error.remedy) from error
        if self.search_results is not None:
            self._check_given()
        if self.spec.bits != 4 and not self.pseudo:
            message = f"no checkpoint of the awq format holds {self.spec.bits}-bit weights"
            raise UsageError(message, "give --bits 4, or --pseudo for 16-bit weights that stand for them")
        if self.card_samples is not None:
            self._check_samples(self.card_samples)
        if self.out.exists() and self.out.resolve() == self.folder.resolve():
            raise UsageError(f"{self.out} is the model itself", "give another folder to write")

    def _check_samples(self, samples: int) -> None:
        if samples < 1:
            raise UsageError(f"--card-samples is {samples}", "give 1 or more, or --no-card")
        if not self.card:
            message = f"--no-card makes no card, and --card-samples {samples} is given as well"
            raise UsageError(message, "give one of the two")

    def _check_given(self) -> None:
        """Raise UsageError for what would have no say beside search results."""
        usual = Options()
        idle = [f"--{name.replace('_', '-')}" for name, value in self.search.items() if value != getattr(usual, name)]
        given, default = self.calibration, Calibration()
        idle += ["--calib"] if given.sources else []
        idle += ["--calib-samples"] if given.samples != default.samples else []
        idle += ["--calib-seqlen"] if given.seqlen != default.seqlen else []
        idle += [f"--method {self.method}"] if self.method != "awq" else []
        if idle:
            message = f"search results say how weights are scaled and clipped, and {idle[0]} is given as well"
            raise UsageError(message, "give one of the two")

    @property
    def partial(self) -> Path:
        """Where the work lies until it is complete."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def procedure(self) -> str:
        """What is done with a layer, by its name in blocks.METHODS."""
        return self.method if self.search_results is None else "given"

    @property
    def searches(self) -> bool:
        """Whether the method looks at calibration data."""
        return self.method == "awq" and self.search_results is None

    def search_options(self) -> Options:
        """What the search is told; scales are float16, as in any checkpoint of the awq format."""
        return Options(spec=self.spec, dtype=torch.float16, **self.search)

    @property
    def options(self) -> dict[str, Any]:
        """Everything that decides about the result, but the model and the data."""
        searched: dict[str, Any] = {}
        if self.search_results is not None:
            searched = {"search_results": self.search_results.name}
        if self.searches:
            given = self.search_options()
            kept = [field.name for field in fields(given) if field.name not in ("spec", "dtype")]
            searched = {name: getattr(given, name) for name in kept}
        return {"method": self.method, "vision": self.vision, **asdict(self.spec), "pseudo": self.pseudo, **searched}


@dataclass(frozen=True)
class Source:
    """An opened model: its config, its tensors by the names in memory, and all of them by their names on disk.

    `given`: what a search found before, checked against the model. `int8` names the tower's 8-bit linears.
    """

    folder: Path
    config: VilaConfig
    index: Index
    raw: Index
    given: SearchResults | None = None
    int8: frozenset[str] = frozenset()

    @property
    def layers(self) -> int:
        return self.config.text.num_hidden_layers

    def layer(self, i: int) -> Index:
        """The tensors of a decoder layer, named from there."""
        return part(self.index, f"llm.model.layers.{i}.")

    def stored(self, entry: Entry) -> torch.dtype:
        """The dtype that a tensor is written in: its own, 16 bit for wider floats."""
        wide = entry.dtype.is_floating_point and entry.dtype not in HALVES
        return torch.float16 if wide else entry.dtype

    def stored_in(self, index: Index) -> dict[str, torch.dtype]:
        """The same of every tensor of an index."""
        return {name: self.stored(index.entry(name)) for name in index.names()}


def tower_layer(i: int) -> str:
    """The beginning of the names of a tower's layer."""
    return f"vision_tower.vision_model.encoder.layers.{i}."


def spared(job: Job, layout: str) -> tuple[str, ...]:
    """The modules that stay in 16 bit."""
    return tuple(name for name in SPARED[layout] if not (name == "vision_tower" and job.vision == "w8a8"))


def part(index: Index, prefix: str) -> Index:
    """The tensors under a prefix, named from there. A new index: what it maps is given back with it."""
    names = [name for name in index.names() if name.startswith(prefix)]
    return Index({name.removeprefix(prefix): index.entry(name) for name in names})


def open_job(job: Job) -> Source:
    """The source of a job. Raises ModelError for weights that are missing, quantized already, or of unfitting sizes.

    Raises FormatError and ModelError for search results that are none, or another model's.
    """
    opened = load.open_source(job.folder)
    if opened.spec is not None:
        raise ModelError(f"{job.folder} is quantized to {opened.spec.bits} bits already", "give the 16-bit model")
    if opened.int8:
        raise ModelError(f"the vision tower of {job.folder} is quantized to 8 bits already", "give the 16-bit model")
    config = opened.config
    if job.vision == "w8a8":
        _check_tower(job, config)
    given = None if job.search_results is None else read_search(job.search_results)
    source = Source(job.folder, config, opened.index, load.open_index(job.folder, config), given)
    empty = load.empty_model(config, torch.float32)
    checkpoint.compare(empty, opened.index, config.layout).check()
    for name, (rows, columns) in linears(source).items():
        try:
            if job.pseudo:  # nothing is packed
                job.spec.group(columns)
            else:
                job.spec.check(in_features=columns, out_features=rows)
        except LayoutError as error:
            raise ModelError(f"{name} cannot be quantized: {error}", "choose another group size") from error
    if given is not None:
        check_search(given, empty, source.layers, job.spec)
    return source


def _check_tower(job: Job, config: VilaConfig) -> None:
    """Raise ModelError where no config of the layout can say that the tower is in 8 bits beside a 4-bit decoder."""
    if config.vision is None:
        raise ModelError(f"{job.folder} has no vision tower", "leave out --vision w8a8")
    if config.layout != "vila" or not (job.folder / "vision_tower" / "config.json").is_file():
        message = "a config.json for decoder and tower together cannot say that one is awq and the other w8a8"
        remedy = "quantize a VILA folder (llm/, vision_tower/, mm_projector/), or leave the tower at --vision 16bit"
        raise ModelError(message, remedy)


def linears(source: Source) -> dict[str, tuple[int, int]]:
    """The weights that are quantized, by their names in memory, with their shapes (outputs, inputs)."""
    found: dict[str, tuple[int, int]] = {}
    for name in source.index.names():
        shape = source.index.shape(name)
        if LAYER.fullmatch(name) and name.endswith(".weight") and len(shape) == 2:
            found[name] = (shape[0], shape[1])
    return found
