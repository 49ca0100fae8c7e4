"""A 4-bit checkpoint in another format or layout: the same (q, scale, zero), for other programs to read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from awq.save import as_os_error
from tinychat import layouts, load
from tinychat.checkpoint import EMBEDDINGS, HARMLESS, HEAD, Index, compare, rename, write_safetensors
from tinychat.config import FLOAT_TYPES, VilaConfig, read_config
from tinychat.convert_files import POOLING, write_files
from tinychat.core import Progress
from tinychat.errors import CapacityError, ModelError, TinychatError, UsageError
from tinychat.flags import ConvertFlags
from tinychat.inputs.processor import Processor
from tinychat.int8_tower import int8_linears
from tinychat.pickled import write_pickle
from tinychat.quantization import Quantization, quantization_of
from tinychat.quantize.output import publish
from tinychat.quantize.plan import size
from tinychat.quantize.run import FULL, locked
from tinychat.repack import Computed, as_gemm, packed_linears
from tinychat.weight_files import Entry
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.formats import COMPRESSED_TENSORS, COMPRESSED_TENSORS_8, GEMM, LLM_AWQ_V2, Format
from tinychat_kernels.layout import HALVES, AwqGemm, Logical, QuantSpec, to_logical

Json = dict[str, Any]
Report = Callable[[Progress], None]

PARTS = tuple(AwqGemm._fields)
HEADS = {4: COMPRESSED_TENSORS, 8: COMPRESSED_TENSORS_8}  # by bits
ROWS = 64  # a vocabulary grows in steps of this


@dataclass(frozen=True, slots=True)
class Target:
    """A format, and whether it comes as a VILA folder or as a folder of transformers; the only scales that it takes."""

    format: Format
    vila: bool
    scales: torch.dtype | None = None


TARGETS = {
    "awq-gemm": Target(GEMM, vila=False, scales=torch.float16),  # programs that read it have them in float16
    "vila": Target(GEMM, vila=True),
    "compressed-tensors": Target(COMPRESSED_TENSORS, vila=False),
    "llm-awq-v2": Target(LLM_AWQ_V2, vila=True),
}


@dataclass(frozen=True, slots=True)
class ImageToken:
    """The id that stands for pictures, the rows that the embeddings have with it, and whose copy the new rows are."""

    id: int
    vocab_size: int
    filler: int


@dataclass(frozen=True, slots=True)
class Job:
    """What is converted, checked as far as headers tell. Names of `index` are those in memory.

    `head`: how the head is written where it does not stay as it is in 16 bits.
    """

    folder: Path
    config: VilaConfig
    index: Index
    spec: QuantSpec
    stored: str
    target: Target
    layout: str
    scales: torch.dtype | None = None
    image: ImageToken | None = None
    head: QuantSpec | None = None

    @property
    def linears(self) -> list[str]:
        return packed_linears(self.index)

    @property
    def rounds_head(self) -> bool:
        """Whether the head is changed by the conversion."""
        return self.head is not None and not isinstance(_entry(self.index, HEAD), Computed)

    @property
    def dtype(self) -> str:
        return str(self.index.dtype(EMBEDDINGS)).removeprefix("torch.")


def convert(
    folder: Path,
    out: Path,
    to: str,
    *,
    scales: torch.dtype | None = None,
    lm_head_bits: int | None = None,
    progress: Report | None = None,
) -> Json:
    """Write `folder` as `out` in the format `to` (a key of TARGETS), and say what was done.

    `out` appears when it is complete. `scales`: another 16-bit type for them, where every one of them has it.
    `lm_head_bits`: 4 or 8 rounds the head to the nearest, symmetrically in the linears' groups; None leaves it alone.
    Raises UsageError (an unknown format, an `out` that exists), ModelError (weights that are not 4-bit, or that the
    target cannot hold), FormatError (damaged files), CapacityError (the disk).
    """
    job = plan(folder, out, to, scales, lm_head_bits)
    with _beside(out) as draft:
        _write_weights(job, draft, progress)
        write_files(job, draft)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return {
        "schema": "tinychat.convert/1",
        "model": str(folder),
        "out": str(out),
        "to": to,
        "from": {"layout": job.config.layout, "format": job.stored},
        "layout": job.layout,
        "group_size": job.spec.group_size,
        "linears": len(job.linears),
        "lm_head_bits": job.head.bits if job.head else 16,
        "bytes": sum((out / name).stat().st_size for name in files),
        "files": files,
    }


def perform(folder: Path, flags: ConvertFlags, progress: Report) -> Json:
    """The verb: what `convert` says of what the flags ask for."""
    scales = FLOAT_TYPES[load.SHORT[flags.scales]] if flags.scales else None
    bits, out = flags.lm_head_bits, Path(flags.out or "").expanduser()
    return convert(folder, out, flags.to or "", scales=scales, lm_head_bits=bits, progress=progress)


def sentence(found: Json) -> str:
    """What was done, for people."""
    what = f"{found['linears']} 4-bit linears, {size(found['bytes'])}"
    head = f"; its head has {found['lm_head_bits']} bits" if found["lm_head_bits"] != 16 else ""
    return f"{found['out']} holds {found['model']} as {found['to']}: {what}, q, scales and zero points unchanged{head}"


def plan(folder: Path, out: Path, to: str, scales: torch.dtype | None = None, lm_head_bits: int | None = None) -> Job:
    """Everything that can be refused before a byte is written."""
    if to not in TARGETS:
        raise UsageError(f"there is no format {to!r}", f"give one of {', '.join(TARGETS)}")
    if out.exists():
        raise UsageError(f"{out} exists", "give a folder that does not exist yet")
    target, config = TARGETS[to], read_config(folder)
    stored = load.open_parts(folder, config)
    if (found := quantization_of(config, stored)) is None:
        raise ModelError(f"{folder} has no 4-bit weights", "quantize the model first: tinychat quantize MODEL OUT")
    on_disk = as_gemm(stored, found)
    layout = _layout(config, target, to)
    index, scales = _with_head(on_disk, config), scales or target.scales
    head = _head(index, found, lm_head_bits, to)
    job = Job(folder, config, index, found.spec, found.format.name, target, layout, scales, head=head)
    empty = load.empty_model(config, torch.float16, job.spec, frozenset(job.linears), _int8(job, to))
    compare(empty, on_disk, config.layout).check()
    _check_linears(job)
    _check_space(job, out)
    if layout != "llava_hf" or config.layout == "llava_hf":
        return job
    layouts.check_llava(config)
    return replace(job, image=_image_token(job))


def _head(index: Index, found: Quantization, bits: int | None, to: str) -> QuantSpec | None:
    """How the head is written; None for 16 bits. Raises ModelError for what it cannot become, or the format not say."""
    stored = found.head or found.spec if isinstance(_entry(index, HEAD), Computed) else None
    if bits not in (None, 16, *HEADS):
        raise UsageError(f"a head of {bits} bits is asked for", "give 4, 8 or 16")
    if bits is not None and stored is not None and bits != stored.bits:
        raise ModelError(f"the head has {stored.bits} bits, and {bits} are asked for", "convert the 16-bit original")
    if bits in (None, 16) and stored is None:
        return None
    spec = stored or QuantSpec(bits or 16, found.spec.group_size, zero_point=False)
    if TARGETS[to].format is not COMPRESSED_TENSORS:
        message = f"{to} cannot say that the head has {spec.bits} bits"
        raise ModelError(message, "give --to compressed-tensors, or a model whose head has 16 bits")
    if HEAD not in index:
        message = f"the head is the embeddings, which stay in 16 bits, and {spec.bits} bits are asked for"
        raise ModelError(message, "leave --lm-head-bits out")
    columns, rows = index.shape(HEAD)
    try:
        HEADS[spec.bits].check(spec, rows, columns)
    except LayoutError as error:
        raise ModelError(f"the head cannot be converted: {error}", "leave --lm-head-bits out") from error
    return spec


def _entry(index: Index, name: str) -> Entry | None:
    return index.entry(name) if name in index else None


def _int8(job: Job, to: str) -> frozenset[str]:
    """The tower's 8-bit linears. Raises ModelError where one config.json is to tell of tower and decoder."""
    found = int8_linears(job.config, job.index)
    if found and job.layout != "vila":
        raise ModelError(f"the vision tower has 8-bit weights, which {to} cannot say", layouts.VILA)
    return found


