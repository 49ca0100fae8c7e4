"""The vision tower in 8 bits: its layers streamed one at a time, smoothed on the calibration's pictures, resumable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from awq.save import Part, Work
from tinychat.checkpoint import Index, stream_into
from tinychat.core import Progress
from tinychat.errors import ModelError, UsageError
from tinychat.inputs.processor import Processor, Prompt
from tinychat.int8_tower import SCALE
from tinychat.models.clip import CLIPEncoderLayer
from tinychat.models.vision_tower import VisionTower
from tinychat.quantize.blocks import Emit, narrowed
from tinychat.quantize.calibration import Data
from tinychat.quantize.embedding import fill
from tinychat.quantize.job import TOWER_LAYER, Job, Source, part, tower_layer
from tinychat.quantize.states import States, writing
from tinychat.tiling import Tiles
from tinychat.weight_files import entries_of
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.int8 import Int8, quantize_rows

PART = "tower-"
FEATURES = "features-"
ENOUGH = 16  # pictures to smooth on: other pictures gain nothing from fewer, and lose by one (docs/decisions.md)
CHECK = "check the checkpoint's weights"


@dataclass(frozen=True)
class TowerLayerDone:
    """Layer `index` of the tower's `total` is on the disk.

    `error` is that of its output in parts of it, rounded as it is and smoothed; `spared` names its 16-bit linears.
    """

    index: int
    total: int
    kept: str
    error: dict[str, float] | None
    spared: tuple[str, ...]
    seconds: float


class Encoders:
    """The tower's layers as float32 modules, one at a time."""

    def __init__(self, source: Source, device: torch.device) -> None:
        assert source.config.vision is not None
        self.source, self.device, self.vision = source, device, source.config.vision

    def open(self, i: int) -> CLIPEncoderLayer:
        """Layer i with its weights."""
        with torch.device("meta"):
            layer = CLIPEncoderLayer("", self.vision)
        stream_into(layer, part(self.source.index, tower_layer(i)), "text", torch.float32, self.device)
        return layer.requires_grad_(False).eval()

    @torch.no_grad()
    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """hidden `[S, D]` -> `[S, D]`: one picture."""
        return layer(hidden[None])[0]

    @torch.no_grad()
    def first(self, processor: Processor, data: Data) -> Iterator[Tensor]:
        """[S, D] of every picture that the decoder will see: what goes into the first layer."""
        with torch.device("meta"):
            tower = VisionTower(self.vision).eval()
        index = part(self.source.index, "vision_tower.")
        outside = [name for name in index.names() if not TOWER_LAYER.fullmatch(f"vision_tower.{name}")]
        fill(tower, Index({name: index.entry(name) for name in outside}), self.device)
        for prompt, image in shown(data):
            pixels = processor.pixels(prompt, [image]).to(self.device)
            whole = pixels.pixels[0][:1] if isinstance(pixels, Tiles) else pixels
            yield tower.vision_model.hidden_state(whole, 0)[0]


@dataclass(frozen=True)
class Smoothed:
    """A layer's 8-bit linears, its other tensors, and what the search found."""

    weights: Mapping[str, Int8]
    others: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class TowerStage:
    """What is done with the tower before the decoder sees its pictures. `data` None: rounded without a look."""

    def __init__(self, job: Job, source: Source, processor: Processor | None, data: Data | None) -> None:
        self.job, self.source, self.processor, self.data = job, source, processor, data
        self.encoders = Encoders(source, torch.device(job.device))
        self.total = self.encoders.vision.num_hidden_layers

    def events(self, work: Work) -> Iterator[Progress | TowerLayerDone]:
        """Do what of it is not done. Raises ModelError for weights that hold NaN or Inf."""
        done = sum(name.startswith(PART) for name in work.parts)
        if self.data is not None and done == 0 and f"{FEATURES}00000" not in work.parts:
            yield from self._look(work)
        yield Progress("", "tower", done, self.total)
        for i in range(done, self.total):
            yield self._layer(work, i)

    def _look(self, work: Work) -> Iterator[Progress]:
        assert self.data is not None and self.processor is not None
        name, start, total = f"{FEATURES}00000", time.perf_counter(), len(shown(self.data))
        with writing(work.path(name, ".bin"), False) as sink:
            for i, hidden in enumerate(self.encoders.first(self.processor, self.data)):
                sink.add(i, hidden)
                yield Progress("", "vision", i + 1, total)
        work.commit({name: sink.part()}, pictures_s=time.perf_counter() - start)

    def _layer(self, work: Work, i: int) -> TowerLayerDone:
        """Layer i in 8 bits, and the pictures' states after it, count together."""
        start, parts = time.perf_counter(), dict[str, Part]()
        layer = self.encoders.open(i)
        if self.data is None:
            found = to_nearest(layer, i)
        else:
            states = States.of(work.parts[f"{FEATURES}{i:05d}"], work.folder).on(self.encoders.device)
            found = self._smooth(layer, states, work, parts, i)
        seconds = time.perf_counter() - start
        parts[tower_part(i)] = work.write(tower_part(i), self._to_disk(found, i), {**found.facts, "seconds": seconds})
        work.commit(parts, drop=[f"{FEATURES}{i:05d}"])
        facts = found.facts
        return TowerLayerDone(i, self.total, facts["kept"], facts.get("error"), tuple(facts["spared"]), seconds)

    def _smooth(self, layer: nn.Module, states: States, work: Work, parts: dict[str, Part], i: int) -> Smoothed:
        """By search; the states after it, where a layer follows, become one of the parts."""
        if i + 1 == self.total:
            return self._searched(layer, states, None, i)
        following = f"{FEATURES}{i + 1:05d}"
        with writing(work.path(following, ".bin"), False) as sink:
            found = self._searched(layer, states, sink.add, i)
        parts[following] = sink.part()
        return found

    def _searched(self, layer: nn.Module, states: States, emit: Emit, i: int) -> Smoothed:
        from awq.recipes import encoder_recipe
        from awq.smooth import SmoothOptions, smooth_block

        recipe, options = encoder_recipe(self.encoders.vision.family), SmoothOptions()
        stored = self.source.stored_in(part(self.source.index, tower_layer(i)))
        found = smooth_block(layer, self.encoders.run, states, recipe, options, emit, stored)
        facts = {
            "kept": found.kept,
            "error": found.block_error._asdict(),
            "linears": {name: error._asdict() for name, error in found.errors.items()},
            "exponents": {scale.previous: scale.exponent for scale in found.scales},
            "spared": list(found.spared),
        }
        return Smoothed(found.weights, found.tensors, facts)

    def _to_disk(self, found: Smoothed, i: int) -> dict[str, Tensor]:
        """The layer's tensors as the checkpoint holds them, named from the layer."""
        index = part(self.source.index, tower_layer(i))
        tensors = {
            name: narrowed(tensor, self.source.stored(index.entry(name)), f"the tower's layer {i}, {name}")
            for name, tensor in found.others.items()
        }
        for name, packed in found.weights.items():
            tensors |= {f"{name}.weight": packed.weight, f"{name}{SCALE}": packed.scale[:, None]}
        return tensors


