"""doctor: every part of the report, what it says about a foreign `awq` and a missing GPU, and what clearing deletes."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import json_keys
import pytest

from tinychat import doctor


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with 10 bytes of kernels and a file and a folder of somebody else."""
    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path))
    (tmp_path / "kernels/sm_87").mkdir(parents=True)
    (tmp_path / "kernels/sm_87/a.cubin").write_bytes(b"0123456789")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "theirs").mkdir()
    return tmp_path


def test_the_report_is_the_document_s():
    json_keys.check(json.loads(json.dumps(doctor.report())), "tinychat.doctor/1")


def test_the_cache_report_is_the_document_s(cache: Path):
    found = doctor.cache()
    json_keys.check(found, "tinychat.doctor/1 with --cache")
    assert found["cache"] == {"path": str(cache), "parts": [{"name": "kernels", "bytes": 10}]}


def test_the_text_has_every_part_and_no_control_characters():
    text = doctor.to_text(doctor.report())
    for title, _ in list(doctor.BLOCKS.values())[:-2]:
        assert f"{title}\n  " in text
    assert metadata.version("torch") in text
    assert text.replace("\n", "").isprintable()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))
    assert doctor.versions()["no-such-library"] is None
    assert "no-such-library not installed" in doctor.to_text({"versions": doctor.versions()})


def test_the_processor_is_read_as_the_system_tells(tmp_path: Path):
    (tmp_path / "cpuinfo").write_text("model name\t: Fast 9000\nflags\t\t: fpu avx2 x\n\nmodel name\t: other\n")
    fields = doctor._cpuinfo(tmp_path / "cpuinfo")
    assert (fields["model name"], fields["flags"]) == ("Fast 9000", "fpu avx2 x")
    assert doctor._cpuinfo(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("driver", "runtime", "sentence"),
    [
        (False, None, "no NVIDIA driver is installed here"),
        (True, None, "there is an NVIDIA driver, but torch 2.9.0 is a build for the CPU"),
        (True, "13.0", "torch 2.9.0 is built for CUDA 13.0 and finds no device"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: bool, runtime: str | None, sentence: str
):
    monkeypatch.setattr(doctor, "NVIDIA_SIGNS", (tmp_path,) if driver else ())
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._why_no_cuda("2.9.0", runtime).startswith(sentence)


def test_one_backend_is_taken_and_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    found = doctor.backends()
    assert [backend["name"] for backend in found if backend["taken"]] == ["ref"]
    assert "4-bit models on the CPU run on ref" in doctor.to_text({"backends": found})
    assert "their 16-bit vision towers stay as they are, in plain torch" in doctor.to_text({"backends": found})
    on_cpu = [{**backend, "taken": backend["name"] == "cpu"} for backend in found]
    assert "their 16-bit vision towers run there too, in 8 bits; --tower float" in doctor.to_text({"backends": on_cpu})
    monkeypatch.setenv("TINYCHAT_BACKEND", "warp")
    text = doctor.to_text({"backends": doctor.backends()})
    assert "4-bit models on the CPU run on none of them: see TINYCHAT_BACKEND" in text


def test_a_foreign_awq_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.metadata, "packages_distributions", lambda: {"awq": ["autoawq", "tinychat"]})
    found = doctor.awq_owner()
    assert found["foreign"] == ["autoawq"]
    text = doctor.to_text({"awq": found})
    assert "another distribution has a package awq too: autoawq" in text
    assert "uninstall autoawq" in text


def test_an_installed_awq_that_hides_ours_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "site/awq").mkdir(parents=True)
    (tmp_path / "site/awq/__init__.py").touch()
    info = tmp_path / "site/autoawq-0.2.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: autoawq\nVersion: 0.2.9\n")
    (info / "top_level.txt").write_text("awq\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "awq", raising=False)
    assert doctor.awq_owner() == {"foreign": ["autoawq"], "path": str(tmp_path / "site/awq"), "ours": False}


def test_the_token_is_never_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    report = doctor.report()
    assert report["hub"]["token"] is True
    assert "hf_secret" not in json.dumps(report) + doctor.to_text(report)


def test_clearing_deletes_our_parts_only(cache: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "keep").write_text("keep")
    (cache / "vision").symlink_to(elsewhere)
    assert doctor.clear_cache() == 10
    assert sorted(path.name for path in cache.iterdir()) == ["notes.txt", "theirs", "vision"]
    assert (elsewhere / "keep").read_text() == "keep"


@pytest.mark.parametrize("folder", ["/dev/null/x", "/proc/x/y"])
def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str):
    monkeypatch.setenv("TINYCHAT_CACHE", folder)
    found = doctor.folders()
    assert [one["writable"] for one in found if one["name"] == "cache"] == [False]
    assert f"cache {folder} (not made yet, cannot be written)" in doctor.to_text({"folders": found})
    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path / "a" / "b"))
    assert f"cache {tmp_path}/a/b (not made yet)" in doctor.to_text({"folders": doctor.folders()})


def test_links_count_as_nothing(cache: Path):
    (cache / "kernels/link").symlink_to(cache / "notes.txt")
    assert doctor.folder_bytes(cache / "kernels") == 10


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB"), (2**41, "2048.0 GiB")]
)
def test_sizes_have_the_unit_that_fits(count: int, text: str):
    assert doctor.size(count) == text