def _layout(config: VilaConfig, target: Target, to: str) -> str:
    if config.vision is None:
        if to == "vila":
            raise ModelError("the model reads text only, and a VILA folder has a vision tower", "try --to awq-gemm")
        return "text"
    return "vila" if target.vila else "llava_hf"


def _with_head(on_disk: Index, config: VilaConfig) -> Index:
    """The tensors by their names in memory, and the head of a SigLIP tower."""
    index = on_disk.renamed(config.layout)
    entries = {name: index.entry(name) for name in index.names()}
    named = {rename(name, config.layout): name for name in on_disk.names()}
    heads = {ours: on_disk.entry(theirs) for ours, theirs in named.items() if ours.startswith(POOLING)}
    assert all(HARMLESS.fullmatch(name) for name in heads)
    return Index(entries | heads)


def _check_linears(job: Job) -> None:
    for stem in job.linears:
        rows, columns = GEMM.size({"qweight": job.index.shape(f"{stem}.qweight")})
        try:
            job.target.format.check(job.spec, rows, columns)
        except LayoutError as error:
            raise ModelError(f"{stem} cannot be converted: {error}", "choose another format") from error


def _check_space(job: Job, out: Path) -> None:
    home = next(parent for parent in out.absolute().parents if parent.is_dir())
    needed = job.index.total_bytes * (2 if job.target.format is LLM_AWQ_V2 else 1)
    if (free := shutil.disk_usage(home).free) < needed:
        message = f"{size(needed)} are needed on the disk of {home}, {size(free)} are free"
        raise CapacityError(message, "free some, or give a folder on another disk")


