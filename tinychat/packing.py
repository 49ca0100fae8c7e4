"""Weights for the CPU kernels: which ones of a checkpoint are packed, the memory they take, and filling a model.

The 4-bit linears of the decoder are packed one after the other into one piece of memory, straight from the files, and
so are the head and the vision tower, in 8 bits. Large models are kept packed on disk for the next start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tinychat import packed_cache, packed_tower
from tinychat.checkpoint import Index
from tinychat.errors import UsageError
from tinychat.packed_cache import Place
from tinychat.repack import Computed, packed_linears
from tinychat_kernels import registry
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import HALVES, PER_WORD, AwqGemm, QuantSpec

if TYPE_CHECKING:
    from tinychat.load import Source
    from tinychat.placement import Placement
    from tinychat_kernels.cpu import Packed

LAYERS, HEAD, EMBEDDINGS = "llm.model.layers.", "llm.lm_head", "llm.model.embed_tokens"
SIDE_BY_SIDE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEPT_FROM = 64 * 2**20  # bytes from which on reading packed weights is quicker than packing them
Report = Callable[[int, int], None]
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Packing:
    """Bytes of each packed linear by its name, in the order in which they lie; `head` is the tensor that it is made of.

    `exact`: activations stay float32. `threads`: that the kernels are to run on.
    """

    spec: QuantSpec
    sizes: Mapping[str, int]
    head: str | None
    stored: frozenset[str]
    exact: bool
    threads: int | None

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    @property
    def skipped(self) -> frozenset[str]:
        """The tensors that the model does not hold as they are."""
        tensors = (tensor for name in self.sizes for tensor in self.made_of(name))
        return frozenset(tensors) - self.stored

    def made_of(self, name: str) -> tuple[str, ...]:
        """The tensors that a packed linear is made of."""
        if name == HEAD:
            assert self.head is not None
            return (self.head,)
        return (f"{name}.weight",) if packed_tower.is_ours(name) else tuple(f"{name}.{p}" for p in AwqGemm._fields)

    def held(self, index: Index) -> dict[str, int]:
        """Tensor -> the bytes that stand for it in memory, of those that are not held as they are."""
        found = dict.fromkeys(self.skipped, 0) | {name: index.entry(name).nbytes for name in self.stored}
        for name, size in self.sizes.items():
            found[self.made_of(name)[0]] += size
        return found


def packing_of(source: Source, placement: Placement) -> Packing | None:
    """What is packed of a model that is placed like this; None where the CPU kernels have no part in it.

    Raises KernelError for a TINYCHAT_BACKEND that does not run.
    """
    if source.spec is None or not _may_pack(source, placement) or registry.chosen().name != "cpu":
        return None
    try:
        sizes = {name: _size(source.index, name, source.spec) for name in _in_order(source.index)}
    except LayoutError:  # said with more words where the model is made
        return None
    head = _head(source, placement)
    if head is not None:
        sizes[HEAD] = _head_size(source.index, head)
    if placement.tower == "int8" and not placement.exact:
        sizes |= packed_tower.packed_sizes(source)
    return Packing(source.spec, sizes, head, _stored(source, head), placement.exact, placement.threads)


def waits_for_compiler(source: Source, placement: Placement) -> bool:
    """Whether `packing_of` is going to compile the kernels, which takes a minute or so. Raises KernelError too."""
    from tinychat_kernels import build, cpu

    if isinstance(placement.device_map, str):  # it may turn out to be the CPU
        placement = replace(placement, device_map=None, max_memory=None)
    wanted = _may_pack(source, placement) and registry.asked() in (None, "cpu")
    return wanted and build.waits_for_compiler(cpu.cache_folder())


def notes_of(source: Source, placement: Placement) -> list[str]:
    """What the user should know of a model that is placed like this: why it falls back to ref, odd threads.

    Raises UsageError for an option of `placement.asked` that cannot do anything.
    """
    from tinychat_kernels.cuda_gpu import current

    for option in sorted(placement.asked):
        if (why := _idle(option, source, placement)) is not None:
            raise UsageError(f"{option} cannot do anything: {why}", "leave it out")
    if source.spec is None or placement.dequantize:
        return []
    device = placement.main_device.type
    with current(placement.main_device):
        why = registry.fallback(device)
    if why is not None:
        remedy = (
            "install a C++ compiler if there is none, or give --dequantize"
            if device == "cpu"
            else "see `tinychat doctor`"
        )
        return [f"4-bit layers run in plain torch, which is slow ({why}); {remedy}"]
    return _odd_threads(placement.threads) if device == "cpu" and registry.chosen().name == "cpu" else []


def _idle(option: str, source: Source, placement: Placement) -> str | None:
    """Why an option does nothing to a model that is placed like this; None where it does."""
    device = placement.main_device.type
    for idle, why in (
        (source.spec is None, "the model has no 4-bit layers"),
        (placement.dequantize, "--dequantize takes them as floats"),
        (placement.is_spread, "the device map leaves nothing to the CPU kernels"),
        (registry.asked() == "ref", "TINYCHAT_BACKEND asks for ref"),
        (device != "cpu" and not option.startswith("--head"), f"the model is on {device}"),
        (option.startswith("--tower") and placement.exact, "--exact keeps the tower's floats"),
    ):
        if idle:
            return why
    return None


def _odd_threads(threads: int | None) -> list[str]:
    from tinychat_kernels import cpu

    if threads is None or threads <= (cores := cpu.usable_cores()):
        return []
    return [f"{threads} threads on {cores} cores wait for each other: --threads {cores} is faster"]


def _may_pack(source: Source, placement: Placement) -> bool:
    """Whether the CPU kernels, where they run, have a part in a model that is placed like this."""
    return source.spec is not None and _on_cpu(placement) and not placement.dequantize


def _on_cpu(placement: Placement) -> bool:
    return not placement.is_spread and placement.main_device.type == "cpu"


def fill(
    model: nn.Module,
    source: Source,
    packing: Packing,
    dtype: torch.dtype,
    report: Report | None = None,
    note: Note | None = None,
) -> None:
    """Give a model of this dtype its packed weights: from the disk where they are kept there, else packed and kept.

    Its other tensors are there already. `note` is told where they cannot be kept.
    """
    if packing.threads is not None:
        from tinychat_kernels import cpu

        cpu.set_threads(packing.threads)
    place = _place(source, packing) if packing.total >= KEPT_FROM else None
    found = None if place is None else packed_cache.load(place)
    if found is None or list(found) != list(packing.sizes):
        found = dict(_packed(source, packing, report))
        source.index.close()
        if place is not None and not packed_cache.save(place, found) and note is not None:
            note(
                f"the packed weights cannot be kept in {place.folder}, so every start packs them; see `tinychat doctor`"
            )
    _hand_over(model, source, packing, dtype, found)


def prepare_tower(model: nn.Module, placement: Placement) -> None:
    """Pack the 8-bit linears of a loaded vision tower, one at a time, where the CPU kernels run it."""
    from tinychat.layers.int8_linear import Int8Linear

    if _on_cpu(placement) and registry.chosen().name == "cpu":
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.prepare()


def _in_order(index: Index) -> list[str]:
    """The decoder's packed linears, layer by layer; those that are computed together lie side by side."""

    def rank(name: str) -> tuple[int, int]:
        layer, last = name.removeprefix(LAYERS).partition(".")[0], name.rpartition(".")[2]
        return int(layer), SIDE_BY_SIDE.index(last) if last in SIDE_BY_SIDE else len(SIDE_BY_SIDE)

    return sorted((name for name in packed_linears(index) if name.startswith(LAYERS)), key=rank)


