"""An index of a folder's pictures: an embedding of each, in one file that is brought up to date by what has changed.

The file is safetensors: `embeddings` float16 [N, P], normalised, and as metadata a JSON text with the model, the
pictures in the order of the rows, and the files that could not be read. It is replaced as a whole, so that a process
that is killed, and two at once, leave a complete one.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from math import prod
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinychat.core import Image
from tinychat.errors import FormatError, MediaError, UsageError
from tinychat.inputs.images import SMALLER, image_size, load_image
from tinychat.packed_cache import beside, sweep
from tinychat.picture_files import Picture, PixelBudget, unseen

SCHEMA = "tinychat.pictures/1"
KEY = "tinychat"  # of the metadata
ROWS = "embeddings"
SAVE_PICTURES, SAVE_SECONDS = 256, 30.0  # after so many, or so long, the work is saved
SAVE_SHARE = 20  # and never for more than one part in so many of the time
READERS = 4  # threads that read and scale pictures
AT_ONCE = 50_000_000  # pixels that are decoded at once, at up to 15 bytes each
CHUNK = 8192  # rows that are ranked at once

Json = dict[str, Any]


Looked = tuple[Picture, Tensor | None]  # the pixels where they are to be embedded


@dataclass(frozen=True, slots=True, eq=False)
class PictureIndex:
    """Pictures [N] with their embeddings [N, P] float16 by one model, and the files that could not be read."""

    model: str
    digest: str
    folder: str
    pictures: tuple[Picture, ...]
    embeddings: Tensor
    unreadable: tuple[Picture, ...] = ()

    def same_pictures(self, other: PictureIndex) -> bool:
        return (self.pictures, self.unreadable) == (other.pictures, other.unreadable)

    def rank(self, query: Tensor) -> list[tuple[float, Picture]]:
        """[P] -> pictures with their cosine similarity, the most alike first."""
        scores = torch.cat([part.float() @ query.float() for part in self.embeddings.split(CHUNK)])
        ordered = scores.sort(descending=True, stable=True)
        return [(score, self.pictures[i]) for score, i in zip(*map(Tensor.tolist, ordered), strict=True)]


class Encoder(Protocol):
    """What makes embeddings of pictures; `pixels` is called by several threads."""

    device: torch.device

    def pixels(self, image: Image) -> Tensor:
        """[3, H, W]; raises MediaError."""
        ...

    def embed(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P], normalised."""
        ...


# The file


