"""A model's modules spread over GPUs, RAM and disk: the map, checked, and what it takes of each device.

What lies in RAM or on disk is computed with by the first GPU where there is one, as accelerate has it; the embeddings
are looked up where they lie.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tinychat.engine.engine import CHUNK
from tinychat.errors import CapacityError, ModelError, UsageError
from tinychat.placement import CPU, DISK, Placement, main_of, place_name

if TYPE_CHECKING:
    from tinychat.checkpoint import Index
    from tinychat.load import Source
    from tinychat.planner import Need, Plan

EMBEDDINGS = "llm.model.embed_tokens"
LAYERS = "llm.model.layers."
BUFFERS = "buffers"  # in RAM, that disk blocks are read into
ROUNDS = 16  # of asking accelerate for a map that leaves room for what is not weights


@dataclass(frozen=True, slots=True)
class Spread:
    """Where each tensor lies ("cuda:0", "cpu", "disk"), and where each block of modules computes.

    `blocks` are modules whose tensors come and go together, and their tensors in order; `stored` names a tensor on disk
    as the checkpoint does; `layers` are the devices of the decoder's layers, and of their keys and values.
    """

    main: torch.device
    places: Mapping[str, str]
    blocks: Mapping[str, list[str]]
    runs: Mapping[str, torch.device]
    layers: tuple[torch.device, ...]
    stored: Mapping[str, str]
    floats: frozenset[str]  # parameters: they take on the model's dtype

    @classmethod
    def of(cls, model: nn.Module, device_map: Mapping[str, Any], index: Index) -> Spread:
        """Raises UsageError for a map that does not fit the model, ModelError for one that leaves modules out."""
        _check_names(model, device_map)
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        main = main_of(device_map)
        places = {name: _place(name, device_map) if "." in name else str(main) for name in tensors}
        _check_ties(tensors, places)
        blocks = _blocks(model, tensors)
        runs = {block: _runs(block, [places[name] for name in names], main) for block, names in blocks.items()}
        layers = tuple(device for block, device in runs.items() if block.startswith(LAYERS))
        firsts = {id(tensors[name]): name for name in tensors if name in index}
        stored = {name: firsts.get(id(tensors[name]), name) for name in tensors if places[name] == DISK}
        floats = frozenset(name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter))
        return cls(main, places, blocks, runs, layers, stored, floats)

    @property
    def moves(self) -> bool:
        """Whether activations go from device to device."""
        return len(set(self.runs.values())) > 1

    def is_away(self, name: str) -> bool:
        """Whether a tensor comes for its module's forward alone; embeddings never do."""
        block = next(block for block in _parents(name) if block in self.blocks)
        return block != EMBEDDINGS and self.places[name] != str(self.runs[block])

    def resident(self) -> dict[str, str]:
        """Where the tensors go that do not stay on disk."""
        return {name: place for name, place in self.places.items() if place != DISK}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of each tensor as it is computed with, and as it is stored; `again` are tied ones, without the first."""

    loaded: Mapping[str, int]
    stored: Mapping[str, int]
    again: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, index: Index, dtype: torch.dtype) -> Sizes:
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in tensors.items() if name in index}
        firsts = {id(tensor): name for name, tensor in reversed(tensors.items())}
        loaded, stored = dict[str, int](), dict[str, int]()
        for name, tensor in tensors.items():
            entry = index.entry(names[id(tensor)]) if id(tensor) in names else None
            kind = tensor.dtype if entry is None else entry.dtype
            cast = dtype if isinstance(tensor, nn.Parameter) else kind
            loaded[name] = tensor.numel() * cast.itemsize
            stored[name] = tensor.numel() * (kind if entry is not None and entry.offset is not None else cast).itemsize
        again = frozenset(name for name, tensor in tensors.items() if firsts[id(tensor)] != name)
        return cls(loaded, stored, again)


def settle(source: Source, placement: Placement, context: int = 0, chunk: int = CHUNK, rows: int = 1) -> Placement:
    """The same, with a word for a device map written out: one device where that suffices, else accelerate's proposal.

    Room is left for contexts of so many tokens; for 0 tokens nothing but the weights counts.
    """
    asked = placement.device_map
    if not isinstance(asked, str):
        return placement
    from tinychat import load

    rooms = placement.rooms
    if asked != "balanced":
        for place in [place for place in rooms if place != CPU] or [CPU]:
            alone = replace(placement, device_map={"": place})
            if load.need_of(source, alone, chunk, rows).plan(context, rooms[place]).fits:
                return alone
    need = load.need_of(source, placement, chunk, rows)
    model = load.empty_of(source, need.dtype)
    sizes = Sizes.of(model, source.index, need.dtype)

    def planned(found: Mapping[str, str]) -> Mapping[str, Plan]:
        return plans(Spread.of(model, found, source.index), sizes, need, context, rooms)

    return replace(placement, device_map=_infer(model, asked, rooms, need.dtype, planned))


def check(source: Source, placement: Placement, need: Need, context: int) -> Plan:
    """The first device's plan. Raises CapacityError for a device that holds too little: its figures, what to change."""
    from tinychat import load, planner

    assert isinstance(placement.device_map, Mapping)
    model, rooms = load.empty_of(source, need.dtype), placement.rooms
    spread, sizes = Spread.of(model, placement.device_map, source.index), Sizes.of(model, source.index, need.dtype)

    def planned(tokens: int) -> list[Plan]:
        return list(plans(spread, sizes, need, tokens, rooms).values())

    found = planned(context)
    wrong = next((plan for plan in found if not plan.fits), None)
    if wrong is None:
        return next(plan for plan in found if plan.where == str(spread.main))
    steps = range(planner.STEP, context, planner.STEP)
    count = bisect.bisect_right(steps, 0, key=lambda tokens: sum(not plan.fits for plan in planned(tokens)))
    fitting = f"try --context {count * planner.STEP}, or " if count else ""
    raise CapacityError(wrong.sentence, f"{fitting}allow more for {wrong.where} with --max-memory, or free memory")