def _size(index: Index, name: str, spec: QuantSpec) -> int:
    """Raises LayoutError where the kernels cannot hold such a linear."""
    from tinychat_kernels import cpu

    inputs, words = index.shape(f"{name}.qweight")
    if (scale := index.dtype(f"{name}.scales")) not in cpu.SCALES:
        raise LayoutError(f"the scales of {name} are {scale}")
    return cpu.packed_size(inputs, words * PER_WORD, cpu.group_of(inputs, spec), 4, scale)


def _head(source: Source, placement: Placement) -> str | None:
    """The tensor that an 8-bit head is made of; None where the head stays as it is."""
    tied = source.config.text.tie_word_embeddings
    name = f"{EMBEDDINGS if tied else HEAD}.weight"
    if placement.head == "float" or name not in source.index:
        return None
    made = isinstance(source.index.entry(name), Computed)  # of fewer bits, and held in 32 otherwise
    return name if made or source.index.dtype(name) in HALVES else None


def _head_size(index: Index, head: str) -> int:
    from tinychat_kernels import cpu

    rows, columns = index.shape(head)
    return cpu.packed_size(columns, rows, cpu.head_group(columns), 8, torch.float16)


def _stored(source: Source, head: str | None) -> frozenset[str]:
    """The embeddings, where they can keep their 16 bits: a float head that shares them cannot."""
    name, shared = f"{EMBEDDINGS}.weight", source.config.text.tie_word_embeddings and head is None
    return frozenset() if shared or source.index.dtype(name) not in HALVES else frozenset([name])