def write(path: Path, index: PictureIndex) -> None:
    """Replace the file by this index. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    rows = index.embeddings.contiguous()
    lists = {name: [astuple(each) for each in getattr(index, name)] for name in ("pictures", "unreadable")}
    named = {"schema": SCHEMA, "model": index.model, "digest": index.digest, "folder": index.folder}
    header = {**named, **lists, "checksum": _checksum(lists, rows)}
    with beside(path) as temporary:
        try:
            save_file({ROWS: rows}, temporary, metadata={KEY: json.dumps(header)})
        except SafetensorError as error:  # of the disk: there is nothing else that it could refuse
            raise OSError(str(error)) from error
        temporary.replace(path)


def read(path: Path) -> PictureIndex | None:
    """The index in a file, None where there is no file. Raises FormatError where it is damaged or something else."""
    try:
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            rows = file.get_tensor(ROWS).clone()
        return _checked(header, rows)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise FormatError(f"the index {path} is damaged ({error})", "give --rebuild") from error


def is_index(path: Path) -> bool:
    """Whether the file begins as an index of ours does, damaged or not."""
    mark = json.dumps(json.dumps({"schema": SCHEMA})[:-1])[1:-1].partition("/")[0]
    try:
        with path.open("rb") as file:
            return mark.encode() in file.read(256)
    except OSError:
        return False


def _checked(header: Json, rows: Tensor) -> PictureIndex:
    """Raises ValueError, LookupError or TypeError where header and rows are not what `write` makes."""
    if header["schema"] != SCHEMA:
        raise ValueError(f"it has the schema {header['schema']!r}, this tinychat knows {SCHEMA!r}")
    lists = {name: header[name] for name in ("pictures", "unreadable")}
    if rows.dtype != torch.float16 or rows.ndim != 2 or len(rows) != len(lists["pictures"]):
        raise ValueError(f"{list(rows.shape)} numbers are there for {len(lists['pictures'])} pictures")
    if _checksum(lists, rows) != header["checksum"]:
        raise ValueError("its checksum is wrong")
    pictures, unreadable = (tuple(map(_picture, lists[name])) for name in lists)
    model, digest, folder = (str(header[name]) for name in ("model", "digest", "folder"))
    return PictureIndex(model, digest, folder, pictures, rows, unreadable)


def _picture(fields: Any) -> Picture:
    path, size, mtime_ns, sha256, fault = fields
    return Picture(str(path), int(size), int(mtime_ns), str(sha256), str(fault))


def _checksum(lists: Mapping[str, Any], rows: Tensor) -> int:
    return zlib.crc32(json.dumps(lists).encode(), zlib.crc32(rows.numpy().tobytes()))


class IndexFile:
    """Where an index lives. It cannot be written: an error where the user has named the file, else `fault` says it."""

    def __init__(self, path: Path, named: bool) -> None:
        self.path = path
        self.named = named
        self.fault = ""
        self._state = self._now()

    def load(self) -> PictureIndex | None:
        """The index, None where there is no file. Raises FormatError."""
        self._state = self._now()
        return read(self.path)

    def changed(self, ours: PictureIndex) -> PictureIndex | None:
        """What another process has written since, where it is of the same model and folder."""
        if self._now() == self._state:
            return None
        try:
            theirs = self.load()
        except FormatError:
            return None
        same = theirs is not None and (theirs.digest, theirs.folder) == (ours.digest, ours.folder)
        return theirs if same else None

    def keep(self, index: PictureIndex) -> None:
        """Replace the file. Raises UsageError where the user's cannot be written."""
        try:
            write(self.path, index)
        except OSError as error:
            if self.named:
                message = f"the index {self.path} cannot be written ({error.strerror or error})"
                raise UsageError(message, "give --index a file that can be written") from error
            self.fault = f"the index could not be kept in {self.path} ({error.strerror or error})"
        self._state = self._now()

    def _now(self) -> tuple[int, ...]:
        try:
            status = self.path.stat()
        except OSError:
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns


# Bringing the index up to date


@dataclass(frozen=True, slots=True)
class Changes:
    """What an update has found: pictures in all, those new or changed, those gone, those that cannot be read."""

    total: int
    new: int
    removed: int
    unreadable: int


