"""`tinychat search`: the pictures of a folder that a text, or another picture, is like."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tinychat import doctor, hub
from tinychat.core import Image, Progress
from tinychat.errors import FormatError, MediaError, UsageError
from tinychat.inputs.images import load_image
from tinychat.picture_encoder import PictureEncoder, Source, dtype_of, open_source
from tinychat.picture_files import Picture, pictures_in
from tinychat.picture_index import Changes, IndexFile, PictureIndex, Update, is_index
from tinychat.placement import default_device
from tinychat.search_flags import SearchFlags

SCHEMA = "tinychat.search/1"
EMBEDDED = "embedded"  # the model's name where --model is not given
SHOWN = 10  # unreadable files that are named

Json = dict[str, Any]
Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Hit:
    """A picture by its path below the folder, and its cosine similarity with what was looked for."""

    score: float
    path: str


@dataclass(frozen=True, slots=True)
class Found:
    """What one call has found."""

    hits: tuple[Hit, ...]
    changes: Changes
    json: Json
    notes: tuple[str, ...]
    where: Path

    def shown(self, folder: str) -> list[tuple[float, str]]:
        """Scores and paths that begin with the folder as it was written, and never with a dash: they can be opened."""
        paths = [str(Path(folder).expanduser() / hit.path) for hit in self.hits]
        return [
            (hit.score, f"./{path}" if path.startswith("-") else path)
            for hit, path in zip(self.hits, paths, strict=True)
        ]


@dataclass
class Search:
    """One call: the model is loaded when it is needed first."""

    flags: SearchFlags
    folder: Path
    source: Source
    device: torch.device
    dtype: torch.dtype
    report: Report
    notes: list[str] = field(default_factory=list)
    load_s: float = 0.0

    @property
    def model(self) -> str:
        return self.flags.model or EMBEDDED

    @cached_property
    def digest(self) -> str:
        """What names the model's embeddings."""
        return self.source.digest(cache_folder())

    @cached_property
    def encoder(self) -> PictureEncoder:
        began = perf_counter()
        self.report(Progress("", "load", 0, len(self.source.index.names())))
        encoder = PictureEncoder(self.source, self.device, self.dtype)
        self.load_s = perf_counter() - began
        return encoder

    def inside(self, path: str) -> bool:
        """Whether a path is looked through."""
        return self.flags.recursive or "/" not in path

    def query(self) -> Tensor | None:
        """[P], the mean where both a text and a picture are given; None without either."""
        parts = list[Tensor]()
        if self.flags.query:
            parts.append(self.encoder.embed_text(self.flags.query, self.notes.append))
        if self.flags.like is not None:
            pixels = self.encoder.pixels(load_image(Image(path=str(Path(self.flags.like).expanduser()))))
            parts.append(self.encoder.embed(pixels[None])[0])
        return normalize(torch.stack(parts).mean(0), dim=0) if parts else None


def cache_folder() -> Path:
    """Where indexes are kept."""
    return doctor.cache_folder() / "search"


def perform(flags: SearchFlags, device: torch.device | None, report: Report) -> Found:
    """Bring the folder's index up to date, and rank its pictures.

    Raises UsageError for a folder without pictures, MediaError where none can be read, and what opening and loading
    the model raise.
    """
    folder = _folder(Path(flags.folder or ""))
    listed = list(pictures_in(folder, flags.recursive))
    if not listed:
        deeper = "" if flags.recursive else ", not counting the folders in it"
        raise UsageError(f"{flags.folder} holds no pictures{deeper}", "give a folder with .jpg, .png or other pictures")
    device = device or default_device()
    dtype = dtype_of(flags.dtype, device)
    search = Search(flags, folder, open_source(flags.model, flags.revision), device, dtype, report)
    query = search.query()
    began, loaded = perf_counter(), search.load_s
    file = _index_file(search)
    index, changes = _update(search, file, listed)
    index_s = perf_counter() - began - (search.load_s - loaded)
    _check_any(search, index, changes)
    began = perf_counter()
    hits = _best(search, index, query)
    timings = {"load_s": search.load_s, "index_s": index_s, "search_s": perf_counter() - began}
    search.notes.extend(_faults(search, index))
    if file.fault:
        search.notes.append(f"{file.fault}; the next call begins anew")
    return Found(hits, changes, _json(search, file, changes, hits, timings), tuple(search.notes), file.path)


