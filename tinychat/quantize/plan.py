"""What a quantization will take: memory, disk and time, from headers, the calibration's lengths and short probes.

The run is held to it: what does not fit is spilled to the disk or streamed, or refused before anything is written.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from tinychat import planner
from tinychat.errors import CapacityError
from tinychat.quantize import room
from tinychat.quantize.calibration import Data
from tinychat.quantize.card_plan import NONE, CardCost, Costs
from tinychat.quantize.job import Job, Source, linears, part, spared
from tinychat.quantize.room import FLOAT, widths
from tinychat.quantize.speed import PRODUCT, READING, ROUNDING, seconds_a_unit
from tinychat.quantize.tower import warnings
from tinychat.quantize.writing import PIECE

WORDS_SLACK = 64 * 2**20  # what is imported on the way, and the allocator's slack
ROUNDINGS = 8.0  # of a layer's weights, besides those of the grids: the cost of stand-ins and errors
SUMMED = 0.3  # of a layer's weights are judged by sums over the tokens at each step of the grid
INVERSION = 4.0  # operations a number of the matrix of a linear's inputs and row: two factors and an inverse
FREE_SHARE = 0.9  # of the free memory may be used where --max-ram does not say
COPIED = 4  # pieces of a tensor at once, as it is copied
TABLES = 4 * 2**20  # bytes of the manifest, configs and the log
CARD = "card"  # among the stages
PARTS = ("work_device", "work_disk", "card_device", "card_disk")
NO_CARD = "give --no-card (tinychat eval OUT --against MODEL --card makes one later)"
_measured = functools.cache(seconds_a_unit)  # once a process


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds, and how the run keeps to them. `ram` are the peaks of its stages, the process included.

    `least_ram` is what the work takes with the shortest calibration. `card` is how the quality card is made: of whole
    models in the dtype of that name, in layers, or none; `card_whole` the bytes that a whole model takes.
    """

    layers: int
    linears: int
    weights: int
    spared: tuple[str, ...]
    sequences: int
    tokens: int
    pictures: int
    ram: Mapping[str, int]
    least_ram: int
    ram_limit: int
    work_device: int
    device_limit: int
    work_disk: int
    disk_limit: int
    output: int
    seconds: float
    hold: bool
    stream: bool
    card: str = NONE
    card_whole: int = 0
    card_device: int = 0
    card_disk: int = 0
    card_seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def peak_ram(self) -> int:
        return max(self.ram.values())

    @property
    def device(self) -> int:
        """Bytes of the GPU's memory, none on a CPU."""
        return max(self.work_device, self.card_device)

    @property
    def disk(self) -> int:
        return max(self.work_disk, self.card_disk)

    def check(self, out: Path) -> None:
        """Raise CapacityError where memory or disk do not suffice."""
        work_ram = max(count for stage, count in self.ram.items() if stage != CARD)
        ram_remedy = f"allow {enough(work_ram)} with --max-ram, or free memory"
        if self.least_ram <= self.ram_limit:
            ram_remedy += ", or give a shorter --calib-seqlen"
        disk_remedy = "allow more with --max-disk, free some, or give fewer --calib-samples"
        device_remedy = "give --device cpu, or fewer --loss-tokens"
        _check("of memory are needed and", work_ram, self.peak_ram, self.ram_limit, ram_remedy)
        _check("of the device's memory are needed and", self.work_device, self.device, self.device_limit, device_remedy)
        _check(f"are needed on the disk of {out},", self.work_disk, self.disk, self.disk_limit, disk_remedy)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        rows = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in PARTS}
        totals = {"peak_ram": self.peak_ram, "device": self.device, "disk": self.disk}
        return {**rows, **totals, "ram": dict(self.ram), "spared": list(self.spared), "warnings": list(self.warnings)}


def _check(what: str, work: int, needed: int, limit: int, remedy: str) -> None:
    """Raise CapacityError where a limit is passed; a quality card that alone passes it may be left out."""
    if needed <= limit:
        return
    message = f"{size(needed)} {what} {size(limit)} are allowed or free"
    if work <= limit:
        message, remedy = f"{message}, while {size(work)} would do without the quality card", f"{NO_CARD}, or {remedy}"
    raise CapacityError(message, remedy)


