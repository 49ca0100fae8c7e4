"""What a quantization will take: memory, disk and time, from headers, the calibration's lengths and short probes.

The run is held to it: what does not fit is spilled to the disk or streamed, or refused before anything is written.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from awq.smooth import SmoothOptions
from tinychat import planner
from tinychat.config import VisionConfig
from tinychat.errors import CapacityError
from tinychat.quantize.calibration import Data
from tinychat.quantize.card_plan import NONE, CardCost, Costs
from tinychat.quantize.job import LAYER, TOWER_LAYER, Job, Source, linears, part, spared
from tinychat.quantize.speed import PRODUCT, READING, ROUNDING, seconds_a_unit
from tinychat.quantize.tower import warnings
from tinychat.quantize.writing import PIECE
from tinychat.weight_files import Entry

FLOAT = 4  # bytes of a number while it is computed with
WORDS_SLACK = 64 * 2**20  # what is imported on the way, and the allocator's slack
COPIES = 4.5  # of a layer in float32: as it came, installed, rounded in two ways, and as tensors for the disk
TOWER_COPIES = 2  # of a layer of the tower in float32: as it came, and in 8 bits twice over with what is on its way
TOWER_LARGEST = 6  # further copies of its largest linear, while it is scaled and rounded
LARGEST = 4.0  # further copies of its largest linear, while rounding it is tried
ROUNDINGS = 8.0  # of a layer's weights, besides those of the grids: the cost of stand-ins and errors
SUMMED = 0.3  # of a layer's weights are judged by sums over the tokens at each step of the grid
INVERTED = 4.0  # matrices of a linear's inputs at once, while they are inverted and factored
INVERSION = 4.0  # operations a number of such a matrix and row: two factors and an inverse
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

    `card` is how the quality card is made: of whole models in the dtype of that name, in layers, or none;
    `card_whole` the bytes that a whole model takes.
    """

    layers: int
    linears: int
    weights: int
    spared: tuple[str, ...]
    sequences: int
    tokens: int
    pictures: int
    ram: Mapping[str, int]
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
        ram_remedy = "allow more with --max-ram, free memory, or give a shorter --calib-seqlen"
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
    block = base + block_bytes(job, source, data)
    hold = block + 2 * states <= limit
    fronts = {stream: base + front_bytes(source, data, stream) for stream in (False, True)}
    front = states if hold else 0
    eyes = tower_features(job, source, data)
    stream = fronts[False] + front > limit
    ram = {
        "calibration": fronts[stream] + front,
        "layers": block + (2 * states if hold else 0),
        "output": base + 4 * PIECE,
    }
    if job.vision == "w8a8":
        ram["tower"] = base + tower_block_bytes(source, data)
    output = output_bytes(job, source)
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
        ram_limit=limit,
        work_device=max(block, fronts[stream], ram.get("tower", 0)) - base + planner.CUDA_CONTEXT if cuda else 0,
        device_limit=planner.free_bytes(torch.device(job.device)) if cuda else 0,
        work_disk=output
        + layer_bytes(job, source)
        + tower_bytes(job, source)
        + max(2 * states, 2 * eyes, output)
        + TABLES,
        disk_limit=min(job.max_disk or 2**62, shutil.disk_usage(_existing(job.out)).free + kept_bytes(job)),
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
    return Costs(job, source, _picture_bytes(vision) if vision is not None else 0)


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


# Memory


def block_bytes(job: Job, source: Source, data: Data | None) -> int:
    """The work on the largest layer, without the states of the calibration."""
    sizes = [FLOAT * _parameters(source, i) for i in range(source.layers)]
    largest = FLOAT * max(rows * columns for rows, columns in linears(source).values())
    work = COPIES * max(sizes) + LARGEST * largest
    return int(work) + (_search_bytes(job, source, max(data.lengths)) if data else 0)


def _search_bytes(job: Job, source: Source, longest: int) -> int:
    """Sums over the tokens, the sequences that modules are run on, and one pass of a sequence through the layer."""
    text, options = source.config.text, job.search_options()
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    widths = _widths(source)
    inputs = [*widths, text.hidden_size]
    sums = sum(width * (min(width, options.sketch_rows) + job.spec.group(width)) for width in inputs)
    if options.compensate:
        sums += sum(width**2 for width in inputs if width > options.sketch_rows) + INVERTED * max(widths) ** 2
    sample = (options.loss_tokens or 2**62) + longest
    sample = min(sample, job.calibration.samples * longest) * 8 * text.hidden_size
    passing = longest * (6 * text.hidden_size + 2 * heads + 4 * text.intermediate_size)
    return int(FLOAT * (sums + sample + passing))


def _widths(source: Source) -> tuple[int, int, int]:
    """Inputs of the linears of a layer: of the first and the gated ones, of attention's last, of the MLP's last."""
    text = source.config.text
    return text.hidden_size, text.num_attention_heads * text.head_dim, text.intermediate_size


