"""`tinychat search`: ranks as transformers does, reads what has changed and nothing else, and loses no work."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import json_keys
import pytest
import torch
import transformers
from clip_folders import LENGTH, make_clip, make_pictures, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as pillow
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from make_tiny_model import make_tiny_model
from tinychat import cli, picture_encoder, picture_files, picture_index, search
from tinychat.errors import FormatError, MediaError, ModelError, TinychatError, UsageError
from tinychat.picture_encoder import PictureEncoder, dtype_of, open_source
from tinychat.picture_files import Picture, pictures_in
from tinychat.picture_index import IndexFile, PictureIndex
from tinychat.search_flags import SearchFlags
from tinychat.terminal.found import draw_found

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TEXT = "a blue cup"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("siglip"), "siglip")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "photos", 6)


class Counts:
    """What a call has cost: pictures that were embedded, and files that were read."""

    def __init__(self) -> None:
        self.embedded = 0
        self.read = list[str]()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    seen = Counts()
    embed, load_image = PictureEncoder.embed, picture_index.load_image

    def counted(self: PictureEncoder, pixels: Tensor) -> Tensor:
        seen.embedded += len(pixels)
        return embed(self, pixels)

    def noted(image: Any) -> Any:
        seen.read.append(Path(image.path).name)
        return load_image(image)

    monkeypatch.setattr(PictureEncoder, "embed", counted)
    monkeypatch.setattr(picture_index, "load_image", noted)
    return seen


def look(folder: Path, model: Path, text: str = TEXT, **flags: Any) -> search.Found:
    words = [text] if text else []
    return search.perform(SearchFlags(folder=str(folder), words=words, model=str(model), **flags), CPU, lambda _: None)


def paths(found: search.Found) -> list[str]:
    return [hit.path for hit in found.hits]


# Ranking


def by_transformers(model: Path, folder: Path, text: str | None, like: Path | None) -> dict[str, float]:
    """Scores by transformers' own model, tokenizer and image processor."""
    theirs = AutoModel.from_pretrained(model).eval()
    kind = json.loads((model / "config.json").read_text())["model_type"]
    stored = json.loads((model / "preprocessor_config.json").read_text())
    name = stored["image_processor_type"]
    processor = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)  # without torchvision
    processor = processor.from_pretrained(model)

    def embed(path: Path) -> Tensor:
        pixels = processor(images=pillow.open(path).convert("RGB"), return_tensors="pt")
        return normalize(theirs.get_image_features(**pixels).pooler_output[0], dim=0)

    parts = [embed(like)] if like else []
    if text:
        padding = {"padding": "max_length", "max_length": LENGTH} if kind == "siglip" else {}
        ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt", **padding)["input_ids"]
        parts.append(normalize(theirs.get_text_features(input_ids=ids).pooler_output[0], dim=0))
    wanted = normalize(torch.stack(parts).mean(0), dim=0)
    with torch.no_grad():
        return {path.name: float(embed(path) @ wanted) for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["model", "siglip"])
@pytest.mark.parametrize(("text", "like"), [(TEXT, False), ("", True), (TEXT, True)])
def test_ranks_as_transformers(family: str, text: str, like: bool, photos: Path, request: pytest.FixtureRequest):
    folder: Path = request.getfixturevalue(family)
    shown = photos.parent / "like.png"
    picture(99, (64, 48)).save(shown)
    found = look(photos, folder, text, like=str(shown) if like else None, batch=4)
    wanted = by_transformers(folder, photos, text, shown if like else None)
    assert {hit.path: hit.score for hit in found.hits} == pytest.approx(wanted, abs=1e-3)  # rows are kept in 16 bits
    assert paths(found) == sorted(wanted, key=wanted.__getitem__, reverse=True)
    assert max(wanted.values()) - min(wanted.values()) > 0.01


def test_a_picture_is_most_like_itself(photos: Path, model: Path):
    found = look(photos, model, "", like=str(photos / "003.png"), top=2)
    assert paths(found)[0] == "003.png"
    assert found.hits[0].score == pytest.approx(1, abs=1e-3)
    assert len(found.hits) == 2


def test_words_are_one_query():
    assert SearchFlags(folder="photos", words=["two", " red  circles"]).query == "two red circles"


def test_a_long_query_is_cut_with_a_note(photos: Path, model: Path):
    found = look(photos, model, "a" * 40)
    assert found.notes == (f"the query has 42 tokens, the model reads {LENGTH}: its end is left out",)
    assert paths(found) == paths(look(photos, model, "a" * (LENGTH - 2)))


# What has changed is read, and nothing else


def test_only_what_is_new_is_read(photos: Path, model: Path, counts: Counts):
    first = look(photos, model)
    assert (counts.embedded, first.changes) == (6, picture_index.Changes(6, 6, 0, 0))
    counts.read.clear()
    again = look(photos, model)
    assert (counts.embedded, counts.read, again.changes.new) == (6, [], 0)
    assert again.hits == first.hits
    make_pictures(photos, 1, first=6)
    picture(70).save(photos / "000.png")
    (photos / "001.png").unlink()
    changed = look(photos, model)
    assert (counts.embedded, sorted(counts.read)) == (8, ["000.png", "006.png"])
    assert changed.changes == picture_index.Changes(6, 2, 1, 0)