def make_plan(job: Job, source: Source, data: Data | None) -> Plan:
    """The plan of a job; `data` is None where the method needs none."""
    shapes = linears(source)
    tokens = sum(data.lengths) if data else 0
    states = FLOAT * tokens * source.config.text.hidden_size
    limit = job.max_ram or int(FREE_SHARE * (planner.free_bytes(torch.device("cpu")) + resident()))
    base = resident() + WORDS_SLACK
    block = base + room.block_bytes(job, source, max(data.lengths) if data else 0)
    hold = block + 2 * states <= limit
    fronts = {stream: base + room.front_bytes(source, data, stream) for stream in (False, True)}
    front = states if hold else 0
    eyes = room.tower_features(job, source, data)
    stream = fronts[False] + front > limit
    ram = {
        "calibration": fronts[stream] + front,
        "layers": block + (2 * states if hold else 0),
        "output": base + 4 * PIECE,
    }
    if job.vision == "w8a8":
        ram["tower"] = base + room.tower_block_bytes(source, data)
    output = room.output_bytes(job, source)
    cuda = job.device.startswith("cuda")
    plan = Plan(
        layers=source.layers,
        linears=len(shapes),
        weights=sum(rows * columns for rows, columns in shapes.values()),
        spared=spared(job, source.config.layout),
        sequences=len(data.prompts) if data else 0,
        tokens=tokens,
        pictures=data.pictures if data else 0,
        ram=ram,
        least_ram=base + room.least_bytes(job, source, data),
        ram_limit=limit,
        work_device=max(block, fronts[stream], ram.get("tower", 0)) - base + planner.CUDA_CONTEXT if cuda else 0,
        device_limit=planner.free_bytes(torch.device(job.device)) if cuda else 0,
        work_disk=output
        + room.layer_bytes(job, source)
        + room.tower_bytes(job, source)
        + max(2 * states, 2 * eyes, output)
        + TABLES,
        disk_limit=min(job.max_disk or 2**62, shutil.disk_usage(_existing(job.out)).free + room.kept_bytes(job)),
        output=output,
        seconds=seconds(job, source, data),
        hold=hold,
        stream=stream,
        warnings=warnings(job, data),
    )
    if not job.card:
        return plan
    device_room = plan.device_limit - planner.CUDA_CONTEXT if cuda else 0
    return with_card(plan, job, costs(job, source).best(limit - base, device_room))


def costs(job: Job, source: Source) -> Costs:
    """What the ways to make the card take."""
    vision = source.config.vision
    tiles = source.config.tiles_per_image
    return Costs(job, source, tiles * room.picture_bytes(vision) if vision is not None else 0)


def with_card(plan: Plan, job: Job, card: CardCost) -> Plan:
    """The plan, the quality card made in that way."""
    base = resident() + WORDS_SLACK
    spent = card.products * _measured(PRODUCT, job.device) + card.streamed * _measured(READING, job.device)
    ram = {name: count for name, count in plan.ram.items() if name != CARD}
    return replace(
        plan,
        ram=ram if card.how == NONE else {**ram, CARD: base + card.ram},
        card_device=card.device + planner.CUDA_CONTEXT if card.device else 0,
        card_disk=plan.output + card.disk + TABLES,
        seconds=plan.seconds - plan.card_seconds + spent,
        card=card.how,
        card_whole=card.whole,
        card_seconds=spent,
    )


def resident() -> int:
    """Bytes of memory that this process has now."""
    return psutil.Process().memory_info().rss


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


# Time


def seconds(job: Job, source: Source, data: Data | None) -> float:
    """An estimate: multiplications at the speed of one that is timed, roundings likewise."""
    weights = sum(rows * columns for rows, columns in linears(source).values())
    spent = 3 * source.index.total_bytes / 2**29  # reading, hashing, writing
    if data is None:
        return spent + weights * _measured(ROUNDING, job.device)
    options = job.search_options()
    grid, clips = options.scale_grid, (options.clip_grid * options.max_shrink + 1) * options.clip
    tokens, sample = sum(data.lengths), min(sum(data.lengths), options.loss_tokens or 2**62)
    passes = tokens * 2 + sample * (grid + 2)
    sums = options.sketch_rows * (2 + SUMMED * grid) + max(job.spec.group_size, 32) * clips
    products = 2 * weights * (passes + sums) + _vision_flops(source, data) * (3 if job.vision == "w8a8" else 1)
    if options.compensate:
        products += _compensation_flops(source, tokens)
    rounds = weights * (grid + clips + ROUNDINGS)
    return spent + products * _measured(PRODUCT, job.device) + rounds * _measured(ROUNDING, job.device)


def _compensation_flops(source: Source, tokens: int) -> float:
    """Products of all inputs of a linear, their inverse and its factor, and what each rounding changes in the rest."""
    inputs = [*widths(source), source.config.text.hidden_size]
    products = source.layers * sum(2 * tokens * width**2 + INVERSION * width**3 for width in inputs)
    return products + sum(rows * columns**2 for rows, columns in linears(source).values())


def _vision_flops(source: Source, data: Data) -> int:
    vision = source.config.vision
    if vision is None:
        return 0
    tower = part(source.index, "vision_tower.")
    numbers = sum(tower.entry(name).nbytes // tower.entry(name).dtype.itemsize for name in tower.names())
    return 2 * numbers * vision.num_features * data.pictures * source.config.tiles_per_image


def size(count: int) -> str:
    """Bytes in words."""
    unit, name = _unit(count)
    return f"{count / unit:.1f} {name}"


def enough(count: int) -> str:
    """Bytes as a user may write them, not fewer."""
    unit, name = _unit(count)
    return f"{math.ceil(10 * count / unit) / 10:.1f}{name}"


def _unit(count: int) -> tuple[int, str]:
    return next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if count >= u), (1024, "KiB"))