def _image_token(job: Job) -> ImageToken:
    """The tokenizer's own image token where it has a row, else a new one: on a spare row, or on rows to be added."""
    words = Processor.from_folder(job.folder, job.config)
    rows = job.config.text.vocab_size
    place = job.config.image_token_id if job.config.image_token_id is not None else words.marked.image_token_id
    place = len(words.tokenizer) if place is None else place
    tokenizer: Any = words.tokenizer
    likely = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, 0)
    filler = next(i for i in likely if isinstance(i, int) and i < rows)
    return ImageToken(place, rows if place < rows else math.ceil((place + 1) / ROWS) * ROWS, filler)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end, and is gone where it does not come to that, or at the next try."""
    home = out.with_name(f"{out.name}.converting")
    try:
        with locked(home):
            draft = home / "out"
            try:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                yield draft
                publish(draft, out)
            finally:
                shutil.rmtree(home, ignore_errors=True)
    except SafetensorError as error:
        raise _unwritten(out, as_os_error(error, out)) from error
    except OSError as error:
        raise _unwritten(out, error) from error


def _unwritten(out: Path, error: OSError) -> TinychatError:
    if error.errno in FULL:
        remedy = "free some, or give a folder on another disk"
        return CapacityError(f"the disk of {out} is full, and nothing was written", remedy)
    return UsageError(f"{out} cannot be written: {error.strerror or error}", "give another folder")


def _write_weights(job: Job, draft: Path, progress: Report | None) -> None:
    names = job.index.names()
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(Progress("", "convert", done, len(names)))

    for part in layouts.VILA_PARTS if job.layout == "vila" else [""]:
        prefix = f"{part}." if part else ""
        own = [name for name in names if layouts.name_on_disk(name, job.layout).startswith(prefix)]
        tensors = _tensors(job, own, tell)
        named = ((layouts.name_on_disk(name, job.layout).removeprefix(prefix), tensor) for name, tensor in tensors)
        (draft / part).mkdir(exist_ok=True)
        if job.target.format is LLM_AWQ_V2 and part in ("llm", ""):
            write_pickle(named, draft / part / f"model-w4-g{job.spec.group_size}-awq-v2.pt")
        else:
            write_safetensors(_as_one_layer(named) if _is_linear(job, part) else named, draft / part)


def _is_linear(job: Job, part: str) -> bool:
    return part == "mm_projector" and job.config.projector is not None and job.config.projector.type == "linear"


def _as_one_layer(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """VILA's linear projector is one layer, not a list of them."""
    return ((name.replace("layers.0.", "layers.", 1), tensor) for name, tensor in tensors)


