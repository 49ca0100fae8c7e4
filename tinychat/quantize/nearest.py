"""A float model becomes a 4-bit one: round to nearest, in memory, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from tinychat.core import Progress
from tinychat.errors import ModelError
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import QuantSpec

if TYPE_CHECKING:
    from tinychat.models.vila_llama import VilaLlamaForCausalLM

SPARED = ("vision_tower", "mm_projector", "lm_head")  # what stays in 16 bit


def quantize_to_nearest(
    model: VilaLlamaForCausalLM, spec: QuantSpec | None = None, scales: torch.dtype = torch.float16
) -> Iterator[Progress]:
    """Replace the linears of the decoder's layers by 4-bit ones, in place; yields after each layer.

    `scales` is the dtype of the scales, which the model is stored in as well. Raises ModelError for a size that does
    not divide by the group size, before anything is changed, or for weights that hold NaN or Inf.
    """
    from tinychat.layers.linear import QuantLinear

    spec = spec or QuantSpec()
    layers = list(model.llm.model.layers)
    for name, linear in _linears(model.llm.model):
        try:
            spec.check(linear.in_features, linear.out_features)
        except LayoutError as error:
            raise ModelError(f"{name} cannot be quantized: {error}", "choose another group size") from error
    nn.Module.to(model, dtype=scales)
    for done, layer in enumerate(layers, 1):
        for name, linear in _linears(layer):
            try:
                layer.set_submodule(name, QuantLinear.from_linear(linear, spec))
            except LayoutError as error:
                raise ModelError(f"layer {done - 1}, {name}: {error}", "check the checkpoint's weights") from error
        yield Progress("", "quantize", done, len(layers))
    model.config.quantization_config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "zero_point": spec.zero_point,
        "modules_to_not_convert": list(SPARED),
    }


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