def notes_of(source: Source, placement: Placement, plan: Plan) -> list[str]:
    """What makes a model slow that is placed like this."""
    if not placement.is_spread:
        return []
    notes: list[str] = []
    if plan.disk:
        size = f"{plan.disk / 2**30:.1f} GiB" if plan.disk >= 2**29 else f"{plan.disk / 2**20:.1f} MiB"
        notes.append(
            f"{size} of weights stay on disk and are read whenever they are used; allow more with --max-memory"
        )
    if source.spec is not None:
        notes.append("4-bit layers outside of a GPU's memory run in plain torch with this device map, which is slow")
    return notes


def plans(spread: Spread, sizes: Sizes, need: Need, context: int, rooms: Mapping[str, int]) -> dict[str, Plan]:
    """What each device has to hold, and has room for. Nothing but weights counts for a context of 0."""
    whole = need.plan(context, 0)
    weights = _guests(spread, sizes)
    for name, place in spread.places.items():
        weights[place] += 0 if name in sizes.again else sizes.loaded[name]
    on_disk, main = weights.pop(DISK, 0), str(spread.main)
    kv = Counter(str(device) for device in spread.layers)
    found: dict[str, Plan] = {}
    for place in sorted({main, *kv, *(place for place, count in weights.items() if count)}):
        share = whole.kv * kv[place] // max(1, len(spread.layers)) if context else 0
        works = bool(context) and (place == main or place in kv)
        found[place] = replace(
            whole, weights=weights[place], kv=share, where=place, free=rooms.get(place, 0),
            activations=whole.activations if works else 0,
            vision=whole.vision if works and place == main else 0,
            margin=_margin(place, weights[place] + share) if context else 0,
            disk=on_disk if place == main else 0,
        )  # fmt: skip
    return found


def _margin(place: str, held: int) -> int:
    from tinychat import planner

    return (planner.CPU_WORKSPACE if place == CPU else planner.CUDA_CONTEXT) + int(planner.MARGIN * held)


def _guests(spread: Spread, sizes: Sizes) -> Counter[str]:
    """Bytes of weights that come for a forward: two blocks as stored in RAM, and one as computed with on its device."""
    found = Counter[str]()
    for block, names in spread.blocks.items():
        away, where = [name for name in names if spread.is_away(name)], str(spread.runs[block])
        read = sum(sizes.stored[name] for name in away if spread.places[name] == DISK)
        made = sum(sizes.loaded[name] for name in away)
        found[BUFFERS] = max(found[BUFFERS], 2 * read)
        if where != CPU or read != made:
            found[where] = max(found[where], made)
    found[CPU] += found.pop(BUFFERS, 0)
    return found


