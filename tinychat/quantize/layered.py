"""A card without ever holding a model: decoders side by side, a layer at a time, on tokens that are given.

What needs the whole model, answers of its own and probes, is left out. Every model predicts the same right answers,
questions and windows of text; their hidden states wait in files for the next layer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq.save import atomic, sync
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
from tinychat.quantize.card_plan import SLICE
from tinychat.quantize.embedding import Embedder
from tinychat.quantize.job import Source
from tinychat.quantize.nearest import rounded
from tinychat_kernels.layout import QuantSpec

WHOLE = 2**62
KEPT = "kept.json"


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

    def as_json(self) -> dict[str, Any]:
        """What is known of the layers, as plain data."""
        weights = [[asdict(together), each] for together, each in self.weights]
        return {"outputs": [asdict(one) for one in self.outputs], "weights": weights}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Figures:
        """From as_json's data."""
        weights = [(Fidelity(**together), each) for together, each in found["weights"]]
        return cls([Fidelity(**one) for one in found["outputs"]], weights)


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
    """One card in the making.

    `folder` holds what is found, and the hidden states before the next layer: a run that was cut off goes on there.
    """

    def __init__(self, sides: Mapping[str, Side], processor: Processor, plan: CardPlan, folder: Path) -> None:
        self.sides, self.processor, self.plan, self.folder = dict(sides), processor, plan, folder
        self.base = self.sides["base"]
        self.blocks = Blocks(self.base.source, torch.device("cpu"))
        self.items = card.items_for(plan, processor)
        self.passages, self.text = _passages(plan, processor, self.items)
        self.figures = {name: Figures() for name in self.sides}
        self.states: dict[str, Spill] = {}  # before the next layer

    def making(self, device: torch.device, facts: Mapping[str, Any], left_out: Sequence[str]) -> Making:
        """Yields how far it is, and returns the card."""
        self.blocks = Blocks(self.base.source, device)
        layers = self.base.source.layers
        if (done := self._resumed()) is None:
            done = 0
            self._embed(device)
            self._keep(0)
        yield Progress("", "card", done + 1, layers + 2)
        for i in range(done, layers):
            self._layer(i, last=i + 1 == layers)
            self._keep(i + 1)
            yield Progress("", "card", i + 2, layers + 2)
        self._predictions(device)
        yield Progress("", "card", layers + 2, layers + 2)
        columns = {name: self._column(name) for name in self.sides}
        yield from _notes(columns)
        measured = Measured(
            self.plan.heldout, self.plan.per_kind, fingerprint(self.items), **self.text, dtype="float32"
        )
        return Card(columns, measured, facts, tuple(left_out), card.versions())

    @property
    def _asked(self) -> dict[str, Any]:
        """What the figures depend on besides the models."""
        return {"plan": repr(self.plan), "passages": len(self.passages), "models": sorted(self.sides)}

    def _resumed(self) -> int | None:
        """The layers that an earlier run has done, whose figures and states are taken over; None where it did none."""
        path = self.folder / KEPT
        kept: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        if kept.get("asked") != self._asked:
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        for name, figures in kept["figures"].items():
            self.figures[name] = Figures.of(figures)
        count = len(self.passages)
        self.states = {name: Spill.reopened(self.folder / where, count) for name, where in kept["states"].items()}
        return kept["done"]

    def _keep(self, done: int) -> None:
        """From here on a run that is cut off goes on after `done` layers; states that are not needed any more go."""
        for file in (file for spill in self.states.values() for file in spill.folder.iterdir()):
            sync(file)
        states = {name: spill.folder.name for name, spill in self.states.items()}
        figures = {name: figures.as_json() for name, figures in self.figures.items()}
        kept = {"asked": self._asked, "done": done, "states": states, "figures": figures}
        with atomic(self.folder / KEPT) as file:
            file.write(json.dumps(kept).encode())
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in states.values():
                shutil.rmtree(folder)

    def _spill(self, name: str) -> Spill:
        """A new folder for states, all of them on the disk."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return Spill(folder, 0)

    def _embed(self, device: torch.device) -> None:
        """What goes into the first layer: the same for all whose tower is the same."""
        for name, side in self.sides.items():
            same = next((found for found in self.states if self.sides[found].source.int8 == side.source.int8), None)
            if same is not None:
                self.states[name] = self.states[same]
                continue
            self.states[name] = self._spill(f"{name}-0")
            embedder = Embedder(side.source, self.processor, device, stream=True)
            for hidden in embedder.embed([passage.prompt for passage in self.passages], WHOLE):
                self.states[name].put({"states": hidden.cpu()})

    def _layer(self, i: int, last: bool) -> None:
        """Every model's layer i, one model at a time, against the original's."""
        after: dict[str, Spill] = {}
        original = self.base.open(i)
        for name, side in self.sides.items():
            block = original if name == "base" else side.open(i)
            errors, after[name] = OutputErrors(), self._spill(f"{name}-{i + 1}")
            for at in range(len(self.passages)):
                hidden = self.states[name].get(at)["states"].to(self.blocks.device)
                after[name].put({"states": self.blocks.run(block, hidden).cpu()})
                if name != "base" and self.passages[at].compared:
                    pair = (self._shown(one, after[one].get(at)["states"], last) for one in (name, "base"))
                    errors.add(*pair)
            if name != "base":
                self.figures[name].outputs += errors.layers()
                self.figures[name].weights.append(fidelity.compare_layer(block, fidelity.weights_in(original)))
        self.states = after

    def _shown(self, name: str, hidden: Tensor, last: bool) -> Tensor:
        """A layer's output `[1, T, D]`; the last one's is normed, as transformers shows it."""
        return (self._normed(self.sides[name].source, hidden) if last else hidden)[None]

    def _normed(self, source: Source, hidden: Tensor) -> Tensor:
        from tinychat.layers.norm import RMSNorm

        norm = RMSNorm(hidden.shape[1], source.config.text.rms_norm_eps)
        norm.weight = nn.Parameter(_get(source, NORM).float(), requires_grad=False)
        return norm(hidden)

    def _predictions(self, device: torch.device) -> None:
        """KL divergence, agreement and loss of what the last layers give."""
        for at, passage in enumerate(self.passages):
            original: dict[str, Tensor] = {}
            for name, side in self.sides.items():
                hidden = self.states[name].get(at)["states"][list(passage.held.scored)]
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
            yield Note(f"{column.title}: perplexity {column.perplexity:#.4g}")
