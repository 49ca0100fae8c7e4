"""What `tinychat quantize` writes gives our logits in transformers with GPTQModel. Left out where that is missing.

By hand, with the Python of an environment that has gptqmodel: python -m pytest -q tests/quantize/test_run_peers.py
"""

from __future__ import annotations

from pathlib import Path

import peer_logits
import pytest

from make_tiny_model import make_tiny_model
from tinychat import cli

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ("--group-size", "32", "--calib-samples", "4", "--calib-seqlen", "48", "--scale-grid", "4")


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What files mean is compared, not kernels: ours that round activations stay out."""
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["text", "llava_hf"])
def test_transformers_reads_what_we_quantize(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], layout: str, dtype: str
) -> None:
    pytest.importorskip("gptqmodel")
    source = make_tiny_model(tmp_path / "model", layout, dtype=dtype, hidden_size=128, intermediate_size=256)
    assert cli.main(["quantize", str(source), str(tmp_path / "out"), *QUICK]) == 0
    peer_logits.compare(tmp_path / "out", f"{layout} of {dtype} by tinychat quantize", capfd)
