"""One decoder layer: streamed in, run as at inference, quantized by a method, and turned into tensors for the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinychat.checkpoint import stream_into
from tinychat.errors import ModelError
from tinychat.layers.attention import Span
from tinychat.layers.rotary import cos_sin
from tinychat.models.llama import DecoderLayer
from tinychat.quantize.job import Job, Source
from tinychat.search_results import apply_search
from tinychat_kernels import layout
from tinychat_kernels.layout import AwqGemm, Logical, QuantSpec

SEEDS_APART = 1_000_003  # so that the layers of two seeds share none


@dataclass(frozen=True)
class Quantized:
    """A layer's linears in the logical form, its other tensors, and what the search found."""

    weights: Mapping[str, Logical]
    others: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Blocks:
    """The decoder's layers as float32 modules, one at a time."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source = source
        self.device = device
        self.text = source.config.text

    def open(self, i: int) -> DecoderLayer:
        """Layer i with its weights. Raises ModelError where they hold NaN or Inf."""
        with torch.device("meta"):
            block = DecoderLayer(self.text, i)
        stream_into(block, self.source.layer(i), "text", torch.float32, self.device)
        for name, tensor in block.named_parameters():
            tensor.requires_grad_(False)
            check_finite(tensor, f"layer {i}, {name}")
        return block.eval()

    @torch.no_grad()
    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """hidden `[T, D]` -> `[T, D]`: a whole sequence from position 0, causally."""
        positions = torch.arange(len(hidden), device=hidden.device)[None]
        cos, sin = cos_sin(self.text.rope, self.text.head_dim, positions, hidden.dtype)
        return block(hidden[None], Span(cos, sin, [0], None), False)[0][0]


Emit = Callable[[int, Tensor], None] | None
Quantizer = Callable[[Job, Blocks, DecoderLayer, int, Sequence[Tensor], Emit], Quantized]


def to_nearest(
    job: Job, blocks: Blocks, block: DecoderLayer, i: int, inputs: Sequence[Tensor], emit: Emit
) -> Quantized:
    """Round to the nearest: looks at no data, and emits none."""
    from awq.rounding import Rounding

    rounding = Rounding(job.spec, torch.float16)
    weights = {name: rounding.logical(linear.weight) for name, linear in _linears(block).items()}
    return Quantized(weights, _others(block), {"kept": "rtn"})


def by_search(job: Job, blocks: Blocks, block: DecoderLayer, i: int, inputs: Sequence[Tensor], emit: Emit) -> Quantized:
    """Activation-aware: scales and clips searched on the hidden states; emits what the next layer will see."""
    from awq.quantize import quantize_block
    from awq.recipes import recipe_for

    recipe, seed = recipe_for(blocks.text.family), job.calibration.seed * SEEDS_APART + i
    options, stored = job.search_options(), blocks.source.stored_in(blocks.source.layer(i))
    found = quantize_block(block, blocks.run, inputs, recipe, options, seed=seed, emit=emit, stored=stored)
    losses = {name: loss._asdict() for name, loss in found.losses.items()}
    facts = {"kept": found.kept, "loss": found.block_loss._asdict(), "linears": losses}
    return Quantized(found.weights, found.tensors, facts)


def as_given(job: Job, blocks: Blocks, block: DecoderLayer, i: int, inputs: Sequence[Tensor], emit: Emit) -> Quantized:
    """Scaled and clipped as search results say, then rounded to the nearest: looks at no data, and emits none."""
    assert blocks.source.given is not None
    apply_search(blocks.source.given.within(f"llm.model.layers.{i}."), block)
    return replace(to_nearest(job, blocks, block, i, inputs, emit), facts={"kept": "given"})


METHODS: Mapping[str, Quantizer] = {"awq": by_search, "rtn": to_nearest, "given": as_given}


def to_disk(quantized: Quantized, job: Job, source: Source, i: int) -> dict[str, Tensor]:
    """The layer's tensors as the checkpoint holds them, named from the layer.

    Raises ModelError for what 16 bits cannot hold.
    """
    index, tensors = source.layer(i), dict[str, Tensor]()
    for name, tensor in quantized.others.items():
        tensors[name] = narrowed(tensor, source.stored(index.entry(name)), f"layer {i}, {name}")
    for name, logical in quantized.weights.items():
        key = f"{name}.weight"
        if job.pseudo:
            dense = layout.dequantize(logical, torch.float32)
            tensors[key] = narrowed(dense, source.stored(index.entry(key)), f"layer {i}, {key}")
        else:
            packed = _packed(logical, job.spec, f"layer {i}, {name}")
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed._asdict().items()}
    return tensors


def _packed(logical: Logical, spec: QuantSpec, name: str) -> AwqGemm:
    """As the awq format has it, with float16 scales whatever the model's dtype is."""
    scale = logical.scale.half()
    if not bool(torch.isfinite(scale).all()):
        message = f"{name} holds weights so large that their scales are no float16 numbers, which the awq format has"
        raise ModelError(message, "check the checkpoint's weights, or give --pseudo")
    return layout.from_logical(logical._replace(scale=scale), spec)


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise ModelError for NaN or Inf."""
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"{name} holds NaN or Inf values", "check the checkpoint's weights")


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype. Raises ModelError where finite values become infinite."""
    out = tensor.to(dtype)
    if out.dtype.is_floating_point and not bool(torch.isfinite(out).all()):
        message = f"{name} holds values that are no finite {str(dtype).removeprefix('torch.')} numbers"
        raise ModelError(message, "check the checkpoint's weights, or store the model as bfloat16 first")
    return out


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _others(block: nn.Module) -> dict[str, Tensor]:
    weights = {f"{name}.weight" for name in _linears(block)}
    return {name: tensor for name, tensor in block.state_dict().items() if name not in weights}