class Update:
    """One run over a folder: pictures that are new or have changed are embedded, and the index is saved now and then.

    Nothing that the old index knows is forgotten before the end, so that a run that was cut off loses no embedding.
    """

    def __init__(self, old: PictureIndex, file: IndexFile) -> None:
        self.old = old
        self.file = file
        self.entries = dict[str, Picture]()
        self.rows = dict[str, Tensor]()  # by sha256
        self.saved_at, self.save_took, self.unsaved = monotonic(), 0.0, 0
        self._learn(old)

    def run(
        self,
        found: Sequence[Picture],
        encoder: Callable[[], Encoder],
        batch: int,
        inside: Callable[[str], bool],
        report: Callable[[int, int], None],
    ) -> tuple[PictureIndex, Changes]:
        """The index of what was `found`; entries of paths that are not `inside` stay as they are.

        Raises what the encoder raises, and UsageError where the file cannot be written; what is done until then is
        kept.
        """
        todo = [each for each in found if not each.fault and not each.same_file(self.entries.get(each.path))]
        try:
            if todo:
                self._embed(encoder(), todo, batch, report)
        except BaseException:
            if self.unsaved:
                self._save()
            raise
        self.entries |= {each.path: each for each in found if each.fault}
        paths = {each.path for each in found}
        self._save(lambda path: path in paths or not inside(path))
        return self._index(), self._changes(todo, inside)

    def _changes(self, todo: Iterable[Picture], inside: Callable[[str], bool]) -> Changes:
        here = [entry for path, entry in self.entries.items() if inside(path)]
        return Changes(
            total=sum(not entry.fault for entry in here),
            new=sum(not self.entries[each.path].fault for each in todo),
            removed=sum(each.path not in self.entries for each in self.old.pictures),
            unreadable=sum(bool(entry.fault) for entry in here),
        )

    def _embed(self, encoder: Encoder, todo: Sequence[Picture], batch: int, report: Callable[[int, int], None]) -> None:
        folder, done, budget = Path(self.old.folder), 0, PixelBudget(AT_ONCE)

        def look(picture: Picture) -> Looked:
            where = str(folder / picture.path)
            try:
                image = load_image(Image(path=where))
            except MediaError as error:
                passing = isinstance(error.__cause__, OSError)  # and not of the content: it is looked at again
                found = unseen(picture.path, "") if passing else picture
                return replace(found, fault=error.message.removeprefix(where).strip()), None
            try:
                seen = replace(picture, sha256=image.digest)
                if image.digest in self.rows:
                    return seen, None
                with budget.room(prod(image_size(image))):
                    return seen, encoder.pixels(image)
            except MediaError as error:
                advice = f"; {error.remedy}" if error.remedy == SMALLER else ""
                return replace(picture, fault=error.message.removeprefix(where).strip() + advice), None

        report(0, len(todo))
        parts = (todo[at : at + batch] for at in range(0, len(todo), batch))
        pool = ThreadPoolExecutor(READERS)
        try:
            for part in _looked(parts, lambda picture: pool.submit(look, picture), encoder.device.type != "cpu"):
                self._add(encoder, part)
                done += len(part)
                report(done, len(todo))
                if self._due():
                    self._save()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt waits for what is being read, and no more

    def _add(self, encoder: Encoder, part: Sequence[Looked]) -> None:
        fresh = {picture.sha256: pixels for picture, pixels in part if pixels is not None}
        if fresh:
            embedded = encoder.embed(torch.stack(list(fresh.values()))).to("cpu", torch.float16)
            self.rows.update(zip(fresh, embedded, strict=True))
        self.entries |= {picture.path: picture for picture, _ in part}
        self.unsaved += len(part)

    def _due(self) -> bool:
        waited = monotonic() - self.saved_at
        return (self.unsaved >= SAVE_PICTURES or waited >= SAVE_SECONDS) and waited >= SAVE_SHARE * self.save_took

    def _save(self, stays: Callable[[str], bool] = lambda _: True) -> None:
        """Write what is new, together with what another process has added, and without what does not stay."""
        began = monotonic()
        if (theirs := self.file.changed(self.old)) is not None:
            self._learn(theirs)
        self.entries = {path: entry for path, entry in self.entries.items() if stays(path)}
        index = self._index()
        if not index.same_pictures(self.old) or theirs is not None or not self.file.path.exists():
            self.file.keep(index)
        self.saved_at, self.unsaved = monotonic(), 0
        self.save_took = self.saved_at - began

    def _learn(self, index: PictureIndex) -> None:
        for picture in (*index.pictures, *index.unreadable):
            self.entries.setdefault(picture.path, picture)
        for picture, row in zip(index.pictures, index.embeddings, strict=True):
            self.rows.setdefault(picture.sha256, row)

    def _index(self) -> PictureIndex:
        ordered = [self.entries[path] for path in sorted(self.entries)]
        pictures = tuple(each for each in ordered if not each.fault)
        rows = [self.rows[each.sha256] for each in pictures]
        embeddings = torch.stack(rows) if rows else self.old.embeddings[:0]
        return replace(
            self.old, pictures=pictures, embeddings=embeddings, unreadable=tuple(each for each in ordered if each.fault)
        )


def _looked(
    parts: Iterable[Sequence[Picture]], begin: Callable[[Picture], Future[Looked]], ahead: bool
) -> Iterator[list[Looked]]:
    """Each part, once all of it was looked at. `ahead`: the next one has begun by then.

    A model on the CPU wants it for itself: readers between its threads cost more than the waiting does.
    """
    begun = deque[list[Future[Looked]]]()
    for part in parts:
        begun.append([begin(picture) for picture in part])
        if len(begun) > ahead:
            yield [each.result() for each in begun.popleft()]
    for left in begun:
        yield [each.result() for each in left]
