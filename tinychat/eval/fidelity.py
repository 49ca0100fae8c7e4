"""How faithfully a quantized decoder stands for the original, layer by layer: its weights, and what its layers give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tinychat.errors import ModelError
from tinychat_kernels import layout
from tinychat_kernels.layout import HALVES

LAYERS = "llm.model.layers"
OTHERS = ("llm.model.embed_tokens", "llm.lm_head")
ROWS = 4096  # of head and embeddings at once
FITS = 3  # rounds of fitting factors; more change the third decimal
Weight = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Signal-to-quantization-noise ratio in decibels (inf: no error), and cosine similarity."""

    sqnr_db: float
    cosine: float


@dataclass(frozen=True, slots=True)
class LayerFidelity:
    """A decoder layer: its output on held-out data, its weights together, and the SQNR of each of its linears."""

    layer: int
    output: Fidelity
    weights: Fidelity | None = None
    linears: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass
class OutputErrors:
    """Sums over held-out tokens of each layer's relative error and cosine: every token weighs the same."""

    noise: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    cosine: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    tokens: int = 0

    def add(self, ours: Tensor, base: Tensor) -> None:
        """The layers' outputs `[L, T, D]` of both models for one sequence."""
        noise, cosine = zip(*(_compared(x, y) for x, y in zip(ours, base, strict=True)), strict=True)
        if not self.tokens:
            self.noise, self.cosine = torch.zeros(2, len(noise), dtype=torch.float64)
        self.noise = self.noise + torch.stack(noise)
        self.cosine = self.cosine + torch.stack(cosine)
        self.tokens += ours.shape[1]

    def layers(self) -> list[Fidelity]:
        """SQNR of the tokens' mean relative error, and the mean cosine."""
        pairs = zip(self.noise.tolist(), self.cosine.tolist(), strict=True)
        return [Fidelity(decibels(noise / self.tokens), cosine / self.tokens) for noise, cosine in pairs]


def _compared(ours: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, D]` twice -> sums over tokens of |x - y|^2 / |y|^2 and of the cosine."""
    x, y = ours.double(), base.double()
    signal = y.pow(2).sum(1).clamp(min=1e-30)
    cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp(min=1e-30)
    return ((x - y).pow(2).sum(1) / signal).sum(), cosine.clamp(-1, 1).sum()


def decibels(noise_to_signal: float) -> float:
    """-10 log10 of a ratio of powers; inf for 0."""
    return -10 * math.log10(noise_to_signal) if noise_to_signal > 0 else math.inf


def compare_weights(model: nn.Module, base: Weight) -> Iterator[tuple[Fidelity, dict[str, float]]]:
    """For each decoder layer its weights' fidelity together, and each linear's SQNR.

    Raises ModelError where the two models have other sizes.
    """
    layers = model.get_submodule(LAYERS)
    assert isinstance(layers, nn.ModuleList)
    for number, layer in enumerate(layers):
        yield compare_layer(layer, lambda name, number=number: base(f"{LAYERS}.{number}.{name}"))


def compare_layer(layer: nn.Module, base: Weight) -> tuple[Fidelity, dict[str, float]]:
    """The weights of one layer against the original's, which `base` gives by their names in the layer."""
    sums, each = torch.zeros(4, dtype=torch.float64), dict[str, float]()
    for name, module in _linears(layer):
        part = _weight_sums(name, weight_of(module), base(name))
        each[name.rpartition(".")[2]] = _fidelity(part).sqnr_db
        sums += part
    return _fidelity(sums), each


def compare_others(ours: Weight, base: Weight) -> dict[str, Fidelity]:
    """What of head and embeddings is another than in the original, beyond a rounding to 16 bits, by name.

    Raises ModelError where the two models have other sizes.
    """
    found: dict[str, Fidelity] = {}
    for name in OTHERS:
        here, there = ours(name), base(name)
        _check_sizes(name, here, there)
        pairs = list(zip(here.split(ROWS), there.split(ROWS), strict=True))
        if not all(_rounds_to(x, y) for x, y in pairs):
            sums = [_sums(x.float().cpu(), y.float().cpu()) for x, y in pairs]
            found[name.rpartition(".")[2]] = _fidelity(torch.stack(sums).sum(0))
    return found


def _rounds_to(ours: Tensor, base: Tensor) -> bool:
    return any(torch.equal(ours.cpu().to(kind), base.cpu().to(kind)) for kind in HALVES)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight `[N, K]` that a linear or an embedding stands for, fp32 where it is quantized."""
    if isinstance(linear, nn.Linear | nn.Embedding):
        return linear.weight.detach()
    return layout.dequantize(linear.logical(), torch.float32)  # pyright: ignore[reportCallIssue]


def weights_in(model: Any) -> Weight:
    """Reads a loaded model's weights by the names of its linears."""
    return lambda name: weight_of(model.get_submodule(name))


def _linears(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, part) for name, part in layer.named_modules() if isinstance(part, nn.Linear) or hasattr(part, "logical")
    ]


def _weight_sums(name: str, ours: Tensor, base: Tensor) -> Tensor:
    """Sums of base^2, error^2, ours * base and ours^2, after the fit."""
    _check_sizes(name, ours, base)
    y = base.float().cpu()
    return _sums(fitted(ours.float().cpu(), y), y)


def _check_sizes(name: str, ours: Tensor, base: Tensor) -> None:
    if ours.shape != base.shape:
        sizes = f"{list(ours.shape)} here and {list(base.shape)} in the model that it is compared with"
        raise ModelError(f"{name} is {sizes}", "compare a model with the one that it was made from")


def _sums(x: Tensor, y: Tensor) -> Tensor:
    pairs = ((y, y), (x - y, x - y), (x, y), (x, x))
    return torch.tensor([float((a * b).sum(dtype=torch.float64)) for a, b in pairs], dtype=torch.float64)


def fitted(ours: Tensor, base: Tensor) -> Tensor:
    """ours `[N, K]`, each output and each input channel times the factor that brings it nearest to base.

    AWQ moves such factors between a linear and what feeds it (arXiv 2306.00978): they are no errors.
    """
    out, into = torch.ones(len(ours), 1), torch.ones(1, ours.shape[1])
    for _ in range(FITS):
        into = _factor(ours * out, base, 0)
        out = _factor(ours * into, base, 1)
    return ours * out * into


def _factor(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """The least-squares factor of x for y along a dimension; 1 where x is zero."""
    power = x.pow(2).sum(dim, keepdim=True)
    return torch.where(power > 0, (x * y).sum(dim, keepdim=True) / power.clamp(min=1e-30), torch.ones_like(power))


def _fidelity(sums: Tensor) -> Fidelity:
    signal, noise, product, power = sums.tolist()
    cosine = product / math.sqrt(signal * power) if signal * power > 0 else 0.0
    return Fidelity(decibels(noise / signal) if signal else math.inf, min(max(cosine, -1.0), 1.0))


def joined(
    outputs: Sequence[Fidelity], weights: Sequence[tuple[Fidelity, dict[str, float]]]
) -> tuple[LayerFidelity, ...]:
    """A row a layer; `weights` is empty where they could not be compared."""
    if not weights:
        return tuple(LayerFidelity(layer, output) for layer, output in enumerate(outputs))
    pairs = zip(outputs, weights, strict=True)
    return tuple(LayerFidelity(i, output, together, each) for i, (output, (together, each)) in enumerate(pairs))