def shown(data: Data) -> list[tuple[Prompt, int]]:
    """The pictures that the decoder will see, each by its prompt and its number in there."""
    return [(prompt, slot.image) for prompt in data.prompts for slot in prompt.slots if slot.start < data.seqlen]


def to_nearest(layer: nn.Module, i: int) -> Smoothed:
    """Every linear rounded as it is: looks at no data."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    try:
        weights = {name: quantize_rows(linear.weight) for name, linear in linears.items()}
    except LayoutError as error:
        raise ModelError(f"the tower's layer {i}: {error}", CHECK) from error
    kept = {f"{name}.weight" for name in linears}
    others = {name: tensor for name, tensor in layer.state_dict().items() if name not in kept}
    return Smoothed(weights, others, {"kept": "plain", "spared": []})


def tower_part(i: int) -> str:
    """The name of a tower layer's part in the work."""
    return f"{PART}{i:05d}"


def spared_linears(work: Work) -> list[str]:
    """The tower's linears that stayed in 16 bit, named from its encoder."""
    parts = sorted((name, part) for name, part in work.parts.items() if name.startswith(PART))
    return [f"layers.{i}.{name}" for i, (_, part) in enumerate(parts) for name in part.facts["spared"]]


def facts_of_tower(work: Work) -> tuple[dict[str, Any], float]:
    """What the finished checkpoint tells of its tower, and the seconds that it took."""
    parts = sorted((name, part) for name, part in work.parts.items() if name.startswith(PART))
    layers = [dict(part.facts) for _, part in parts]
    seconds = sum(layer.pop("seconds") for layer in layers)
    return {"scheme": "w8a8", "spared": spared_linears(work), "layers": layers}, seconds


def with_tower(source: Source, work: Work) -> Source:
    """The source as the decoder will see it: with the 8-bit tower that the work holds, where it holds one."""
    names = sorted(name for name in work.parts if name.startswith(PART))
    if not names:
        return source
    kept = [name for name in source.index.names() if not TOWER_LAYER.fullmatch(name)]
    entries = {name: source.index.entry(name) for name in kept}
    for i, name in enumerate(names):
        found = entries_of(work.folder / work.parts[name].file, [])
        entries |= {f"{tower_layer(i)}{key}": entry for key, entry in found.items()}
    stems = [name.removesuffix(SCALE) for name in entries if name.startswith("vision_tower.") and name.endswith(SCALE)]
    return replace(source, index=Index(entries), int8=frozenset(stems))


def warnings(job: Job, data: Data | None) -> tuple[str, ...]:
    """What a user should know beforehand: scales that few pictures decide about may fit those alone."""
    count = len(shown(data)) if job.vision == "w8a8" and data is not None else ENOUGH
    if count >= ENOUGH:
        return ()
    pictures = "1 picture, whose" if count == 1 else f"{count} pictures, whose"
    return (f"the vision tower is smoothed on {pictures} quirks its scales may fit: {ENOUGH} or more are better",)


def check_pictures(job: Job, data: Data | None) -> None:
    """Raise UsageError where the tower is to be smoothed on pictures, and there are none."""
    if job.vision == "w8a8" and data is not None and not shown(data):
        message = "--vision w8a8 looks at pictures, and the calibration has none"
        raise UsageError(message, "give a --calib with pictures, or --vision 16bit")
