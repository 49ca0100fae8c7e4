"""A card without ever holding a model: decoders side by side, a layer at a time, on tokens that are given.

What needs the whole model, answers of its own and probes, is left out. Every model predicts the same right answers,
questions and windows of text; their hidden states wait in files for the next layer.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinychat import load
from tinychat.checkpoint import EMBEDDINGS, HEAD, NORM, Index, stream_into
from tinychat.core import Progress
from tinychat.eval import card, divergence, fidelity
from tinychat.eval.card import Card, CardPlan, Column, Making, Measured, Note
from tinychat.eval.divergence import Compared, Held
from tinychat.eval.fidelity import Fidelity, OutputErrors, Weight
from tinychat.eval.heldout import Item, fingerprint
from tinychat.eval.logits import Predictions
from tinychat.eval.perplexity import answered, exponential, loss, split, text_ids
from tinychat.eval.spill import Spill
from tinychat.inputs.processor import Processor, Prompt
from tinychat.layers.linear import QuantLinear
from tinychat.models.llama import DecoderLayer
from tinychat.quantize.blocks import Blocks
from tinychat.quantize.card_plan import SLICE, STATES
from tinychat.quantize.embedding import Embedder
from tinychat.quantize.job import Source
from tinychat.quantize.nearest import rounded
from tinychat_kernels.layout import QuantSpec

WHOLE = 2**62


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens whose predictions count: `compared` for the divergence, with `targets` for the perplexity."""

    held: Held
    compared: bool
    targets: tuple[int, ...]

    @property
    def prompt(self) -> Prompt:
        """All that is read."""
        return replace(self.held.prompt, ids=(*self.held.prompt.ids, *self.held.answer))


@dataclass(frozen=True)
class Side:
    """One of the models: its layers, and what lies around them."""

    title: str
    source: Source
    open: Callable[[int], DecoderLayer]


@dataclass
class Figures:
    """What has been found of a model."""

    outputs: list[Fidelity] = field(default_factory=list[Fidelity])
    weights: list[tuple[Fidelity, dict[str, float]]] = field(default_factory=list[tuple[Fidelity, dict[str, float]]])
    compared: list[Compared] = field(default_factory=list[Compared])
    loss: float = 0.0


def base_side(source: Source, device: torch.device, title: str) -> Side:
    """The original."""
    return Side(title, source, Blocks(source, device).open)


def nearest_side(base: Side, spec: QuantSpec, title: str) -> Side:
    """The original with its layers rounded to nearest."""

    def opened(i: int) -> DecoderLayer:
        block = base.open(i)
        for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
            linear.weight.data.copy_(rounded(linear.weight.data, spec))
        return block

    return Side(title, base.source, opened)


def packed_side(folder: Path, device: torch.device, title: str) -> Side:
    """A checkpoint that was written, 4-bit weights as the floats that they stand for."""
    opened = load.open_source(folder)
    raw = load.open_index(folder, opened.config)
    source = Source(opened.folder, opened.config, opened.index, raw, int8=opened.int8)
    return Side(title, source, lambda i: _packed_layer(source, opened.spec, i, device))


def _packed_layer(source: Source, spec: QuantSpec | None, i: int, device: torch.device) -> DecoderLayer:
    index = source.layer(i)
    with torch.device("meta"):
        block = DecoderLayer(source.config.text, i)
        for name, module in list(block.named_modules()):
            if spec is not None and isinstance(module, nn.Linear) and f"{name}.qweight" in index:
                sizes = module.in_features, module.out_features
                block.set_submodule(name, QuantLinear(*sizes, spec, bias=module.bias is not None))
    stream_into(block, index, "text", torch.float32, device)
    load.dequantize(block, torch.float32)
    return block.requires_grad_(False).eval()


