"""Where a model goes and as what: a device, or a map of its modules to devices, and the memory that is there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tinychat.errors import CapacityError, UsageError

if TYPE_CHECKING:
    from tinychat.models.vila_llama import VilaLlamaForCausalLM

Dtype = torch.dtype | str | None
DeviceMap = str | Mapping[str, str | int | torch.device] | None
HEADS = ("int8", "float")
TOWERS = ("int8", "float")
KV_CACHES = ("auto", "float", "int8")
MaxMemory = Mapping[int | str, int | str] | None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights go, and as what. Raises UsageError where the arguments contradict each other.

    For the CPU kernels: `exact` keeps activations in float32, and with them the tower's weights; `head` and `tower` say
    whether those of 16 bits beside a 4-bit decoder get 8 ("int8") or stay ("float"); `threads` is how many they run on
    from then on (None: as before). `kv_cache_dtype`: keys and values are "float", of the model's dtype, or "int8" with
    a scale for each token and head; "auto" is float, in half precision where the CPU kernels round activations of a
    float32 model anyway. `asked` are the options that the user gave, of --exact, --head int8 and --tower int8: where
    one of them cannot do anything, nothing is loaded. `sharers` processes take from the same memory at once.
    """

    dtype: Dtype = None
    device: str | torch.device | None = None
    device_map: DeviceMap = None
    max_memory: MaxMemory = None
    dequantize: bool = False
    exact: bool = False
    head: str = "int8"
    tower: str = "int8"
    threads: int | None = None
    kv_cache_dtype: str = "auto"
    asked: frozenset[str] = frozenset()
    sharers: int = 1

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise UsageError(f"the head is {self.head!r}", f"give {' or '.join(HEADS)}")
        if self.tower not in TOWERS:
            raise UsageError(f"the tower is {self.tower!r}", f"give {' or '.join(TOWERS)}")
        if self.kv_cache_dtype not in KV_CACHES:
            raise UsageError(f"--kv-cache-dtype is {self.kv_cache_dtype!r}", f"give {', '.join(KV_CACHES)}")
        if self.dequantize and self.device_map is not None:
            raise UsageError("both --dequantize and a --device-map are given", "give one of the two")
        if self.device is not None and self.device_map is not None:
            raise UsageError("both a --device and a --device-map are given", "give one of the two")
        if self.max_memory is not None and self.device_map is None:
            raise UsageError("--max-memory is given without --device-map", "add a device map, such as auto")

    @property
    def main_device(self) -> torch.device:
        """Where the model computes: the device, or with a device map CUDA."""
        if self.device_map is not None:
            return torch.device("cuda")
        return default_device() if self.device is None else torch.device(self.device)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def room(device_map: str | Mapping[str, Any], max_memory: MaxMemory) -> int:
    """Bytes on all devices of a map together, each up to its limit."""
    from tinychat import planner

    limits = dict(max_memory or {})
    every: list[Any] = list(limits) or [*range(torch.cuda.device_count()), "cpu"]
    used = every if isinstance(device_map, str) else dict.fromkeys(device_map.values())
    return sum(min(_size(limits.get(name, sys.maxsize)), planner.free_bytes(_present(name))) for name in used)


def _present(name: str | int | torch.device) -> torch.device:
    """A device of a map. Raises UsageError for one that is not here."""
    count = torch.cuda.device_count()
    try:
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}", "name cpu, or a CUDA device by its number") from error
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"torch finds {count} CUDA devices, not {device}", "name cpu, or a smaller number")
    return device


def _size(limit: int | str) -> int:
    """Bytes, from a number or accelerate's notation. Raises UsageError for anything else."""
    from accelerate.utils.modeling import convert_file_size_to_int

    try:
        return convert_file_size_to_int(limit)
    except ValueError as error:
        raise UsageError(f"the limit of memory {limit!r} is no size", "give bytes, or such as 10GiB") from error


def make_device_map(
    model: nn.Module, asked: str | Mapping[str, Any], max_memory: MaxMemory, dtype: torch.dtype
) -> dict[str, Any]:
    """accelerate's map of modules to devices. Raises CapacityError where something would go to disk."""
    if not isinstance(asked, str):
        return dict(asked)
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if asked not in ("auto", "sequential"):
        raise UsageError(f"the device map is {asked!r}", "give auto, sequential, or a mapping of modules to devices")
    whole: dict[str, Any] = {"no_split_module_classes": model._no_split_modules, "dtype": dtype}
    memory = dict(max_memory) if max_memory is not None else None
    if asked == "auto":
        memory = get_balanced_memory(model, memory, **whole)
    found = infer_auto_device_map(model, memory, **whole)
    if homeless := [name for name, device in found.items() if device == "disk"]:
        which = (
            f"{len(homeless)} parts of the model ({homeless[0]}, ...) fit" if homeless[0] else "the whole model fits"
        )
        raise CapacityError(
            f"{which} on no device within the memory allowed", "allow more memory, or take a 4-bit checkpoint"
        )
    return found


def dispatched(model: VilaLlamaForCausalLM, device_map: dict[str, Any]) -> VilaLlamaForCausalLM:
    from accelerate import dispatch_model

    if len(set(map(str, device_map.values()))) > 1:
        dispatch_model(model, device_map)  # hooks that move activations between the devices, set in place
    return model
