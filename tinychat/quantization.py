"""What a checkpoint is quantized with: said by its config, or told by the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from tinychat.checkpoint import Index
from tinychat.config import VilaConfig
from tinychat.errors import ModelError
from tinychat_kernels import formats
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.formats import Format
from tinychat_kernels.layout import GROUP_SIZES, QuantSpec

Json = dict[str, Any]

HEAD, LINEAR = "lm_head", "model.layers.0.mlp.up_proj"  # examples of what a group may be for
LLM_AWQ = "llm-awq"  # as a version or a backend: any of its generations
AWQ = {  # version in the config -> format
    "gemm": formats.GEMM,
    "gemv": formats.GEMV,
    "gemv_fast": formats.GEMV_FAST,
    LLM_AWQ: formats.LLM_AWQ_V2,
}
GPTQ = {"gptq": formats.GPTQ, "gptq_v2": formats.GPTQ_V2}
OTHER = "take another checkpoint, or the 16-bit model"
UNTOLD = "add the quantization_config that belongs to the weights to config.json"


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the decoder's linears are stored, and what they stand for; `head`: how a head is that is packed as well."""

    format: Format
    spec: QuantSpec
    head: QuantSpec | None = None

    @property
    def head_format(self) -> Format:
        """Of the formats, compressed-tensors alone has others than 4 bits."""
        return formats.COMPRESSED_TENSORS_8 if self.head is not None and self.head.bits == 8 else self.format


def quantization_of(config: VilaConfig, index: Index | None = None) -> Quantization | None:
    """What the config says, else what the tensors are; None for float weights.

    Raises ModelError for a method, a version or a setting that is not supported.
    """
    raw = raw_quantization(config)
    by_llm_awq = LLM_AWQ in (raw.get("version"), raw.get("format"), raw.get("backend"))
    if index is not None and (not raw or by_llm_awq):
        return _told(index)
    if not raw:
        return None
    method = str(raw.get("quant_method", "unknown"))
    if method not in _METHODS:
        raise _unsupported(method)
    try:
        return _METHODS[method](raw)
    except LayoutError as error:
        raise ModelError(f"the quantization_config is not supported: {error}", OTHER) from error


def raw_quantization(config: VilaConfig) -> Json:
    """The quantization_config of the root, else of the decoder's own config.json; compressed-tensors has its own."""
    roots: list[Mapping[str, Any]] = [vars(config), config.llm_cfg or {}]
    found = [root[key] for root in roots for key in ("quantization_config", "compression_config") if root.get(key)]
    if not found:
        return {}
    if isinstance(found[0], Mapping):
        return dict(found[0])
    if not isinstance(found[0], QuantizationConfigMixin):
        raise ModelError(f"the quantization_config is {found[0]!r}, not an object", "check config.json")
    return found[0].to_dict()


def _unsupported(name: str) -> ModelError:
    message = f"the checkpoint is quantized with {name}, which is not supported"
    works = "4-bit AWQ (gemm, gemv, gemv_fast), GPTQ without activation order, and compressed-tensors (pack-quantized)"
    return ModelError(message, f"take a checkpoint in one of {works}, or the 16-bit model")


def _check_bits(bits: object, name: str) -> None:
    if bits != 4:
        raise ModelError(f"the checkpoint has {bits}-bit {name} weights", "take a 4-bit one")


def _awq(raw: Json) -> Quantization:
    version = str(raw.get("version") or raw.get("format") or raw.get("checkpoint_format") or "gemm").lower()
    if version not in AWQ:
        raise _unsupported(f"awq/{version}")
    _check_bits(raw.get("bits", raw.get("w_bit", 4)), "AWQ")
    group = raw.get("group_size", raw.get("q_group_size", 128))
    return Quantization(AWQ[version], QuantSpec(4, group, bool(raw.get("zero_point", True))))


