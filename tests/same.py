"""When two runs count as the same: logits within 1e-4 of their spread, equal tokens while the top-2 margin is clear."""

from __future__ import annotations

from torch import Tensor

RELATIVE, MARGIN = 1e-4, 1e-3


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Logits `[..., V]` of two runs over the same tokens."""
    assert ours.shape == theirs.shape
    spread = float(theirs.max() - theirs.min()) or 1.0
    worst = float((ours - theirs).abs().max())
    assert worst <= RELATIVE * spread, f"logits differ by {worst}, their spread is {spread}"
    top = theirs.topk(2).values
    clear = (top[..., 0] - top[..., 1]) > MARGIN
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Against a class that nobody here wrote: an absolute tolerance in fp32."""
    assert ours.shape == theirs.shape
    worst = float((ours - theirs).abs().max())
    assert worst <= tolerance, f"largest difference {worst}"