def _folder(path: Path) -> Path:
    path = path.expanduser()
    if (there := hub.standing(path)) == "folder":
        return path.resolve()
    if there:
        raise UsageError(f"{path} is a file", "give a folder of pictures, and a picture by --like")
    raise UsageError(f"there is no folder {path}", hub.nearby(path))


def _index_file(search: Search) -> IndexFile:
    """The file that the flags name, or one in the cache that goes by folder and model. Raises UsageError."""
    if search.flags.index is None:
        key = hashlib.sha256(f"{search.folder}\n{search.digest}".encode(errors="surrogateescape"))
        return IndexFile(cache_folder() / f"{key.hexdigest()[:32]}.safetensors", named=False)
    path = Path(search.flags.index).expanduser()
    if hub.standing(path) and not is_index(path):
        raise UsageError(f"{path} is not an index of tinychat search", "give --index another file, or a new one")
    return IndexFile(path, named=True)


def _update(search: Search, file: IndexFile, listed: Sequence[Picture]) -> tuple[PictureIndex, Changes]:
    """The index of the `listed` pictures, from the file and from what is new."""

    def report(done: int, total: int) -> None:
        search.report(Progress("", "vision", done, total))

    update = Update(_old(search, file), file)
    return update.run(listed, lambda: search.encoder, search.flags.batch, search.inside, report)


def _old(search: Search, file: IndexFile) -> PictureIndex:
    """What the file holds, or an empty index. Raises UsageError for another model's, or another folder's."""
    empty = PictureIndex(search.model, search.digest, str(search.folder), (), torch.empty(0, 0, dtype=torch.float16))
    if search.flags.rebuild:
        return empty
    try:
        old = file.load()
    except FormatError as error:
        search.notes.append(f"{error.message}; it was made anew")
        return empty
    if old is None:
        return empty
    if old.digest != search.digest:
        message = f"{file.path} is the index of {old.model}, and this is {search.model} with other weights or sizes"
        raise UsageError(message, "give --index another file, or --rebuild")
    if old.folder != str(search.folder):
        message = f"{file.path} is the index of the folder {old.folder}, and this is {search.folder}"
        raise UsageError(message, "give --index another file, or --rebuild, also where the folder was moved")
    return replace(old, model=search.model)


def _check_any(search: Search, index: PictureIndex, changes: Changes) -> None:
    """Raises MediaError where nothing is left to rank."""
    if not changes.total:
        first = next(each for each in index.unreadable if search.inside(each.path))
        none = f"none of the {changes.unreadable} pictures in {search.flags.folder} can be read"
        raise MediaError(f"{none}: {first.path} {first.fault}", "give a folder with pictures")


def _best(search: Search, index: PictureIndex, query: Tensor | None) -> tuple[Hit, ...]:
    """The pictures most like the query; none without one."""
    if query is None:
        return ()
    ranked = (Hit(score, picture.path) for score, picture in index.rank(query) if search.inside(picture.path))
    return tuple(islice(ranked, search.flags.top))


def _faults(search: Search, index: PictureIndex) -> list[str]:
    """A line for each of the first unreadable files, and how many more there are."""
    faulty = [each for each in index.unreadable if search.inside(each.path)]
    lines = [f"{each.path} {each.fault}" for each in faulty[:SHOWN]]
    more = len(faulty) - SHOWN
    return [*lines, f"{more} more cannot be read"] if more > 0 else lines


def _json(search: Search, file: IndexFile, changes: Changes, hits: Sequence[Hit], timings: dict[str, float]) -> Json:
    """The object of `search --json`, as docs/json.md has it."""
    return {
        "schema": SCHEMA,
        "model": search.model,
        "query": search.flags.query or None,
        "like": search.flags.like,
        "folder": str(search.folder),
        "index": str(file.path),
        "indexed": asdict(changes),
        "results": [{"path": hit.path, "score": hit.score, "rank": rank} for rank, hit in enumerate(hits, 1)],
        "timings": timings,
    }


def sentence(flags: SearchFlags, found: Found) -> str:
    """What the index holds, for a call that looks for nothing."""
    changes = found.changes
    what = f"{changes.new:,} new, {changes.removed:,} removed, {changes.unreadable:,} unreadable"
    return f"{flags.folder}: {changes.total:,} pictures are indexed ({what}) in {found.where}"
