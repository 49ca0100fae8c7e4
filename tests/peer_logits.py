"""One prompt, in our model and in one of transformers that reads the same folder with another program's kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinychat.load import load_model
from tinychat.models.vila_fusion import IMAGE_TOKEN_INDEX

KINDS = {False: "AutoModelForCausalLM", True: "LlavaForConditionalGeneration"}
LIMIT = 2e-2


def tokens(features: int, image: int) -> Tensor:
    """A prompt, with `features` placeholders `image` in it."""
    return torch.cat([torch.arange(3, 8), torch.full((features,), image), torch.arange(8, 23)])[None]


@torch.no_grad()
def compare(folder: Path, told: str, capfd: pytest.CaptureFixture[str], theirs: Any = None) -> None:
    """Fail where the logits are further apart than LIMIT, in parts of the whole; the figure is printed.

    `theirs`: the other program's model, where it is not transformers that reads the folder.
    """
    ours = load_model(folder, dtype="float32", device="cpu")
    theirs = theirs or read_by_transformers(folder, KINDS[ours.config.vision is not None])
    if (vision := ours.config.vision) is None:
        wanted, found = theirs(input_ids=tokens(0, 0)), ours(input_ids=tokens(0, 0))
    else:
        picture = torch.randn(1, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
        wide = tokens(ours.config.tokens_per_image, theirs.config.image_token_index)
        wanted = theirs(input_ids=wide, pixel_values=picture)
        found = ours(input_ids=tokens(1, IMAGE_TOKEN_INDEX), images=picture)
    expected = wanted.logits.float()
    error = float((found.logits[..., : expected.shape[-1]] - expected).norm() / expected.norm())
    with capfd.disabled():
        sys.stdout.write(f"\n{told}, with {linear_of(theirs)}: {error:.1e}\n")
    assert error < LIMIT


def read_by_transformers(folder: Path, kind: str) -> Any:
    import transformers

    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def linear_of(model: nn.Module) -> str:
    """What a linear of the decoder is there."""
    found = next(part for name, part in model.named_modules() if name.endswith("layers.0.mlp.down_proj"))
    return type(found).__name__