class Layered:
    """One card in the making. `folder` is for hidden states, and gone afterwards."""

    def __init__(self, sides: Mapping[str, Side], processor: Processor, plan: CardPlan, folder: Path) -> None:
        self.sides, self.processor, self.plan, self.folder = dict(sides), processor, plan, folder
        self.base = self.sides["base"]
        self.blocks = Blocks(self.base.source, torch.device("cpu"))
        self.items = card.items_for(plan, processor)
        self.passages, self.text = _passages(plan, processor, self.items)
        self.figures = {name: Figures() for name in self.sides}

    def making(self, device: torch.device, facts: Mapping[str, Any], left_out: Sequence[str]) -> Making:
        """Yields how far it is, and returns the card."""
        self.blocks = Blocks(self.base.source, device)
        layers = self.base.source.layers
        shutil.rmtree(self.folder, ignore_errors=True)
        states = self._embedded(device)
        yield Progress("", "card", 1, layers + 2)
        for i in range(layers):
            states = self._layer(i, states, last=i + 1 == layers)
            yield Progress("", "card", i + 2, layers + 2)
        self._predictions(states, device)
        yield Progress("", "card", layers + 2, layers + 2)
        shutil.rmtree(self.folder)
        columns = {name: self._column(name) for name in self.sides}
        yield from _notes(columns)
        measured = Measured(
            self.plan.heldout, self.plan.per_kind, fingerprint(self.items), **self.text, dtype="float32"
        )
        return Card(columns, measured, facts, tuple(left_out), card.versions())

    def _spill(self, name: str) -> Spill:
        folder = self.folder / name
        folder.mkdir(parents=True)
        return Spill(folder, STATES)

    def _embedded(self, device: torch.device) -> dict[str, Spill]:
        """What goes into the first layer: the same for all whose tower is the same."""
        states: dict[str, Spill] = {}
        for name, side in self.sides.items():
            same = next((found for found in states if self.sides[found].source.int8 == side.source.int8), None)
            if same is not None:
                states[name] = states[same]
                continue
            states[name] = self._spill(f"{name}-in")
            embedder = Embedder(side.source, self.processor, device, stream=True)
            for hidden in embedder.embed([passage.prompt for passage in self.passages], WHOLE):
                states[name].put({"states": hidden.cpu()})
        return states

    def _layer(self, i: int, states: Mapping[str, Spill], last: bool) -> dict[str, Spill]:
        """Every model's layer i, one model at a time, against the original's."""
        after: dict[str, Spill] = {}
        original = self.base.open(i)
        for name, side in self.sides.items():
            block = original if name == "base" else side.open(i)
            errors, after[name] = OutputErrors(), self._spill(f"{name}-{i}")
            for at in range(len(self.passages)):
                hidden = states[name].get(at)["states"].to(self.blocks.device)
                after[name].put({"states": self.blocks.run(block, hidden).cpu()})
                if name != "base" and self.passages[at].compared:
                    pair = (self._shown(one, after[one].get(at)["states"], last) for one in (name, "base"))
                    errors.add(*pair)
            if name != "base":
                self.figures[name].outputs += errors.layers()
                self.figures[name].weights.append(fidelity.compare_layer(block, fidelity.weights_in(original)))
        for spill in states.values():
            shutil.rmtree(spill.folder, ignore_errors=True)
        return after

    def _shown(self, name: str, hidden: Tensor, last: bool) -> Tensor:
        """A layer's output `[1, T, D]`; the last one's is normed, as transformers shows it."""
        return (self._normed(self.sides[name].source, hidden) if last else hidden)[None]

    def _normed(self, source: Source, hidden: Tensor) -> Tensor:
        from tinychat.layers.norm import RMSNorm

        norm = RMSNorm(hidden.shape[1], source.config.text.rms_norm_eps)
        norm.weight = nn.Parameter(_get(source, NORM).float(), requires_grad=False)
        return norm(hidden)

    def _predictions(self, states: Mapping[str, Spill], device: torch.device) -> None:
        """KL divergence, agreement and loss of what the last layers give."""
        for at, passage in enumerate(self.passages):
            original: dict[str, Tensor] = {}
            for name, side in self.sides.items():
                hidden = states[name].get(at)["states"][list(passage.held.scored)]
                logits = self._logits(side.source, self._normed(side.source, hidden), device)
                counted = _counted(logits, passage.targets, self.figures[name])
                if not passage.compared:
                    deque(counted, maxlen=0)
                elif name == "base":
                    original = divergence.coded(counted)
                else:
                    self.figures[name].compared.append(divergence.compare(passage.held, original, counted))

    def _logits(self, source: Source, hidden: Tensor, device: torch.device) -> Predictions:
        """hidden `[P, D]` -> logits, the head read in slices."""
        name, vocabulary = HEAD if HEAD in source.index else EMBEDDINGS, source.config.text.vocab_size

        def head(some: Tensor) -> Tensor:
            """[n, D] -> fp32 `[n, V]`."""
            logits, done = torch.empty(len(some), vocabulary), 0
            for weights in _get(source, name).split(SLICE):
                logits[:, done : done + len(weights)] = some @ weights.to(device, torch.float32).T
                done += len(weights)
            return logits

        return Predictions(hidden.to(device), head, vocabulary)

    def _column(self, name: str) -> Column:
        found, side = self.figures[name], self.sides[name]
        tokens = sum(len(passage.targets) for passage in self.passages)
        column = Column(side.title, exponential(found.loss, tokens) if tokens else None)
        if name == "base":
            return column
        others = fidelity.compare_others(weights_of(side.source.index), weights_of(self.base.source.index))
        layers = fidelity.joined(found.outputs, found.weights)
        return replace(column, divergence=card.by_kind(found.compared), layers=layers, others=others)


