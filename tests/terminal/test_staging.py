from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image as pillow

from tinychat.core import Image
from tinychat.errors import MediaError
from tinychat.terminal.staging import Staged, from_path, inspect, name_of, stage


def test_a_real_picture_is_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cat.png"
    pillow.new("RGB", (64, 48)).save(path)
    monkeypatch.chdir(tmp_path)
    (staged,) = stage([from_path(Path("cat.png"))], inspect)
    assert staged.label(3) == "[image 3: cat.png, 64x48]"
    data = path.read_bytes()
    assert staged.image == Image(data=data, path=str(path), digest=hashlib.sha256(data).hexdigest())
    path.unlink()
    assert stage([staged.image], inspect) == (staged,)


def test_one_bad_picture_stages_none(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("these are words")
    with pytest.raises(MediaError, match=r"notes.png is a text file, not a picture"):
        stage([from_path(tmp_path / "notes.png")], inspect)
    with pytest.raises(MediaError, match="does not exist"):
        stage([from_path(tmp_path / "none.png")], inspect)


def test_a_name_is_cleaned() -> None:
    evil = Image(path="/tmp/\x1b]0;x\x07\ncat.png")
    assert Staged(evil, 1, 1).label(1) == "[image 1: ]0;x cat.png, 1x1]"
    assert name_of(Image(data=b"x")) == "picture"