def _tensors(job: Job, names: list[str], tell: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the target's format, one linear at a time in memory."""
    packed = set(job.linears)
    for name in names:
        stem, _, end = name.rpartition(".")
        if name == HEAD and job.head is not None:
            yield from ((f"{stem}.{part}", tensor) for part, tensor in _packed_head(job, job.head).items())
        elif stem not in packed or end not in PARTS:
            yield name, _with_rows(job, name, job.index.get(name))
        elif end == PARTS[0]:
            yield from ((f"{stem}.{part}", tensor) for part, tensor in _packed(job, stem).items())
        tell()


def _packed(job: Job, stem: str) -> dict[str, Tensor]:
    found = to_logical(AwqGemm(*(job.index.get(f"{stem}.{part}") for part in PARTS)), job.spec)
    try:
        return job.target.format.pack(_with_scales(found, job.scales), job.spec)
    except LayoutError as error:
        remedy = "choose another format, or other --scales"
        raise ModelError(f"{stem} cannot be converted: {error}", remedy) from error


def _packed_head(job: Job, spec: QuantSpec) -> dict[str, Tensor]:
    """The head's tensors: as they are packed already, or rounded; with rows for the image token."""
    from awq.rounding import Rounding

    entry, format = job.index.entry(HEAD), HEADS[spec.bits]
    try:
        if isinstance(entry, Computed):
            stored = Index(entry.sources)
            logical = _with_scales(format.unpack({end: stored.get(end) for end in stored.names()}, spec), job.scales)
        else:
            kind = job.scales or (entry.dtype if entry.dtype in HALVES else torch.float16)
            logical = Rounding(spec, kind).logical(job.index.get(HEAD))
        columns = _with_rows(job, HEAD, torch.arange(logical.q.shape[1])[:, None])[:, 0]
        return format.pack(Logical(*(tensor[:, columns] for tensor in logical)), spec)
    except LayoutError as error:
        raise ModelError(f"the head cannot be converted: {error}", "leave --lm-head-bits out") from error


def _with_scales(logical: Logical, dtype: torch.dtype | None) -> Logical:
    """The scales in another type. Raises LayoutError where one of them changes."""
    if dtype is None or dtype == logical.scale.dtype:
        return logical
    cast = logical.scale.to(dtype)
    if changed := int((cast.double() != logical.scale.double()).sum()):
        raise LayoutError(f"{changed} of {cast.numel()} scales are {logical.scale.dtype} and have no value in {dtype}")
    return logical._replace(scale=cast)


def _with_rows(job: Job, name: str, tensor: Tensor) -> Tensor:
    """The embeddings and the head with rows for the image token: copies of a row that no answer has."""
    if job.image is None or name not in (EMBEDDINGS, HEAD):
        return tensor
    more = job.image.vocab_size - tensor.shape[0]
    row = job.image.filler
    return torch.cat((tensor, tensor[row : row + 1].expand(more, -1))) if more > 0 else tensor
