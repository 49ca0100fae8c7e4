"""The room that each stage of a quantization takes, in memory and on the disk, from headers and the calibration."""

from __future__ import annotations

from contextlib import suppress

from awq.smooth import SmoothOptions
from tinychat.config import VisionConfig
from tinychat.quantize.calibration import Data
from tinychat.quantize.job import LAYER, TOWER_LAYER, Job, Source, linears, part
from tinychat.quantize.writing import PIECE
from tinychat.weight_files import Entry

FLOAT = 4  # bytes of a number while it is computed with
COPIES = 4.5  # of a layer in float32: as it came, installed, rounded in two ways, and as tensors for the disk
TOWER_COPIES = 2  # of a layer of the tower in float32: as it came, and in 8 bits twice over with what is on its way
TOWER_LARGEST = 6  # further copies of its largest linear, while it is scaled and rounded
LARGEST = 4.0  # further copies of its largest linear, while rounding it is tried
INVERTED = 4.0  # matrices of a linear's inputs at once, while they are inverted and factored


# Memory


def block_bytes(job: Job, source: Source, longest: int) -> int:
    """The work on the largest layer, without the states of the calibration, whose longest sequence is given."""
    sizes = [FLOAT * _parameters(source, i) for i in range(source.layers)]
    largest = FLOAT * max(rows * columns for rows, columns in linears(source).values())
    work = COPIES * max(sizes) + LARGEST * largest
    return int(work) + (_search_bytes(job, source, longest) if longest else 0)


def least_bytes(job: Job, source: Source, data: Data | None) -> int:
    """What the work would take if the calibration's sequences were as short as can be."""
    counts = [block_bytes(job, source, 1 if data else 0), 4 * PIECE]
    if data and data.pictures:
        counts.append(front_bytes(source, data, stream=True))
    if job.vision == "w8a8":
        counts.append(tower_block_bytes(source, data))
    return max(counts)


def _search_bytes(job: Job, source: Source, longest: int) -> int:
    """Sums over the tokens, the sequences that modules are run on, and one pass of a sequence through the layer."""
    text, options = source.config.text, job.search_options()
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    inputs = [*widths(source), text.hidden_size]
    sums = sum(width * (min(width, options.sketch_rows) + job.spec.group(width)) for width in inputs)
    if options.compensate:
        sums += sum(width**2 for width in inputs if width > options.sketch_rows) + INVERTED * max(inputs) ** 2
    sample = (options.loss_tokens or 2**62) + longest
    sample = min(sample, job.calibration.samples * longest) * 8 * text.hidden_size
    passing = longest * (6 * text.hidden_size + 2 * heads + 4 * text.intermediate_size)
    return int(FLOAT * (sums + sample + passing))


def widths(source: Source) -> tuple[int, int, int]:
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
    return FLOAT * (kept + last) + source.config.tiles_per_image * picture_bytes(vision)


def tower_block_bytes(source: Source, data: Data | None) -> int:
    """The work on a layer of the tower: as it came, in 8 bits twice, and what judges its scales."""
    vision = source.config.vision
    assert vision is not None
    width, inner, tokens = vision.hidden_size, vision.intermediate_size, vision.num_features + 1
    layer = 4 * width * width + 2 * width * inner
    sample = SmoothOptions().tokens + (data.pictures if data else 0)
    judging = sample * (3 * width + inner + 6 * max(width, inner)) + 2 * width * (sample + tokens)
    return FLOAT * (TOWER_COPIES * layer + TOWER_LARGEST * width * inner + judging) + picture_bytes(vision)


def tower_features(job: Job, source: Source, data: Data | None) -> int:
    """The pictures' states between two layers of the tower, on the disk."""
    vision = source.config.vision
    if job.vision != "w8a8" or vision is None or data is None:
        return 0
    return FLOAT * data.pictures * (vision.num_features + 1) * vision.hidden_size


def picture_bytes(vision: VisionConfig) -> int:
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
