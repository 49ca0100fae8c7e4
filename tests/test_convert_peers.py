"""What we convert gives our logits in transformers with the packages that read it. Left out where they are missing."""

from __future__ import annotations

from pathlib import Path

import peer_logits
import pytest
import torch
from packed_folders import packed_folder, without_zero_points

from tinychat.convert import convert
from tinychat.load import load_model
from tinychat_kernels.formats import COMPRESSED_TENSORS, GEMM

pytestmark = pytest.mark.filterwarnings("ignore")
PEERS = {"awq-gemm": "gptqmodel", "compressed-tensors": "compressed_tensors"}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What files mean is compared, not kernels: ours that round activations stay out."""
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")


def source_for(to: str, folder: Path, layout: str) -> Path:
    """Symmetric for compressed-tensors: transformers 5.23 with version 0.20 of it cannot load packed zero points."""
    if to == "awq-gemm":
        return packed_folder(folder, GEMM, layout)
    return without_zero_points(packed_folder(folder, COMPRESSED_TENSORS, layout))


@torch.no_grad()
def check(ours_in: Path, theirs_in: Path, kind: str) -> None:
    import transformers

    theirs = getattr(transformers, kind).from_pretrained(theirs_in, dtype=torch.float32, device_map="cpu").eval()
    ours = load_model(ours_in, dtype="float32", device="cpu")
    ids = torch.arange(3, 23)[None]
    wanted, found = theirs(input_ids=ids).logits.float(), ours(input_ids=ids).logits
    found = found[..., : wanted.shape[-1]]
    assert float((wanted - found).norm() / found.norm()) < 2e-2
    assert torch.equal(wanted.argmax(-1), found.argmax(-1))


@pytest.mark.parametrize("to", PEERS)
def test_text(tmp_path: Path, to: str) -> None:
    pytest.importorskip(PEERS[to])
    source = source_for(to, tmp_path / "source", "text")
    convert(source, tmp_path / "out", to)
    check(source, tmp_path / "out", "AutoModelForCausalLM")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_head(tmp_path: Path, bits: int, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors")
    source = source_for("compressed-tensors", tmp_path / "source", "text")
    convert(source, tmp_path / "out", "compressed-tensors", lm_head_bits=bits)
    peer_logits.compare(tmp_path / "out", f"head of {bits} bits by tinychat convert", capfd)


@pytest.mark.parametrize("to", PEERS)
def test_llava(tmp_path: Path, to: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(PEERS[to])
    source = source_for(to, tmp_path / "source", "vila")
    convert(source, tmp_path / "out", to)
    check(tmp_path / "out", tmp_path / "out", "LlavaForConditionalGeneration")
    peer_logits.compare(tmp_path / "out", f"VILA folder as {to} by tinychat convert", capfd)
