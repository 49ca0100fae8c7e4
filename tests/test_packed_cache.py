"""The cache of packed weights: what comes back is what was kept, and whatever happened to the file is noticed."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tinychat import packed_cache
from tinychat.packed_cache import Place
from tinychat_kernels.cpu import Packed


def bytes_of(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def linears() -> dict[str, Packed]:
    """Of sizes that are no multiple of the alignment, one of them larger than a chunk of the tests."""
    return {
        "layers.0.q_proj": Packed(bytes_of(1000, 1), 128, 16, 32, 4, torch.float16),
        "layers.0.k_proj": Packed(bytes_of(64, 2), 64, 16, 64, 4, torch.bfloat16),
        "lm_head": Packed(bytes_of(5000, 3), 128, 320, 128, 8, torch.float32),
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(packed_cache, "CHUNK", 1024)
    return Place(tmp_path / "packed", "abc")


@pytest.fixture
def kept(place: Place) -> Place:
    assert packed_cache.save(place, linears())
    return place


def same(found: dict[str, Packed] | None, expected: dict[str, Packed]) -> bool:
    if found is None or list(found) != list(expected):
        return False
    pairs = [(found[name], expected[name]) for name in expected]
    facts = ("in_features", "out_features", "group", "bits", "scale")
    return all(
        torch.equal(one.blocks, other.blocks) and all(getattr(one, key) == getattr(other, key) for key in facts)
        for one, other in pairs
    )


def test_what_was_kept_comes_back(kept: Place):
    assert same(packed_cache.load(kept), linears())
    assert [path.name for path in kept.folder.iterdir()] == ["abc.bin"]


def test_linears_lie_side_by_side_and_aligned(kept: Place):
    found = packed_cache.load(kept)
    assert found is not None
    starts = [packed.blocks.data_ptr() for packed in found.values()]
    assert all(start % 64 == 0 for start in starts)
    assert [start - starts[0] for start in starts] == [0, 1024, 1088]


def test_what_is_not_there_is_none(place: Place):
    assert packed_cache.load(place) is None


def test_every_flipped_byte_is_noticed(kept: Place):
    whole = kept.path.read_bytes()
    for at in [0, 17, 18, 25, 26, 29, 30, 60, *range(100, len(whole), 37), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        kept.path.write_bytes(damaged)
        assert packed_cache.load(kept) is None, at
        assert not kept.path.exists()


@pytest.mark.parametrize("size", [0, 5, 17, 29, 40, 500, 2000, -1])
def test_a_truncated_file_is_noticed(kept: Place, size: int):
    kept.path.write_bytes(kept.path.read_bytes()[:size])
    assert packed_cache.load(kept) is None
    assert packed_cache.save(kept, linears()) and same(packed_cache.load(kept), linears())


def test_a_longer_file_is_noticed(kept: Place):
    kept.path.write_bytes(kept.path.read_bytes() + b"x")
    assert packed_cache.load(kept) is None


def test_a_header_that_promises_too_much_is_noticed(kept: Place):
    described = {"q": {"at": 64, "bytes": 64, "in_features": 1, "out_features": 1, "group": 1, "bits": 4}}
    header = packed_cache._header(described, 64, ["758d6336"])  # the checksum of 64 zeros
    kept.path.write_bytes(header + bytes(64))
    assert packed_cache.load(kept) is None


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EIO, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("call", ["preadv", "pread"])
def test_a_file_that_cannot_be_read_now_stays(kept: Place, monkeypatch: pytest.MonkeyPatch, number: int, call: str):
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert packed_cache.load(kept) is None
    assert same(packed_cache.load(kept), linears())


def test_a_file_that_another_deletes_meanwhile_takes_no_room(kept: Place):
    gone = kept.folder / "gone.bin"
    gone.symlink_to(kept.folder / "nowhere")  # listed, but not there when it is looked at
    assert packed_cache.save(Place(kept.folder, "other"), linears())
    assert same(packed_cache.load(kept), linears())


def test_several_writers_leave_one_whole_file(place: Place):
    def write() -> None:
        for _ in range(5):
            assert packed_cache.save(place, linears())

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = packed_cache.load(place)
        assert found is None or same(found, linears())
    assert same(packed_cache.load(place), linears())
    assert [path.name for path in place.folder.iterdir()] == ["abc.bin"]


def test_a_writer_that_fails_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_cache, "_write", fail)
    assert not packed_cache.save(place, linears())
    assert list(place.folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_left_alone(tmp_path: Path):
    (tmp_path / "packed").write_text("a file")
    place = Place(tmp_path / "packed", "abc")
    assert not packed_cache.save(place, linears())
    assert packed_cache.load(place) is None
    assert len(packed_cache.key_of([tmp_path / "packed"], [], place.folder)) == 32


def test_a_folder_that_cannot_be_written_is_read_all_the_same(kept: Place, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # as root no folder would refuse it

    monkeypatch.setattr(packed_cache.tempfile, "mkstemp", refused)
    monkeypatch.setattr(packed_cache.os, "utime", refused)
    assert not packed_cache.save(Place(kept.folder, "other"), linears())
    assert same(packed_cache.load(kept), linears())


def test_the_least_recently_used_goes_where_there_is_no_room(kept: Place, monkeypatch: pytest.MonkeyPatch):
    second, third = Place(kept.folder, "second"), Place(kept.folder, "third")
    assert packed_cache.save(second, linears())
    os.utime(kept.path, (1, 1))
    os.utime(second.path, (2, 2))
    assert same(packed_cache.load(kept), linears())  # now the second is the one not used for longest
    monkeypatch.setattr(packed_cache, "MOST_BYTES", 2 * kept.path.stat().st_size)
    assert packed_cache.save(third, linears())
    assert not second.path.exists() and kept.path.exists() and third.path.exists()


def test_what_a_killed_process_left_is_cleared_away(place: Place):
    place.folder.mkdir(parents=True, exist_ok=True)
    old, young = place.folder / ".old.tmp", place.folder / ".young.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert packed_cache.save(place, linears())
    assert not old.exists() and young.exists()


def test_what_is_larger_than_the_cap_is_not_kept(kept: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_cache, "MOST_BYTES", 5000)
    assert not packed_cache.save(Place(kept.folder, "other"), linears())
    assert kept.path.exists()


def test_a_full_disk_is_not_filled_further(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_cache, "FREE_SHARE", 0.0)
    assert not packed_cache.save(place, linears())


def test_the_key_follows_the_content(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"weights")
    other.write_bytes(b"weights")
    folder = tmp_path / "packed"
    key = packed_cache.key_of([one], ["int8"], folder)
    assert key == packed_cache.key_of([one], ["int8"], folder) == packed_cache.key_of([other], ["int8"], folder)
    assert key != packed_cache.key_of([one], ["float"], folder)
    one.write_bytes(b"WEIGHTS")
    assert key != packed_cache.key_of([one], ["int8"], folder)


def test_a_file_that_did_not_change_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    key = packed_cache.key_of([weights], [], tmp_path)
    monkeypatch.setattr(packed_cache, "_sha256", lambda file: pytest.fail("hashed again"))
    assert packed_cache.key_of([weights], [], tmp_path) == key


@pytest.mark.parametrize("text", ["", "{", "[]", '{"%s": 3}', '{"%s": [1, 2, 3, 4, 5, 6]}', "\x00"])
def test_a_damaged_list_of_hashes_is_made_anew(tmp_path: Path, text: str):
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    key = packed_cache.key_of([weights], [], tmp_path)
    (tmp_path / packed_cache.STATES).write_text(text.replace("%s", str(weights.resolve())))
    assert packed_cache.key_of([weights], [], tmp_path) == key


def test_files_that_are_no_more_are_forgotten(tmp_path: Path):
    paths = [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        path.write_bytes(path.name.encode())
    packed_cache.key_of(paths, [], tmp_path)
    paths[0].unlink()
    paths[1].write_bytes(b"new")
    packed_cache.key_of(paths[1:], [], tmp_path)
    assert list(json.loads((tmp_path / packed_cache.STATES).read_text())) == [str(paths[1].resolve())]