def front_bytes(source: Source, data: Data | None, stream: bool) -> int:
    """The tower and the projector, whole or a layer at a time, and what a picture takes in them."""
    vision = source.config.vision
    if not data or not data.pictures or vision is None:
        return FLOAT * source.config.text.hidden_size * 4 * (max(data.lengths) if data else 0)
    tower, projector = (part(source.index, f"{name}.") for name in ("vision_tower", "mm_projector"))
    whole = sum(tower.entry(name).nbytes // tower.entry(name).dtype.itemsize for name in tower.names())
    layers = sum(
        tower.entry(name).nbytes // tower.entry(name).dtype.itemsize for name in tower.names() if ".layers." in name
    )
    kept = whole - layers + 2 * layers // max(1, vision.num_hidden_layers) if stream else whole
    last = sum(projector.entry(name).nbytes // projector.entry(name).dtype.itemsize for name in projector.names())
    return FLOAT * (kept + last) + _picture_bytes(vision)


def tower_block_bytes(source: Source, data: Data | None) -> int:
    """The work on a layer of the tower: as it came, in 8 bits twice, and what judges its scales."""
    vision = source.config.vision
    assert vision is not None
    width, inner, tokens = vision.hidden_size, vision.intermediate_size, vision.num_features + 1
    layer = 4 * width * width + 2 * width * inner
    sample = SmoothOptions().tokens + (data.pictures if data else 0)
    judging = sample * (3 * width + inner + 6 * max(width, inner)) + 2 * width * (sample + tokens)
    return FLOAT * (TOWER_COPIES * layer + TOWER_LARGEST * width * inner + judging) + _picture_bytes(vision)


def tower_features(job: Job, source: Source, data: Data | None) -> int:
    """The pictures' states between two layers of the tower, on the disk."""
    vision = source.config.vision
    if job.vision != "w8a8" or vision is None or data is None:
        return 0
    return FLOAT * data.pictures * (vision.num_features + 1) * vision.hidden_size


def _picture_bytes(vision: VisionConfig) -> int:
    """Activations of one layer of the tower for one picture, with the scores of all heads, and the decoded picture."""
    tokens = vision.num_features + 1
    rows = 8 * vision.hidden_size + 3 * vision.intermediate_size
    return tokens * (rows + vision.num_attention_heads * tokens) * FLOAT + 8 * 3 * vision.image_size**2 * FLOAT


def _parameters(source: Source, i: int) -> int:
    index = source.layer(i)
    return sum(index.entry(name).nbytes // index.entry(name).dtype.itemsize for name in index.names())


# Disk


def layer_bytes(job: Job, source: Source) -> int:
    """The parts of all layers."""
    quantized, total = linears(source), 0
    for name in source.index.names():
        if LAYER.fullmatch(name):
            entry = source.index.entry(name)
            numbers, stored = entry.nbytes // entry.dtype.itemsize, source.stored(entry).itemsize
            packed = name in quantized and not job.pseudo
            total += _packed_bytes(job, *quantized[name]) if packed else numbers * stored
    return total


def tower_bytes(job: Job, source: Source) -> int:
    """The parts of all layers of the tower, where they become 8-bit ones."""
    names = [name for name in source.index.names() if TOWER_LAYER.fullmatch(name)] if job.vision == "w8a8" else []
    return sum(_tower_tensor_bytes(source, name) for name in names)


def _tower_tensor_bytes(source: Source, name: str) -> int:
    """A byte a weight and a float32 scale a row; what is no matrix as the checkpoint stores it."""
    entry = source.index.entry(name)
    if len(entry.shape) == 2:
        return entry.shape[0] * (entry.shape[1] + FLOAT)
    return _stored_bytes(source, entry)


def _stored_bytes(source: Source, entry: Entry) -> int:
    return entry.nbytes // entry.dtype.itemsize * source.stored(entry).itemsize


def _packed_bytes(job: Job, rows: int, columns: int) -> int:
    """4 bits a weight, and for each group a 16-bit scale and a 4-bit zero."""
    return rows * columns // 2 + rows * job.spec.groups(columns) * 5 // 2


def output_bytes(job: Job, source: Source) -> int:
    """The finished checkpoint."""
    others = [source.raw.entry(name) for name in source.raw.names()]
    patterns = (LAYER, TOWER_LAYER) if job.vision == "w8a8" else (LAYER,)
    names = [name for name in source.index.names() if any(pattern.fullmatch(name) for pattern in patterns)]
    counted = sum(_stored_bytes(source, entry) for entry in others)
    counted -= sum(_stored_bytes(source, source.index.entry(name)) for name in names)
    return counted + layer_bytes(job, source) + tower_bytes(job, source)


def kept_bytes(job: Job) -> int:
    """What work that was cut off holds on the disk already: it is part of what the plan asks for."""
    found = 0
    for path in job.partial.rglob("*"):
        with suppress(OSError):  # another run may be at work there
            found += path.stat().st_size if path.is_file() else 0
    return found


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
    widths = [*_widths(source), source.config.text.hidden_size]
    inputs = source.layers * sum(2 * tokens * width**2 + INVERSION * width**3 for width in widths)
    return inputs + sum(rows * columns**2 for rows, columns in linears(source).values())


def _vision_flops(source: Source, data: Data) -> int:
    vision = source.config.vision
    if vision is None:
        return 0
    tower = part(source.index, "vision_tower.")
    numbers = sum(tower.entry(name).nbytes // tower.entry(name).dtype.itemsize for name in tower.names())
    return 2 * numbers * vision.num_features * data.pictures


def size(count: int) -> str:
    """Bytes in words."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if count >= u), (1024, "KiB"))
    return f"{count / unit:.1f} {name}"