def _infer(
    model: nn.Module,
    asked: str,
    rooms: Mapping[str, int],
    dtype: torch.dtype,
    planned: Callable[[Mapping[str, str]], Mapping[str, Plan]],
) -> dict[str, str]:
    """accelerate's map, asked for again with less room until there is some for all that is no weights."""
    allowed, reserved = dict(rooms), _largest(model, dtype)
    found: dict[str, str] = {}
    for _ in range(ROUNDS):
        found = _ask(model, asked, {place: room + (reserved if room else 0) for place, room in allowed.items()}, dtype)
        before = dict(allowed)
        for place, plan in planned(found).items():
            if not plan.fits and place in allowed:
                held = _held(model, found, place, dtype)
                allowed[place] = max(0, min(allowed[place], held) - (plan.total - plan.free))
        if allowed == before:
            break
    return found


def _largest(model: Any, dtype: torch.dtype) -> int:
    """Bytes of the largest part, which accelerate keeps free for parts that come; they are counted here as well."""
    from accelerate.utils import compute_module_sizes

    sizes = compute_module_sizes(model, dtype=cast("Any", dtype))
    together = set(model._no_split_modules)
    return max((sizes[name] for name, module in model.named_modules() if type(module).__name__ in together), default=0)


def _held(model: nn.Module, device_map: Mapping[str, str], place: str, dtype: torch.dtype) -> int:
    """Bytes of weights that accelerate has given to a device."""
    from accelerate.utils import compute_module_sizes

    sizes = compute_module_sizes(model, dtype=cast("Any", dtype))
    return sum(sizes[name] for name, where in device_map.items() if where == place)


def _ask(model: Any, asked: str, rooms: Mapping[str, int], dtype: torch.dtype) -> dict[str, str]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    memory: dict[Any, Any] = {_key(place): room for place, room in rooms.items()}
    whole: dict[str, Any] = {"no_split_module_classes": model._no_split_modules, "dtype": dtype}
    if asked != "sequential":
        memory = get_balanced_memory(model, memory, **whole) or memory
    found: Mapping[str, Any] = infer_auto_device_map(model, memory, **whole)
    return {name: place_name(device) for name, device in found.items()}


def _key(place: str) -> int | str:
    return place if place == CPU else int(place.removeprefix("cuda:"))


def _check_names(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    known = {name for name, _ in model.named_modules()} | set(model.state_dict(keep_vars=True))
    if strange := sorted(name for name in device_map if name not in known):
        message = f"the device map names {', '.join(strange[:8])}, which the model does not have"
        raise UsageError(message, "name its modules, such as llm.model.layers.0, and '' for the rest")


def _place(name: str, device_map: Mapping[str, Any]) -> str:
    for prefix in (name, *_parents(name), ""):
        if prefix in device_map:
            return place_name(device_map[prefix])
    raise ModelError(f"the device map has no device for {name}", "add the module, or an entry '' for the rest")


def _parents(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b`, `a`, and the model itself."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _check_ties(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> None:
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = first.setdefault(id(tensor), name)
        if places[other] != places[name]:
            message = (
                f"{other} and {name} are one tensor, the device map puts them on {places[other]} and {places[name]}"
            )
            raise UsageError(message, "give both modules one device")


def _blocks(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Tensors by the module that is not to be split, else the one that they belong to; the model's own under ''."""
    together = set(cast("Any", model)._no_split_modules)
    whole = {name for name, module in model.named_modules() if type(module).__name__ in together}
    found: dict[str, list[str]] = {}
    for name in tensors:
        parents = list(_parents(name))
        block = next((parent for parent in reversed(parents) if parent in whole), parents[0])
        found.setdefault(block, []).append(name)
    return found


def _runs(block: str, places: list[str], main: torch.device) -> torch.device:
    """Where a block computes. Raises UsageError where its tensors are on several devices."""
    away = CPU if block == EMBEDDINGS else str(main)
    devices = sorted({away if place in (CPU, DISK) else place for place in places})
    if len(devices) > 1:
        raise UsageError(f"the device map splits {block} over {' and '.join(devices)}", "give it one device")
    return torch.device(devices[0])