def test_an_index_that_is_brought_up_to_date_is_as_one_made_anew(photos: Path, model: Path):
    look(photos, model)
    make_pictures(photos, 3, first=4)  # two of them are there already
    (photos / "002.png").unlink()
    assert look(photos, model).hits == look(photos, model, rebuild=True).hits


def test_moved_and_touched_pictures_are_not_embedded_again(photos: Path, model: Path, counts: Counts):
    before = [hit.score for hit in look(photos, model).hits]
    (photos / "sub").mkdir()
    (photos / "000.png").rename(photos / "sub" / "moved.png")
    os.utime(photos / "001.png", ns=(1, 1))
    after = look(photos, model)
    assert counts.embedded == 6
    assert [hit.score for hit in after.hits] == pytest.approx(before, abs=1e-6)  # sums go by the rows' order
    assert "sub/moved.png" in paths(after)
    assert (after.changes.total, after.changes.removed) == (6, 1)


def test_copies_are_embedded_once(photos: Path, model: Path, counts: Counts):
    for number in range(5):
        shutil.copy(photos / "000.png", photos / f"copy{number}.png")
    assert look(photos, model, top=20).changes.total == 11
    assert counts.embedded == 6


def test_rebuild_reads_everything_again(photos: Path, model: Path, counts: Counts):
    look(photos, model)
    look(photos, model, rebuild=True)
    assert counts.embedded == 12


def test_nothing_but_the_index_without_a_query(photos: Path, model: Path, counts: Counts):
    found = look(photos, model, "")
    assert (found.hits, found.changes.total, counts.embedded) == ((), 6, 6)
    again = look(photos, model, "")
    assert again.json["timings"]["load_s"] == 0, "the model was loaded for nothing"
    flags = SearchFlags(folder="photos")
    assert search.sentence(flags, found).startswith("photos: 6 pictures are indexed (6 new, 0 removed, 0 unreadable)")


def test_without_recursion_deeper_pictures_stay_indexed(photos: Path, model: Path, counts: Counts):
    make_pictures(photos / "deeper", 2, first=10)
    assert look(photos, model).changes.total == 8
    shallow = look(photos, model, recursive=False)
    assert (shallow.changes, len(shallow.hits)) == (picture_index.Changes(6, 0, 0, 0), 6)
    assert look(photos, model).changes == picture_index.Changes(8, 0, 0, 0)
    assert counts.embedded == 8


def test_every_model_has_an_index_of_its_own(photos: Path, model: Path, tmp_path: Path, counts: Counts):
    other = make_clip(tmp_path / "other", seed=1)
    first = look(photos, model)
    assert look(photos, other).where != first.where
    assert counts.embedded == 12
    assert look(photos, model).hits == first.hits


