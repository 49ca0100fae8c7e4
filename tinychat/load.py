"""The one assembly line: folder or hub id -> config -> empty model -> quantized linears -> weights -> processor."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tinychat import checkpoint, cuda_packing, offload, spread
from tinychat.checkpoint import Index
from tinychat.config import FLOAT_TYPES, TextConfig, VilaConfig, read_config, read_json
from tinychat.core import Progress
from tinychat.engine.engine import CHUNK, CONTEXT
from tinychat.errors import ModelError, UsageError
from tinychat.hub import find_tower, looks_like_path, nearby, snapshot, standing
from tinychat.int8_tower import int8_linears, swap_int8
from tinychat.layers.parallel import ALONE, Group
from tinychat.packing import Note, Packing, fill, notes_of, packing_of, prepare_tower, waits_for_compiler
from tinychat.placement import DeviceMap, Dtype, MaxMemory, Placement, place_name
from tinychat.quantization import quantization_of
from tinychat.repack import as_gemm, packed_linears
from tinychat.sharding import Cutting, sharded, share_of, shared_notes
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import QuantSpec

if TYPE_CHECKING:
    from tinychat.inputs.processor import Processor
    from tinychat.models.shares import Share
    from tinychat.models.vila_llama import VilaLlamaForCausalLM
    from tinychat.planner import Need, Plan

Json = dict[str, Any]
Report = Callable[[Progress], None]

EMBEDDED = Path(__file__).parent / "assets" / "demo" / "model"
SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
FLOAT32_LIMIT = 2**30  # bytes up to which a CPU takes 16-bit weights as float32: exact, and faster to compute with


def load(
    model_id: str | Path | None = None,
    *,
    dtype: Dtype = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    context: int | None = None,
    progress: Report | None = None,
) -> tuple[VilaLlamaForCausalLM, Processor]:
    """The model and its processor; the memory for them and for `context` tokens is checked before anything is loaded.

    Raises ModelError and FormatError as load_model does, UsageError for a context that is longer than the model's,
    CapacityError where memory does not suffice.
    """
    placement = Placement(dtype, device, device_map, max_memory)
    ready = load_folder(resolve(model_id, revision), placement, context=context, progress=progress)
    return ready.model, ready.processor


def load_model(
    model_id: str | Path | None = None,
    *,
    dtype: Dtype = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    progress: Report | None = None,
    group: Group = ALONE,
) -> VilaLlamaForCausalLM:
    """A model in eval mode, from a folder of any layout, a hub id, or (None) the embedded one.

    dtype None: what the checkpoint says; on a CPU, models whose float part is at most 1 GiB become float32. device
    None: CUDA where there is one. device_map ("auto", "balanced", "sequential" or module -> device) and max_memory are
    accelerate's. `group`: a torch.distributed process group whose ranks share the model; each calls this, and then the
    model, alike. tinychat.layers.local_ranks.LocalRanks.of(group) may be given for it, which is faster where all run on
    one machine's CPU. Raises ModelError or FormatError with a sentence about the folder, the config or the weights.
    """
    placement = Placement(dtype, device, device_map, max_memory)
    return assemble(open_source(resolve(model_id, revision), group), placement, progress)


@dataclass(frozen=True, slots=True)
class Source:
    """A model folder that was opened: nothing but headers is read yet. Names of `index` are those in memory.

    `int8` names the 8-bit linears of the vision tower. With a `share` index and spec are those of one rank.
    """

    folder: Path
    config: VilaConfig
    index: Index
    spec: QuantSpec | None
    int8: frozenset[str] = frozenset()
    share: Share | None = None

    @property
    def text(self) -> TextConfig:
        """The decoder's sizes, or those of the rank's share of it."""
        return self.config.text if self.share is None else self.share.config


@dataclass(frozen=True, slots=True)
class Ready:
    """A model, its processor, the tokens of context that memory was found for, and what the user should know of it."""

    model: VilaLlamaForCausalLM
    processor: Processor
    context: int
    notes: tuple[str, ...] = ()


def load_folder(
    folder: Path,
    placement: Placement,
    *,
    context: int | None = None,
    chunk: int = CHUNK,
    rows: int = 1,
    template: str | None = None,
    progress: Report | None = None,
    group: Group = ALONE,
) -> Ready:
    """The assembly line: everything that can be refused is refused before the weights' data is read.

    Of several ranks in the group each gets its part of the model.
    """
    from tinychat.inputs.processor import Processor

    source = open_source(folder, group)
    tokens = choose_context(source.config, context)
    if progress is not None and waits_for_compiler(source, placement):
        progress(Progress("", "compile", 0, 1))
    placement = spread.settle(source, placement, tokens, chunk, rows)
    notes = notes_of(source, placement)
    notes += spread.notes_of(source, placement, plan(source, tokens, placement, chunk, rows))
    if source.share is not None:
        notes += shared_notes(source.share, source.config)
    processor = Processor.from_folder(source.folder, source.config, template)
    model = assemble(source, placement, progress, notes.append)
    return Ready(model, processor, tokens, tuple(notes))


def choose_context(config: VilaConfig, asked: int | None) -> int:
    """The context asked for, else what the engine takes. Raises UsageError beyond what the positions are made for."""
    longest = longest_context(config)
    if asked is not None and longest is not None and asked > longest:
        message = f"a context of {asked} tokens is asked for, the model is made for {longest}"
        raise UsageError(message, f"try --context {longest}")
    return asked or min(config.text.max_position_embeddings, CONTEXT)


def longest_context(config: VilaConfig) -> int | None:
    """The most tokens that a model's positions are made for; None where they grow with the length."""
    return None if config.text.rope.type == "dynamic" else config.text.max_position_embeddings


