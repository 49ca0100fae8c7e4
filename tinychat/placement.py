"""Where a model goes and as what: a device, or a map of its modules to devices, and the memory that is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tinychat.errors import UsageError

CPU, DISK = "cpu", "disk"
Dtype = torch.dtype | str | None
DeviceMap = str | Mapping[str, str | int | torch.device] | None
HEADS = ("int8", "float")
TOWERS = ("int8", "float")
KV_CACHES = ("auto", "float", "int8")
MAPS = ("auto", "balanced", "sequential")
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
        if isinstance(self.device_map, str) and self.device_map not in MAPS:
            known = f"{', '.join(MAPS)}, or a mapping of modules to devices"
            raise UsageError(f"the device map is {self.device_map!r}", f"give {known}")
        if self.device is not None and self.device_map is not None:
            raise UsageError("both a --device and a --device-map are given", "give one of the two")
        if self.max_memory is not None and self.device_map is None:
            raise UsageError("--max-memory is given without --device-map", "add a device map, such as auto")

    @property
    def main_device(self) -> torch.device:
        """Where the model computes: the device, or of a device map the first GPU, and the CPU where it has none."""
        if self.device_map is None:
            return default_device() if self.device is None else torch.device(self.device)
        if isinstance(self.device_map, str):
            return torch.device(next(iter(self.rooms)))
        return main_of(self.device_map)

    @property
    def rooms(self) -> dict[str, int]:
        """Bytes free on each device that may be used, the GPUs first, each up to its limit.

        The CPU always is one. The GPUs are those of the map, else those that have a limit, else all. Raises UsageError.
        """
        from tinychat import planner

        limits = {_limited(name): _size(limit) for name, limit in (self.max_memory or {}).items()}
        used = {} if isinstance(self.device_map, str) else dict(self.device_map or {})
        every = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        asked = {place_name(device) for device in used.values()} if used else set(limits)
        gpus = [place for place in every if place in asked] or ([] if used else every)
        free = {place: planner.free_bytes(torch.device(place)) for place in (*gpus, CPU)}
        return {place: min(limits.get(place, room), room) for place, room in free.items()}

    @property
    def is_spread(self) -> bool:
        """Whether parts of the model are on several devices, or on disk."""
        if self.device_map is None or isinstance(self.device_map, str):
            return self.device_map is not None
        places = {place_name(device) for device in self.device_map.values()}
        return len(places) > 1 or DISK in places


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main_of(device_map: Mapping[str, Any]) -> torch.device:
    """Where a map's modules compute that have no GPU of their own."""
    places = {place_name(device) for device in device_map.values()} - {CPU, DISK}
    return torch.device(min(places, key=lambda place: int(place.removeprefix("cuda:")), default=CPU))


def place_name(name: Any) -> str:
    """A device of a map as "cuda:0", "cpu" or "disk". Raises UsageError for one that is not here."""
    if name == DISK:
        return DISK
    try:
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"there is no device {name!r}", "name cpu, disk, or a CUDA device by its number") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"a device map cannot use {device}", "name cpu, disk, or a CUDA device by its number")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"torch finds {count} CUDA devices, not {device}", "name cpu, or a smaller number")
    return CPU if device.type == "cpu" else f"cuda:{device.index or 0}"


def _limited(name: int | str) -> str:
    """A device that has a limit. Raises UsageError for the disk."""
    if name == DISK:
        raise UsageError("max_memory has a limit for disk", "limit cpu, or a CUDA device by its number")
    return place_name(name)


def _size(limit: int | str) -> int:
    """Bytes, from a number or accelerate's notation. Raises UsageError for anything else."""
    from accelerate.utils.modeling import convert_file_size_to_int

    try:
        return convert_file_size_to_int(limit)
    except ValueError as error:
        raise UsageError(f"the limit of memory {limit!r} is no size", "give bytes, or such as 10GiB") from error