def test_other_weights_of_the_same_sizes_are_another_model(photos: Path, model: Path, tmp_path: Path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert look(photos, copy).where == look(photos, model).where, "the same weights in another folder"
    weights = load_file(copy / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors")
    assert look(photos, copy).where != look(photos, model).where


@pytest.mark.parametrize(("ahead", "begun"), [(False, [2, 4, 5]), (True, [4, 5, 5])])
def test_readers_leave_a_cpu_to_the_model_and_go_ahead_of_a_gpu(ahead: bool, begun: list[int]):
    """How many pictures have been begun as each part is handed on."""
    started = list[Picture]()

    def begin(one: Picture) -> Future[picture_index.Looked]:
        started.append(one)
        future = Future[picture_index.Looked]()
        future.set_result((one, None))
        return future

    all_of_them = [Picture(name, 1, 1) for name in "abcde"]
    parts, seen = list[list[str]](), list[int]()
    for part in picture_index._looked([all_of_them[:2], all_of_them[2:4], all_of_them[4:]], begin, ahead):
        parts.append([one.path for one, _ in part])
        seen.append(len(started))
    assert parts == [["a", "b"], ["c", "d"], ["e"]]
    assert seen == begun


# Work that is cut off


CHILD = """
import sys, time, torch
from tinychat import picture_index, search
from tinychat.picture_encoder import PictureEncoder
from tinychat.search_flags import SearchFlags
picture_index.SAVE_PICTURES = 4
embed = PictureEncoder.embed
def slow(self, pixels):
    time.sleep(0.15)
    return embed(self, pixels)
PictureEncoder.embed = slow
flags = SearchFlags(folder=sys.argv[1], words=["x"], model=sys.argv[2], index=sys.argv[3], batch=2)
search.perform(flags, torch.device("cpu"), lambda _: None)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, model: Path, counts: Counts):
    photos, index = make_pictures(tmp_path / "photos", 60), tmp_path / "index"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, photos, model, index], env={**os.environ, "PYTHONPATH": path}
    )
    deadline = time.monotonic() + 200
    while not index.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    kept = picture_index.read(index)
    assert kept is not None
    assert 4 <= len(kept.pictures) < 60
    found = look(photos, model, index=str(index), top=60)
    assert counts.embedded == 60 - len(kept.pictures)
    assert found.hits == look(photos, model, index=str(tmp_path / "anew"), top=60).hits


def test_an_interrupted_run_keeps_what_it_has(photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    embed, calls = PictureEncoder.embed, list[int]()

    def interrupted(self: PictureEncoder, pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(self, pixels)

    monkeypatch.setattr(PictureEncoder, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        look(photos, model, batch=2)
    look(photos, model, batch=2)
    assert calls == [2, 2, 2, 2]


def test_an_interrupt_leaves_what_is_not_begun(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    """All of a batch is in line, and each reader ends what it has begun."""
    photos, begun, told = make_pictures(tmp_path / "photos", 40), list[str](), threading.Event()

    def slow(image: Any) -> Any:
        begun.append(image.path)
        told.wait(20)
        raise MediaError("it is slow", "wait")

    def interrupted(parts: Any, begin: Callable[[Picture], Any], _: bool) -> Any:
        for part in parts:
            for one in part:
                begin(one)
            threading.Timer(0.2, told.set).start()
            raise KeyboardInterrupt
        yield

    monkeypatch.setattr(picture_index, "load_image", slow)
    monkeypatch.setattr(picture_index, "_looked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        look(photos, model, "", batch=40)
    assert len(begun) <= picture_index.READERS


def test_a_rename_of_all_survives_an_interrupt(photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    look(photos, model)
    (photos / "sub").mkdir()
    for path in list(photos.glob("*.png")):
        path.rename(photos / "sub" / path.name)
    make_pictures(photos, 1, first=50)  # the first to be looked at
    embedded = list[int]()

    def interrupted(_self: PictureEncoder, pixels: Tensor) -> Tensor:
        embedded.append(len(pixels))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PictureEncoder, "embed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            look(photos, model, batch=1)
    monkeypatch.setattr(PictureEncoder, "embed", lambda _, pixels: embedded.append(len(pixels)) or torch.ones(1, 24))
    assert look(photos, model, "", batch=1).changes.total == 7
    assert embedded == [1, 1], "a picture that was moved was embedded again"


def test_two_at_once_end_with_both_their_work(photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    """Within one run another begins and ends, which has seen a picture more."""
    embed, inner = PictureEncoder.embed, list[search.Found]()

    def meanwhile(self: PictureEncoder, pixels: Tensor) -> Tensor:
        if not inner:
            inner.append(None)  # type: ignore[arg-type]
            make_pictures(photos / "later", 1, first=30)
            inner[0] = look(photos, model, batch=6)
        return embed(self, pixels)

    monkeypatch.setattr(PictureEncoder, "embed", meanwhile)
    outer = look(photos, model, batch=6)
    assert outer.hits == tuple(hit for hit in inner[0].hits if hit.path != "later/030.png")
    kept = picture_index.read(outer.where)
    assert kept is not None
    assert {each.path for each in kept.pictures} >= {f"{number:03}.png" for number in range(6)}


def test_what_another_process_saved_is_not_lost(photos: Path, model: Path, tmp_path: Path):
    """A save in the middle of a run takes in what has come to the file since."""
    found = look(photos, model, index=str(tmp_path / "index"))
    whole = picture_index.read(found.where)
    assert whole is not None
    nothing = replace(whole, pictures=(), embeddings=whole.embeddings[:0])
    file = IndexFile(tmp_path / "shared", named=True)
    update = picture_index.Update(nothing, file)
    picture_index.write(tmp_path / "shared", whole)
    update._save()
    kept = picture_index.read(tmp_path / "shared")
    assert kept is not None
    assert kept.pictures == whole.pictures


# The file


ENTRY = st.builds(
    Picture,
    st.text(max_size=20) | st.binary(max_size=8).map(os.fsdecode),
    st.integers(0, 2**62),
    st.integers(-(2**62), 2**62),
    st.text("0123456789abcdef", min_size=1, max_size=8),
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ENTRY, max_size=5), st.lists(ENTRY, max_size=3), st.integers(1, 9))
def test_an_index_is_read_as_it_was_written(
    tmp_path: Path, pictures: list[Picture], unreadable: list[Picture], width: int
):
    rows = torch.randn(len(pictures), width).half()
    index = PictureIndex("a model", "digest", "/photos", tuple(pictures), rows, tuple(unreadable))
    picture_index.write(tmp_path / "index", index)
    found = picture_index.read(tmp_path / "index")
    assert found is not None
    assert found.same_pictures(index)
    assert (found.model, found.digest, found.folder) == ("a model", "digest", "/photos")
    assert torch.equal(found.embeddings, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def whole_index() -> bytes:
    pictures = tuple(Picture(f"{name}.png", 10, 20, name) for name in "abc")
    path = Path(os.environ["TINYCHAT_CACHE"]) / "whole"
    picture_index.write(path, PictureIndex("m", "d", "f", pictures, torch.ones(3, 4).half()))
    data = path.read_bytes()
    path.unlink()
    return data


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_are_an_index_or_a_sentence(tmp_path: Path, data: st.DataObject):
    whole = whole_index()
    at, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 20))
    patched = whole[:at] + data.draw(st.binary(max_size=20)) + whole[at + length :]
    (tmp_path / "index").write_bytes(data.draw(st.sampled_from([patched, whole[:at], data.draw(st.binary())])))
    try:
        found = picture_index.read(tmp_path / "index")
    except FormatError as error:
        assert re.search(r"the index .*index is damaged \(", str(error))
    else:
        assert found is not None
        assert torch.equal(found.embeddings, torch.ones(3, 4).half())
        assert [each.path for each in found.pictures] == ["a.png", "b.png", "c.png"]


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of an index, and make its checksum fit."""
    rows = load_file(path)[picture_index.ROWS]
    with picture_index.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[picture_index.KEY])
    change(header)
    lists = {name: header.get(name) for name in ("pictures", "unreadable")}
    header["checksum"] = picture_index._checksum(lists, rows)
    save_file({picture_index.ROWS: rows}, path, metadata={picture_index.KEY: json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h.update(schema="tinychat.pictures/9"), "schema 'tinychat.pictures/9', this tinychat knows"),
        (lambda h: h["pictures"].pop(), r"\[3, 4\] numbers are there for 2 pictures"),
        (lambda h: h["pictures"].__setitem__(0, [1]), "not enough values to unpack"),
        (lambda h: h["pictures"].__setitem__(0, ["a", None, 0, "", ""]), "int"),
        (lambda h: h.update(pictures=None), "NoneType"),
        (lambda h: h.pop("digest"), "digest"),
    ],
)
def test_a_header_that_fits_nothing_is_a_sentence(change: Callable[..., object], reason: str, tmp_path: Path):
    path = tmp_path / "index"
    path.write_bytes(whole_index())
    reseal(path, change)
    with pytest.raises(FormatError, match=reason):
        picture_index.read(path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: data[:-1] + b"\x00", lambda _: b"", os.urandom]
)
def test_a_damaged_index_is_made_anew(photos: Path, model: Path, damage: Callable[[Any], bytes], counts: Counts):
    first = look(photos, model)
    data = first.where.read_bytes()
    first.where.write_bytes(damage(100) if damage is os.urandom else damage(data))
    again = look(photos, model)
    assert len(again.notes) == 1
    assert re.fullmatch(rf"the index {again.where} is damaged \(.*\); it was made anew", again.notes[0], re.DOTALL)
    assert (again.hits, counts.embedded) == (first.hits, 12)
    assert look(photos, model).notes == ()