def open_source(folder: Path, group: Group = ALONE) -> Source:
    """Read a folder's config and its weights' headers. For original LLaVA the vision tower is found, or fetched.

    Of several ranks in the group each sees its own part. Raises ModelError where they cannot share the model.
    """
    config = read_config(folder)
    index = open_index(folder, config)
    renamed = index.renamed(config.layout)
    source = Source(folder, config, renamed, quant_spec(config, index), int8_linears(config, renamed))
    return source if group.size() == 1 else _shared(source, group)


def _shared(source: Source, group: Group) -> Source:
    """One rank's part of what was opened."""
    text = source.config.text
    share, spec = share_of(text, group, source.spec)
    cutting = Cutting(share, text.head_dim, source.config.vision, source.spec, spec)
    return replace(source, index=sharded(source.index, cutting), spec=spec, share=share)


def open_index(folder: Path, config: VilaConfig) -> Index:
    """The tensors of a folder under their names on disk, packed ones as AWQ GEMM whatever their format.

    An original LLaVA's tower and its config are added.
    """
    index = open_parts(folder, config)
    quantization = quantization_of(config, index)
    return index if quantization is None else as_gemm(index, quantization)


def open_parts(folder: Path, config: VilaConfig) -> Index:
    """The tensors of a folder as they are on disk."""
    index = checkpoint.open_model(folder, config.layout)
    if config.layout != "llava":
        return index
    tower = find_tower(folder, config)
    config.vision_tower_cfg = read_json(tower / "config.json")
    if any(".vision_tower." in name for name in index.names()):
        return index
    return checkpoint.open_model(folder, config.layout, tower)


def assemble(
    source: Source, placement: Placement, progress: Report | None = None, note: Note | None = None
) -> VilaLlamaForCausalLM:
    """An opened folder becomes a model: structure on the meta device, then the weights, one tensor at a time.

    `note` is told what could not be done that makes the next start slower.
    """
    placement = spread.settle(source, placement)
    packing, for_cuda = packing_of(source, placement), cuda_packing.applies(source, placement)
    device, dtype = placement.main_device, _dtype_of(source, placement, packing)
    model = empty_of(source, dtype)
    away = offload.offloading(model, source.index, placement, dtype)
    loading, preparing = _reporters(progress, len(packing.sizes) if packing else 0)
    other = {"skipped": packing.skipped, "stored": packing.stored} if packing else {}
    where = device
    if away is not None:
        where, other = away.spread.resident(), {"skipped": away.spread.stored}
    checkpoint.stream_into(model, source.index, source.config.layout, dtype, where, loading, **other)
    if packing:
        fill(model, source, packing, dtype, preparing, note)
    if for_cuda:
        cuda_packing.prepare(model, source, placement)
    if source.int8 and not placement.dequantize:
        prepare_tower(model, placement)
    if placement.dequantize:
        dequantize(model, dtype)
    model.kv_dtype = _kv_dtype(placement, dtype, packing)
    model.eval()
    if away is not None:
        away.dispatch(model, dtype)
    return model


def plan(source: Source, context: int, placement: Placement, chunk: int = CHUNK, rows: int = 1) -> Plan:
    """Whether the model and contexts of so many tokens, one a row, fit. Raises CapacityError where they do not.

    Of several devices it is the first one's part.
    """
    from tinychat import planner

    need = need_of(source, placement, chunk, rows)
    if placement.is_spread:
        return spread.check(source, placement, need, context)
    where, mapped = placement.main_device, placement.device_map is not None
    free = placement.rooms[place_name(where)] if mapped else planner.free_bytes(where) // placement.sharers
    return planner.check(need, context, free)