def _gptq(raw: Json) -> Quantization:
    version = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
    if version not in GPTQ:
        raise _unsupported(f"gptq/{version}")
    _check_bits(raw.get("bits", 4), "GPTQ")
    if raw.get("desc_act") and raw.get("group_size") != -1:
        raise ModelError("the checkpoint has GPTQ weights in activation order (desc_act)", "take one without it")
    return Quantization(GPTQ[version], QuantSpec(4, raw.get("group_size", 128), not raw.get("sym", True)))


def _compressed_tensors(raw: Json) -> Quantization:
    groups = list((raw.get("config_groups") or {}).values())
    heads = [group for group in groups if _is_of_head(group.get("targets") or [])]
    others = [group for group in groups if group not in heads]
    if len(others) != 1 or len(heads) > 1:
        message = f"the quantization_config has {len(groups)} config_groups, one is supported, and one of the head"
        raise ModelError(message, OTHER)
    spec = _scheme(raw, others[0], (4,))
    head = _scheme(raw, heads[0], (4, 8)) if heads else spec
    return Quantization(formats.COMPRESSED_TENSORS, spec, head)


def _is_of_head(targets: Sequence[str]) -> bool:
    """Whether the targets of a group name the head and no linear of the decoder."""
    return bool(targets) and all(_names(target, HEAD) and not _names(target, LINEAR) for target in targets)


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise ModelError(f"the quantization_config has the target {target!r} ({error})", "check config.json") from error


def _scheme(raw: Json, group: Json, bits: Sequence[int]) -> QuantSpec:
    """What a config group says of its weights. Raises ModelError for what is not supported."""
    kind = str(group.get("format") or raw.get("format"))
    if kind != "pack-quantized":
        raise _unsupported(f"compressed-tensors/{kind}")
    weights: Json = group.get("weights") or {}
    if weights.get("num_bits") not in bits:
        raise ModelError(
            f"the checkpoint has {weights.get('num_bits')}-bit compressed-tensors weights", "take a 4-bit one"
        )
    wanted: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("type", weights.get("type", "int"), ("int",)),
        ("strategy", weights.get("strategy"), ("group", "channel")),
        ("actorder", weights.get("actorder"), (None, False, "static", "weight")),
        ("input_activations", group.get("input_activations"), (None,)),
    )
    for name, found, known in wanted:
        if found not in known:
            raise ModelError(f"{name} of the quantization_config is {found!r}, which is not supported", OTHER)
    size = weights.get("group_size") if weights.get("strategy") == "group" else -1
    return QuantSpec(weights["num_bits"], size or -1, not weights.get("symmetric", True))


_METHODS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}


def _told(index: Index) -> Quantization | None:
    """From the first packed linear: llm-awq's .pt files say nowhere else what they are."""
    for name in index.names():
        stem, _, end = name.rpartition(".")
        if end in ("qweight", "weight_packed"):
            return _recognised(stem, dict(_parts(index, stem)))
    return None


def _parts(index: Index, stem: str) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
    for name in ("qweight", "qzeros", "scales", "scaled_zeros", "g_idx", "weight_packed"):
        if f"{stem}.{name}" in index:
            yield name, (index.shape(f"{stem}.{name}"), index.dtype(f"{stem}.{name}"))


def _recognised(stem: str, parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Quantization:
    shapes = {name: shape for name, (shape, _) in parts.items()}
    if "weight_packed" in parts or "g_idx" in parts or "scales" not in parts:
        raise ModelError(f"{stem} is packed, and no quantization_config says how", UNTOLD)
    if "scaled_zeros" in parts:
        format = formats.LLM_AWQ_V2
    elif parts["qweight"][1] == torch.int16:
        format = formats.GEMV_FAST
    else:  # the outputs come first in all of GEMV's tensors, and the inputs or the groups in GEMM's
        rows = {shapes[name][0] for name in ("qweight", "qzeros", "scales") if name in shapes}
        format = formats.GEMV if len(rows) == 1 else formats.GEMM
    for group in GROUP_SIZES:
        try:
            format.check_shapes(shapes, spec := QuantSpec(4, group))
        except LayoutError:
            continue
        return Quantization(format, spec)
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    message = f"{stem} ({listed}) is no {format.name} linear of groups of 32, 64 or 128"
    raise ModelError(message, OTHER)
