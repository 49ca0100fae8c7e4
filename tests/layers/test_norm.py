"""RMSNorm against transformers' LlamaRMSNorm."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tinychat.layers.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_equals_transformers_bit_for_bit(dtype: torch.dtype, size: float) -> None:
    """At 300 the squares overflow float16: the mean must be taken in fp32."""
    theirs, ours = LlamaRMSNorm(32, eps=1e-5).to(dtype), RMSNorm(32, eps=1e-5).to(dtype)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(theirs.weight, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    x = (torch.randn((2, 5, 32), generator=generator) * size).to(dtype)
    found = ours(x)
    assert found.dtype == dtype and torch.isfinite(found).all()
    assert torch.equal(found, theirs(x))