def need_of(source: Source, placement: Placement, chunk: int = CHUNK, rows: int = 1) -> Need:
    """What decides how much memory contexts of a model take that is placed like this."""
    from tinychat import planner

    where, packing = placement.main_device, packing_of(source, placement)
    kind = _dtype_of(source, placement, packing)
    held = packing.held(source.index) if packing else {}
    return planner.Need(
        source.config,
        planner.weights_bytes(source.index, kind, placement.dequantize, held),
        kind,
        where,
        quantized=source.spec is not None and not placement.dequantize and packing is None,
        chunk=chunk,
        kv_dtype=_kv_dtype(placement, kind, packing),
        rows=rows,
        text=source.text,
    )


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn 4-bit and 8-bit linears into float ones, in place, one at a time: faster where they have no kernel."""
    from tinychat.layers.int8_linear import Int8Linear
    from tinychat.layers.linear import QuantLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear | Int8Linear):
            model.set_submodule(name, module.to_linear(dtype))


def empty_of(source: Source, dtype: torch.dtype) -> VilaLlamaForCausalLM:
    """The structure of what was opened, on the meta device."""
    packed = frozenset(packed_linears(source.index))
    return empty_model(source.config, dtype, source.spec, packed, source.int8, source.share)


def empty_model(
    config: VilaConfig,
    dtype: torch.dtype,
    spec: QuantSpec | None = None,
    packed: Collection[str] = (),
    int8: Collection[str] = (),
    share: Share | None = None,
) -> VilaLlamaForCausalLM:
    """The structure on the meta device; linears named in `packed` are quantized as `spec` says, those in `int8` too.

    With a `share` it is one rank's part.
    """
    from tinychat.models.vila_llama import VilaLlamaForCausalLM

    config.dtype = dtype
    with torch.device("meta"):
        model = VilaLlamaForCausalLM.of_share(config, share)
        if spec is not None:
            swap_quantized(model, spec, packed)
        swap_int8(model, int8)
    return model


def swap_quantized(model: nn.Module, spec: QuantSpec, packed: Collection[str]) -> None:
    """Replace linears of the decoder's layers, by name, by quantized ones."""
    from tinychat.layers.linear import QuantLinear

    for name, module in list(model.named_modules()):
        if name not in packed or not name.startswith("llm.model.layers.") or not isinstance(module, nn.Linear):
            continue
        try:
            quantized = QuantLinear(module.in_features, module.out_features, spec, bias=module.bias is not None)
        except LayoutError as error:
            remedy = "take a checkpoint with another group_size"
            raise ModelError(f"{name} cannot be quantized as the config says: {error}", remedy) from error
        model.set_submodule(name, quantized)


def quant_spec(config: VilaConfig, index: Index | None = None) -> QuantSpec | None:
    """How the decoder is quantized, said by the config or told by the tensors: None for float weights.

    Raises ModelError for a method that is not supported.
    """
    found = quantization_of(config, index)
    return None if found is None else found.spec


def choose_dtype(source: Source, asked: Dtype, device: torch.device, but: Collection[str] = ()) -> torch.dtype:
    """The dtype asked for, else the checkpoint's, widened to float32 on a CPU while that is small.

    `but` are the tensors that do not take it on.
    """
    from tinychat import planner

    if isinstance(asked, torch.dtype):
        return asked
    if asked not in (None, "auto"):
        name = asked.removeprefix("torch.")
        if (name := SHORT.get(name, name)) not in FLOAT_TYPES:
            raise UsageError(f"dtype is {asked!r}", f"give one of {', '.join((*FLOAT_TYPES, *SHORT))}")
        return FLOAT_TYPES[name]
    if device.type == "cpu" and planner.float_bytes(source.index, torch.float32, but) <= FLOAT32_LIMIT:
        return torch.float32
    config, stored = source.config, source.index.dtype(checkpoint.EMBEDDINGS)
    named = str(config.dtype or getattr(config, "model_dtype", "")).removeprefix("torch.")
    return FLOAT_TYPES.get(named, stored)


def resolve(model_id: str | Path | None, revision: str | None = None) -> Path:
    """The folder of a model: the embedded one (None), a folder, or a hub id's snapshot, downloaded where it is new.

    Raises ModelError: nothing there, a file, offline, not found, gated.
    """
    if model_id is None:
        if not (EMBEDDED / "config.json").is_file():
            raise ModelError("this installation has no embedded model", "give --model a folder or a hub id")
        return EMBEDDED
    path = Path(model_id).expanduser()
    if (there := standing(path, ModelError)) == "folder":
        return path
    if there:
        raise ModelError(f"{path} is a file", f"give the folder of the model, for instance {path.absolute().parent}")
    if looks_like_path(str(model_id)):
        raise ModelError(f"there is no folder {path}", nearby(path))
    return snapshot(str(model_id), revision)


def _dtype_of(source: Source, placement: Placement, packing: Packing | None) -> torch.dtype:
    other = packing.skipped | packing.stored if packing else ()
    return choose_dtype(source, placement.dtype, placement.main_device, other)


def _kv_dtype(placement: Placement, dtype: torch.dtype, packing: Packing | None) -> torch.dtype:
    """What keys and values are kept as."""
    if placement.kv_cache_dtype == "int8":
        return torch.int8
    rounds = packing is not None and not packing.exact
    halved = placement.kv_cache_dtype == "auto" and rounds and dtype == torch.float32
    return torch.float16 if halved else dtype


def _reporters(progress: Report | None, linears: int) -> tuple[checkpoint.Progress | None, checkpoint.Progress | None]:
    """What shows the loading, and then the packing of so many linears."""
    if progress is None:
        return None, None
    streamed = 0

    def loading(done: int, total: int) -> None:
        nonlocal streamed
        streamed = total
        progress(Progress("", "load", done, total + linears))

    return loading, lambda done, total: progress(Progress("", "load", streamed + done, streamed + total))
