"""Work on disk: what counts is what the manifest lists, and a fingerprint tells one work from another."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from awq import save
from awq.save import MANIFEST, SaveError, Work, atomic, differences, part_of, sha256

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(1, dtype=torch.int32)}


def begun(folder: Path) -> Work:
    work = Work.begin(folder, {"options": {"bits": 4}})
    work.commit({"one": work.write("one", TENSORS, {"loss": 0.5})}, seconds=2.5)
    return work


def test_committed_parts_are_found_again(tmp_path):
    begun(tmp_path)
    work = Work.resume(tmp_path)
    assert work.parts["one"].facts == {"loss": 0.5} and work.notes == {"seconds": 2.5}
    assert work.parts["one"].size == (tmp_path / "one.safetensors").stat().st_size
    work.check({"options": {"bits": 4}})


def test_what_was_not_committed_is_removed(tmp_path):
    work = begun(tmp_path)
    work.write("two", TENSORS, {})
    (tmp_path / "three.bin.tmp").write_bytes(b"half")
    assert set(Work.resume(tmp_path).parts) == {"one"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "one.safetensors"]


def test_parts_come_and_go_in_one_step(tmp_path, monkeypatch):
    work = begun(tmp_path)
    two = work.write("two", TENSORS, {})

    def cut(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "sync", cut)
    with pytest.raises(KeyboardInterrupt):
        work.commit({"two": two}, drop=["one"])
    monkeypatch.undo()
    assert set(Work.resume(tmp_path).parts) == {"one"}, "the manifest was not replaced"
    work = Work.resume(tmp_path)
    work.commit({"two": work.write("two", TENSORS, {})}, drop=["one"])
    assert set(Work.resume(tmp_path).parts) == {"two"} and not (tmp_path / "one.safetensors").exists()


def test_files_appear_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a.bin") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert not [*tmp_path.iterdir()]
    with atomic(tmp_path / "a.bin") as file:
        file.write(b"whole")
    part = part_of(tmp_path / "a.bin", {})
    assert (part.file, part.size, part.sha256) == ("a.bin", 5, sha256(tmp_path / "a.bin"))


def test_fingerprints_are_compared_by_name(tmp_path):
    assert differences({"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "c": (1,)}, "d": None}) == ["a: b was 1 and is 2"]
    with pytest.raises(SaveError, match="something else: options: bits was 4 and is 3; model was nothing and is x"):
        begun(tmp_path).check({"options": {"bits": 3}, "model": "x"})
    many = {str(i): i for i in range(9)}
    with pytest.raises(SaveError, match="3 was nothing and is 3 and 5 more; give what it was begun with"):
        Work(tmp_path, {}).check({"options": 1, **many})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "awq.work/1"}', '{"schema": "other"}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(SaveError, match="json (cannot be read|has the schema other).*; delete .* and begin anew"):
        Work.resume(tmp_path)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x")])
def test_a_damaged_part_is_refused(tmp_path, damage):
    begun(tmp_path)
    damage(tmp_path / "one.safetensors")
    with pytest.raises(SaveError, match=r"one\.safetensors \(one\) is missing or damaged"):
        Work.resume(tmp_path)


def test_the_manifest_is_plain_json(tmp_path):
    begun(tmp_path)
    raw = json.loads((tmp_path / MANIFEST).read_text())
    assert raw["schema"] == "awq.work/1" and list(raw["parts"]) == ["one"]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        begun(tmp_path)