def _place(source: Source, packing: Packing) -> Place:
    from tinychat import doctor
    from tinychat_kernels import build

    folder = doctor.cache_folder() / "packed"
    files = {path for name in packing.skipped | packing.stored for path in source.index.files(name)}
    sizes = (f"{name} {size}" for name, size in packing.sizes.items())
    part = "" if source.share is None else f"rank {source.share.group.rank()} of {source.share.group.size()}"
    facts = [build.source_digest(), repr(packing.spec), part, *sizes]
    return Place(folder, packed_cache.key_of(files, facts, folder))


def _packed(source: Source, packing: Packing, report: Report | None) -> Iterator[tuple[str, Packed]]:
    """Every linear, packed into its part of one piece of memory."""
    from tinychat_kernels import cpu

    memory, at = cpu.empty(packing.total), 0
    for done, (name, size) in enumerate(packing.sizes.items()):
        part = memory[at : at + size]
        if name == HEAD:
            yield name, cpu.quantize_head(source.index.get(*packing.made_of(name)), memory=part)
        elif packed_tower.is_ours(name):
            yield name, packed_tower.packed(source.index, name, part)
        else:
            words = AwqGemm(*map(source.index.get, packing.made_of(name)))
            yield name, cpu.pack(words, packing.spec, part)
        at += size
        if report is not None:
            report(done + 1, len(packing.sizes))


def _hand_over(
    model: nn.Module, source: Source, packing: Packing, dtype: torch.dtype, found: Mapping[str, Packed]
) -> None:
    from tinychat.layers.embedding import StoredEmbedding
    from tinychat.layers.head import PackedHead
    from tinychat.layers.linear import QuantLinear

    for name, packed in found.items():
        if name.startswith(LAYERS):
            cast("QuantLinear", model.get_submodule(name)).prepare(packed, exact=packing.exact)
    rounded = {name: packed for name, packed in found.items() if packed_tower.is_ours(name)}
    packed_tower.hand_over(model, source.index, rounded)
    if packing.stored:
        table: Any = model.get_submodule(EMBEDDINGS)
        model.set_submodule(EMBEDDINGS, StoredEmbedding(table.weight, dtype))
    if packing.head is not None:
        read = functools.partial(_weight, model.get_submodule(EMBEDDINGS))
        if packing.head not in packing.stored:
            read = functools.partial(source.index.get, packing.head)
        model.set_submodule(HEAD, PackedHead(found[HEAD], read, exact=packing.exact))


def _weight(table: nn.Module) -> Tensor:
    return cast("Tensor", table.weight)