def _counted(logits: Predictions, targets: Sequence[int], figures: Figures) -> Iterator[Tensor]:
    """The logits as they come; the loss of those that have targets is counted in passing."""
    done = 0
    for some in logits:
        if targets:
            figures.loss += loss([some], targets[done : done + len(some)])
        done += len(some)
        yield some


def _get(source: Source, name: str) -> Tensor:
    """One tensor, of which nothing stays in memory once it is let go."""
    return Index({name: source.index.entry(name)}).get(name)


def weights_of(index: Index) -> Weight:
    """Reads the weights of a float model's linears and embeddings; nothing of them stays in memory."""

    def weight(name: str) -> Tensor:
        key = f"{name}.weight"
        key = key if key in index else EMBEDDINGS  # a head that is tied to them
        return Index({key: index.entry(key)}).get(key)

    return weight


def _passages(plan: CardPlan, processor: Processor, items: Sequence[Item]) -> tuple[list[Passage], dict[str, Any]]:
    """What is read, and what the card says of the text whose perplexity is measured."""
    if (text := card.text_for(plan)) is None:
        right = [item for item in items if item.answer is not None]
        helds = [replace(answered(processor, item), answered=0) for item in right]
        told = {"text": f"right answers, set {plan.heldout}", "text_sha256": fingerprint(right)}
        return [Passage(held, True, held.answer) for held in helds], told
    name, words = text
    size = processor.config.text.vocab_size
    ids, seqlen = text_ids(processor, words), card.seqlen_for(plan, processor)
    windows = split(ids, seqlen)
    read = [Held("text", Prompt(tuple(window)), (), tuple(range(seqlen - 1)), 0, size) for window in windows]
    compared = [_asked(item, processor(item.request), size) for item in items]
    digest = hashlib.sha256(words.encode()).hexdigest()
    told = {"text": name, "text_sha256": digest, "seqlen": seqlen, "windows": len(windows)}
    passages = [Passage(held, True, ()) for held in compared]
    return [*passages, *(Passage(held, False, held.prompt.ids[1:]) for held in read)], told


def _asked(item: Item, prompt: Prompt, vocabulary: int) -> Held:
    """An item whose own words are predicted."""
    return Held(item.kind, prompt, (), divergence.text_positions(prompt), 0, vocabulary)


def _notes(columns: Mapping[str, Column]) -> Iterator[Note]:
    for column in columns.values():
        if column.divergence:
            found = column.divergence["all"]
            yield Note(f"{column.title}: KL {found.kl.value:.4g}, same token {100 * found.top1.value:.1f} %")
        if column.perplexity is not None:
            yield Note(f"{column.title}: perplexity {column.perplexity:.4g}")