def test_a_file_that_is_no_index_is_never_overwritten(photos: Path, model: Path):
    mine = photos / "000.png"
    before = mine.read_bytes()
    for flags in ({}, {"rebuild": True}):
        with pytest.raises(UsageError, match=r"000\.png is not an index of tinychat search; give --index another"):
            look(photos, model, index=str(mine), **flags)
    with pytest.raises(UsageError, match="is not an index of tinychat search"):
        look(photos, model, index=str(model / "model.safetensors"))
    assert mine.read_bytes() == before


def test_another_models_index_is_not_mixed(photos: Path, model: Path, siglip: Path, tmp_path: Path):
    index = str(tmp_path / "index")
    look(photos, model, index=index)
    with pytest.raises(UsageError, match=r"index is the index of .*clip.*; give --index another file, or --rebuild"):
        look(photos, siglip, index=index)
    rebuilt = look(photos, siglip, index=index, rebuild=True)
    assert rebuilt.hits == look(photos, siglip).hits


def test_another_folders_index_is_not_mixed(photos: Path, model: Path, tmp_path: Path):
    index, others = str(tmp_path / "index"), make_pictures(tmp_path / "others", 3, first=20)
    look(photos, model, index=index)
    message = r"index is the index of the folder .*photos, and this is .*others; give .*--rebuild, also where .* moved"
    with pytest.raises(UsageError, match=message):
        look(others, model, index=index)
    assert look(photos, model, index=index).changes == picture_index.Changes(6, 0, 0, 0)
    assert look(others, model, index=index, rebuild=True).changes == picture_index.Changes(3, 3, 0, 0)


def test_an_index_may_lie_in_the_folder_itself(photos: Path, model: Path, counts: Counts):
    for _ in range(2):
        assert look(photos, model, index=str(photos / "index.safetensors")).changes.total == 6
    assert counts.embedded == 6


def test_nothing_is_written_into_the_folder(photos: Path, model: Path):
    before = sorted(photos.iterdir())
    found = look(photos, model)
    assert sorted(photos.iterdir()) == before
    assert found.where.parent == Path(os.environ["TINYCHAT_CACHE"]) / "search"


def test_an_index_that_cannot_be_written(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Counts
):
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "index")
    with pytest.raises(UsageError, match=r"file/index cannot be written \(.*\); give --index a file that can be"):
        look(photos, model, index=where)
    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path / "file"))
    found = look(photos, model)
    assert len(found.hits) == 6
    assert found.notes[0].startswith("the index could not be kept in ")


