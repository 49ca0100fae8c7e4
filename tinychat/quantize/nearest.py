"""A float model rounded to nearest in memory: what a search is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from awq.rounding import Rounding
from tinychat.errors import ModelError
from tinychat_kernels import layout
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import QuantSpec

if TYPE_CHECKING:
    from tinychat.models.vila_llama import VilaLlamaForCausalLM


def round_to_nearest(model: VilaLlamaForCausalLM, spec: QuantSpec) -> None:
    """Give the linears of the decoder's layers, in place, the values that 4-bit ones with float16 scales stand for.

    Raises ModelError for a size that does not divide by the group size, before anything is changed.
    """
    linears = {name: part for name, part in model.llm.model.layers.named_modules() if isinstance(part, nn.Linear)}
    for name, linear in linears.items():
        try:
            spec.group(linear.in_features)
        except LayoutError as error:
            raise ModelError(f"layer {name} cannot be quantized: {error}", "choose another group size") from error
    for linear in linears.values():
        linear.weight.data.copy_(rounded(linear.weight.data, spec))


def rounded(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """A weight `[N, K]` -> fp32, rounded to the nearest."""
    return layout.dequantize(Rounding(spec, torch.float16).logical(weight), torch.float32)