# What lies in folders


def test_what_cannot_be_read_is_named_and_left_out(photos: Path, model: Path, counts: Counts):
    (photos / "text.png").write_text("not a picture")
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "cut.png").write_bytes((photos / "000.png").read_bytes()[:60])
    (photos / "broken.png").symlink_to(photos / "nowhere.png")
    os.mkfifo(photos / "pipe.png")
    found = look(photos, model)
    assert found.changes == picture_index.Changes(6, 6, 0, 5)
    assert [note.split()[0] for note in found.notes] == ["broken.png", "cut.png", "empty.jpg", "pipe.png", "text.png"]
    assert "broken.png is a broken link" in found.notes
    assert "pipe.png is not a regular file" in found.notes
    assert "text.png is a text file, not a picture" in found.notes
    assert "empty.jpg is empty (0 bytes)" in found.notes
    counts.read.clear()
    again = look(photos, model)
    assert (counts.read, again.notes, again.changes.new) == ([], found.notes, 0)
    picture(60).save(photos / "text.png")
    (photos / "broken.png").unlink()
    assert look(photos, model).changes == picture_index.Changes(7, 1, 0, 3)


def test_what_could_not_be_read_once_is_read_again(
    photos: Path, model: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
):
    open_file = Path.open

    def refused(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == "003.png":
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        for _ in range(2):
            found = look(photos, model)
            assert (found.changes.total, found.changes.unreadable) == (5, 1)
            assert found.notes[0].startswith("003.png cannot be read ([Errno 13]")
    again = look(photos, model)
    assert (again.changes, again.notes) == (picture_index.Changes(6, 1, 0, 0), ())
    assert counts.read.count("003.png") == 3


def test_many_that_cannot_be_read_are_counted(photos: Path, model: Path):
    for number in range(14):
        (photos / f"bad{number:02}.png").write_text("no")
    notes = look(photos, model).notes
    assert len(notes) == 11
    assert notes[-1] == "4 more cannot be read"


def test_few_pixels_are_decoded_at_once(photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    pixels, held, most = PictureEncoder.pixels, list[int](), list[int]()

    def counted(self: PictureEncoder, image: Any) -> Tensor:
        held.append(40 * 36)
        most.append(sum(held))
        time.sleep(0.02)  # the others would come in between
        held.pop()
        return pixels(self, image)

    monkeypatch.setattr(PictureEncoder, "pixels", counted)
    monkeypatch.setattr(picture_index, "AT_ONCE", 2 * 40 * 36)
    assert look(photos, model).changes.total == 6
    assert max(most) <= 2 * 40 * 36
    monkeypatch.setattr(picture_index, "AT_ONCE", 1)
    assert look(photos, model, rebuild=True).changes.total == 6
    assert max(most[-6:]) == 40 * 36, "a picture of more than all goes alone"


def test_too_large_pictures_are_left_out(photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    from tinychat.inputs import images

    picture(1, (80, 80)).save(photos / "large.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 80 * 80 - 1)
    assert look(photos, model).notes == (
        "large.png has 80 x 80 = 0.0 megapixels, the limit is 0; scale the picture down",
    )


def test_hidden_files_and_links_to_folders_are_left_out(tmp_path: Path):
    folder = make_pictures(tmp_path / "photos", 1)
    for hidden in (".git", ".thumbnails/large"):
        make_pictures(folder / hidden, 1, first=5)
    picture(3).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("text")
    (folder / "loop").symlink_to(folder)
    (folder / "loop.png").symlink_to(folder)
    (folder / "link.png").symlink_to(folder / "000.png")
    (folder / "album.png").mkdir()
    picture(4).save(folder / "album.png" / "UPPER.JPG")
    assert [each.path for each in pictures_in(folder, True)] == ["000.png", "album.png/UPPER.JPG", "link.png"]
    assert [each.path for each in pictures_in(folder, False)] == ["000.png", "link.png"]


def test_a_link_to_itself_is_a_broken_link(photos: Path, model: Path):
    (photos / "loop.png").symlink_to("loop.png")
    found = look(photos, model)
    assert (found.changes, found.notes) == (picture_index.Changes(6, 6, 0, 1), ("loop.png is a broken link",))


def test_a_folder_that_cannot_be_opened_is_named(photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    (photos / "locked").mkdir()
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert look(photos, model).notes == ("locked cannot be opened: Permission denied",)


NAMES = ("größe 日本 🙂.png", "a\tb\nc\x1b[31m.png", "[red]x[bold].png", "-n.png")


def test_names_of_all_kinds(tmp_path: Path, model: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    bad = os.fsdecode(b"caf\xe9.png")
    for number, name in enumerate((*NAMES, bad)):
        picture(number).save(tmp_path / "x.png")
        (tmp_path / "x.png").rename(folder / name)
    found = look(folder, model)
    assert set(paths(look(folder, model))) == {*NAMES, bad}, "read back from the index"
    assert {each["path"] for each in json.loads(json.dumps(found.json))["results"]} == {*NAMES, bad}
    out = io.StringIO()
    draw_found(found.shown("photos"), out)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert {line.split("\t", 1)[1] for line in lines} == {
        "photos/größe 日本 🙂.png", "photos/a b c[31m.png", "photos/[red]x[bold].png", "photos/-n.png",
        "photos/caf\ufffd.png",
    }  # fmt: skip


def test_too_many_pictures(photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(picture_files, "MOST", 5)
    with pytest.raises(TinychatError, match="has more than 5 pictures; search the folders in it one by one"):
        look(photos, model)


def test_a_picture_of_another_size_has_changed_though_it_is_as_old(photos: Path, model: Path, counts: Counts):
    look(photos, model)
    before = (photos / "000.png").stat()
    picture(70, (60, 50)).save(photos / "000.png")
    assert (photos / "000.png").stat().st_size != before.st_size
    os.utime(photos / "000.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert look(photos, model).changes.new == 1
    assert counts.embedded == 7


def test_pictures_that_are_as_alike_keep_their_order():
    """By their paths, through many: a sort that is not stable leaves a few as they were."""
    pictures = tuple(Picture(f"{number:04}.png", 1, 1) for number in range(3000))
    index = PictureIndex("m", "d", "f", pictures, torch.ones(3000, 2, dtype=torch.float16))
    assert [found.path for _, found in index.rank(torch.ones(2))] == [each.path for each in pictures]


# What is refused


def test_folders_that_are_none(photos: Path, model: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    make_pictures(empty / "deeper", 1)
    with pytest.raises(UsageError, match="empty holds no pictures, not counting the folders in it; give a folder"):
        look(empty, model, recursive=False)
    shutil.rmtree(empty / "deeper")
    with pytest.raises(UsageError, match="empty holds no pictures; give a folder with"):
        look(empty, model)
    with pytest.raises(UsageError, match="there is no folder .*nowhere"):
        look(tmp_path / "nowhere", model)
    with pytest.raises(UsageError, match=r"000\.png is a file; give a folder of pictures, and a picture by --like"):
        look(photos / "000.png", model)


def test_nothing_that_can_be_read(tmp_path: Path, model: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_text("no")
    with pytest.raises(MediaError, match=r"none of the 1 pictures in .* can be read: a\.png is a text file"):
        look(tmp_path / "photos", model)


def test_a_picture_to_look_for_that_is_none(photos: Path, model: Path):
    with pytest.raises(MediaError, match=r"nothing\.png does not exist"):
        look(photos, model, "", like=str(photos / "nothing.png"))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({}, 'a folder is needed; write tinychat search DIR "what it shows"'),
        ({"folder": "x", "words": [" "]}, "the query is empty; write what the pictures show"),
    ],
)
def test_flags_that_say_nothing(flags: dict[str, Any], reason: str):
    with pytest.raises(UsageError) as error:
        SearchFlags(**flags)
    assert str(error.value).startswith(reason)


def test_a_dtype_that_is_none():
    assert (dtype_of(None, CPU), dtype_of("bf16", CPU)) == (torch.float32, torch.bfloat16)
    assert dtype_of(None, torch.device("cuda")) == torch.float16
    with pytest.raises(UsageError, match="dtype is 'int8'; give one of float16"):
        dtype_of("int8", CPU)


def test_flags_are_checked_where_nothing_is_to_do(photos: Path, model: Path):
    look(photos, model, "")
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        look(photos, model, "", dtype="int8")


def test_a_dtype_that_is_too_small(model: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = PictureEncoder(open_source(str(model), None), CPU, torch.float16)
    monkeypatch.setattr(encoder.model, "get_image_features", lambda pixels: pixels.sum((1, 2, 3))[:, None] * 70000)
    with pytest.raises(ModelError, match="the model computes what float16 cannot hold; give --dtype fp32"):
        encoder.embed(torch.ones(2, 3, 8, 8))


def test_half_precision_ranks_alike(photos: Path, model: Path):
    exact = {hit.path: hit.score for hit in look(photos, model).hits}
    rough = {hit.path: hit.score for hit in look(photos, model, dtype="bf16", rebuild=True).hits}
    assert rough != exact
    assert rough == pytest.approx(exact, abs=0.05)


def test_a_chat_model_is_refused(photos: Path, tmp_path: Path):
    make_tiny_model(tmp_path / "chat")
    with pytest.raises(ModelError, match="search compares by CLIP or SigLIP; give one, such as --model"):
        look(photos, tmp_path / "chat")


def edited(model: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    copy = shutil.copytree(model, to)
    raw = json.loads((copy / "config.json").read_text())
    change(raw)
    (copy / "config.json").write_text(json.dumps(raw))
    return copy


def test_configs_that_are_none(model: Path, tmp_path: Path):
    nameless = edited(model, tmp_path / "nameless", lambda raw: raw.pop("model_type"))
    with pytest.raises(ModelError, match="nameless does not say what it is, and search compares by CLIP"):
        open_source(str(nameless), None)
    tower = edited(model, tmp_path / "tower", lambda raw: raw.pop("text_config"))
    with pytest.raises(ModelError, match="search compares by CLIP or SigLIP"):
        open_source(str(tower), None)
    wrong = edited(model, tmp_path / "wrong", lambda raw: raw["text_config"].update(hidden_size="wide"))
    odd = edited(model, tmp_path / "odd", lambda raw: raw["vision_config"].update(hidden_act="none such"))
    with pytest.raises(FormatError, match="is not the config of a clip model"):
        open_source(str(wrong), None)
    with pytest.raises(ModelError, match="none such"):
        open_source(str(odd), None)


def test_weights_that_do_not_fit_are_listed(model: Path, tmp_path: Path):
    copy = shutil.copytree(model, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["text_model.final_layer_norm.bias"], weights["visual_projection.weight"]
    weights["text_projection.weight"] = torch.zeros(3, 32)
    weights["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]  # old checkpoints have it
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(ModelError) as error:
        open_source(str(copy), None)
    for part in (
        "2 missing: text_model.final_layer_norm.bias, visual_projection.weight",
        "1 misshapen: text_projection.weight is [3, 32], [24, 32] is needed",
    ):
        assert part in str(error.value)
    assert "position_ids" not in str(error.value)


def test_processors_that_do_not_fit(photos: Path, model: Path, tmp_path: Path):
    copy = shutil.copytree(model, tmp_path / "copy")
    size = {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 48, "width": 48}}
    (copy / "preprocessor_config.json").write_text(json.dumps(size))
    with pytest.raises(ModelError, match="the image processor makes 48 x 48 pixels, the model takes 32 x 32"):
        look(photos, copy)
    (copy / "preprocessor_config.json").unlink()
    assert len(look(photos, copy).hits) == 6, "the family's usual processor"
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match="the tokenizer in .*copy cannot be read"):
        look(photos, copy)


@pytest.mark.parametrize("family", ["model", "siglip"])
@pytest.mark.parametrize(
    "values",
    [
        {"size": "x"}, {"size": [1]}, {"size": {"height": "x", "width": 3}}, {"crop_size": "x"}, {"image_mean": [1]},
        {"resample": 99}, {"rescale_factor": "x"}, {"image_processor": "x"},
    ],
)  # fmt: skip
def test_processors_with_values_that_cannot_work(
    family: str, values: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
):
    copy = shutil.copytree(request.getfixturevalue(family), tmp_path / "copy")
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(FormatError, match=r"preprocessor_config\.json describes no image processor that works \("):
        PictureEncoder(open_source(str(copy), None), CPU, torch.float32)


@pytest.mark.parametrize("values", [{"patch_size": 0}, {"patch_size": -1}, {"num_attention_heads": 0}])
@pytest.mark.parametrize("family", ["model", "siglip"])
def test_configs_with_sizes_that_cannot_be(
    family: str, values: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
):
    whole: Path = request.getfixturevalue(family)
    copy = edited(whole, tmp_path / "copy", lambda raw: raw["vision_config"].update(values))
    with pytest.raises(FormatError, match=r"is not the config of a .* model \((vision_config has the|integer modulo)"):
        open_source(str(copy), None)


def rewritten(model: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    copy = shutil.copytree(model, to)
    raw = json.loads((copy / "tokenizer.json").read_text())
    change(raw)
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    return copy


def word_level(raw: dict[str, Any]) -> None:
    raw["model"] = {"type": "WordLevel", "vocab": {"a": 5}, "unk_token": "none"}


def far_ids(raw: dict[str, Any]) -> None:
    raw["model"]["vocab"] = {word: index if index < 3 else index + 500 for word, index in raw["model"]["vocab"].items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda raw: raw.pop("model"), "the tokenizer in .*copy cannot be read"),
        (word_level, "the tokenizer in .*copy cannot be read .*UNK"),
        (far_ids, r"the tokenizer makes the id \d+, and the model knows 259 tokens; take the tokenizer that belongs"),
    ],
)
def test_tokenizers_that_do_not_work(change: Callable[..., object], sentence: str, model: Path, tmp_path: Path):
    copy = rewritten(model, tmp_path / "copy", change)
    with pytest.raises(ModelError, match=sentence):
        PictureEncoder(open_source(str(copy), None), CPU, torch.float32)


@pytest.mark.parametrize("family", ["model", "siglip"])
def test_a_model_without_a_tokenizer(family: str, tmp_path: Path, request: pytest.FixtureRequest):
    copy = shutil.copytree(request.getfixturevalue(family), tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"copy has no tokenizer \(tokenizer\.json, .*; copy tokenizer\.json and"):
        PictureEncoder(open_source(str(copy), None), CPU, torch.float32)


def test_memory_that_does_not_suffice(photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    encoder = PictureEncoder(open_source(str(model), None), CPU, torch.float32)
    monkeypatch.setattr(encoder.model, "get_image_features", full)
    with pytest.raises(TinychatError, match=r"4 pictures at once are too many: CUDA out of memory; give a smaller"):
        encoder.embed(torch.zeros(4, 3, 32, 32))


def test_without_an_embedded_model_one_is_asked_for(photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(picture_encoder, "EMBEDDED", tmp_path / "none")
    with pytest.raises(UsageError, match="no embedded model for searching; name one, such as --model openai/clip"):
        search.perform(SearchFlags(folder=str(photos), words=["x"]), CPU, lambda _: None)


# The command line


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["search", *arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def test_json_has_the_documented_keys(photos: Path, model: Path, run: Callable[..., tuple[int, str, str]]):
    (photos / "bad.png").write_text("no")
    code, out, err = run(str(photos), "a", "blue cup", "-m", str(model), "-n", "2", "--json")
    found = json.loads(out)
    json_keys.check(found, "tinychat.search/1")
    assert (code, found["query"], found["like"], found["folder"]) == (0, TEXT, None, str(photos.resolve()))
    assert found["indexed"] == {"total": 6, "new": 6, "removed": 0, "unreadable": 1}
    assert [each["rank"] for each in found["results"]] == [1, 2]
    assert err == "bad.png is a text file, not a picture\n"


def test_piped_lines_are_scores_and_paths(photos: Path, model: Path, run: Callable[..., tuple[int, str, str]]):
    code, out, err = run(str(photos), TEXT, "--model", str(model), "--top", "3", "--device", "cpu")
    lines = [line.split("\t") for line in out.splitlines()]
    assert (code, err, len(lines)) == (0, "", 3)
    assert all(Path(path).is_file() for _, path in lines)
    scores = [float(score) for score, _ in lines]
    assert scores == sorted(scores, reverse=True)
    assert run(str(photos), "--model", str(model))[1].startswith(f"{photos}: 6 pictures are indexed (0 new")


def test_print0_writes_paths_as_they_are(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
):
    names = [*NAMES, os.fsdecode(b"caf\xe9.png")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, name in enumerate(names):
        picture(number).save("x.png")
        Path("x.png").rename(name)
    wanted = {os.fsencode(f"./{name}" if name.startswith("-") else name) for name in names}
    assert cli.main(["search", ".", "--like", "~/-n.png", "-m", str(model), "-0"]) == 0
    *found, end = capfdbinary.readouterr().out.split(b"\0")
    assert (set(found), found[0], end) == (wanted, b"./-n.png", b"")
    assert cli.main(["search", "~", "x", "-m", str(model), "--print0"]) == 0
    *found, _ = capfdbinary.readouterr().out.split(b"\0")
    assert set(found) == {os.fsencode(tmp_path / name) for name in names}


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "error: a folder is needed"),
        (("nowhere", "x"), 2, "error: there is no folder nowhere"),
        (("{photos}", "x", "-m", "{photos}"), 3, "error: .*config.json was looked for"),
        (("{photos}", "--like", "no.png", "-m", "{model}"), 4, r"error: no\.png does not exist"),
        (("{photos}", "x", "-n", "0"), 2, "error: "),
    ],
)
def test_errors_have_their_codes(
    arguments: tuple[str, ...], code: int, sentence: str, photos: Path, model: Path,
    run: Callable[..., tuple[int, str, str]],
):  # fmt: skip
    ended, out, err = run(*(each.format(photos=photos, model=model) for each in arguments))
    assert (ended, out) == (code, "")
    assert re.match(sentence, err)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("{photos}/locked/deep", "x"), 2),
        (("{photos}", "x", "-m", "{photos}/locked/model"), 3),
        (("{photos}", "x", "-m", "{model}", "--index", "{photos}/locked/index"), 2),
    ],
)
def test_what_may_not_be_looked_at_is_a_sentence(
    arguments: tuple[str, ...], code: int, photos: Path, model: Path,
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """As below a folder that may not be entered, which a superuser may."""
    stat = Path.stat

    def refused(path: Path, **more: Any) -> os.stat_result:
        if path.parent.name == "locked":
            raise PermissionError(13, "Permission denied")
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", refused)
    ended, out, err = run(*(each.format(photos=photos, model=model) for each in arguments))
    assert (ended, out) == (code, "")
    assert re.match(r"error: .*locked/\w+ cannot be looked at \(Permission denied\)", err)


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_devices_that_are_not_used(device: str, photos: Path, run: Callable[..., tuple[int, str, str]]):
    code, _, err = run(str(photos), "x", "--device", device)
    assert (code, err.splitlines()[0]) == (
        2,
        f"error: {device} is a device that tinychat does not use; give cpu, cuda or cuda:N",
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    draw_found([(0.51234, "photos/[red]a[/red]\x1b[2J.png")], out)
    assert "score" in out.getvalue()
    assert "0.512" in out.getvalue()
    assert "photos/[red]a[/red][2J.png" in out.getvalue()
    plain = Terminal()
    draw_found([(0.5, "a.png")], plain, plain=True)
    assert plain.getvalue() == "0.500\ta.png\n"


def test_the_embedded_model_has_no_revisions() -> None:
    with pytest.raises(UsageError, match="--revision is main, and the embedded model has no others; leave it out"):
        open_source(None, "main")
