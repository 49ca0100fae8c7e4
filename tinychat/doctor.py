"""`tinychat doctor`: what is installed, what this machine can do, why something is off; to be pasted into an issue."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tinychat.errors import TinychatError

Json = dict[str, Any]

SCHEMA = "tinychat.doctor/1"
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "huggingface_hub",
    "numpy",
    "pillow",
    "typer",
    "rich",
    "prompt_toolkit",
)
ISA = (  # what 4-bit kernels look for, in the words of /proc/cpuinfo
    "f16c",
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "sve",
    "sve2",
)
CACHES = ("kernels", "packed", "prefix", "search", "vision")
VARIABLES = ("TINYCHAT_HOME", "TINYCHAT_CACHE", "TINYCHAT_BACKEND", "TINYCHAT_ISA", "NO_COLOR")
NVIDIA_SIGNS = (Path("/proc/driver/nvidia/version"), Path("/etc/nv_tegra_release"))
TOWERS = {  # by the backend of 4-bit models on a CPU
    "cpu": "run there too, in 8 bits; --tower float or --exact keeps them",
    "ref": "stay as they are, in plain torch",
}
BOARD = Path("/proc/device-tree/model")  # a Jetson's name


def report() -> Json:
    """Everything that doctor knows, as docs/json.md has it."""
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "cpu": cpu(),
        "cuda": cuda(),
        "backends": backends(),
        "folders": folders(),
        "awq": awq_owner(),
        "hub": hub(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def versions() -> Json:
    """Versions by distribution name; None where one is not installed."""
    from tinychat import __version__

    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    own = {"tinychat": __version__, "python": platform.python_version(), "system": system}
    return own | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> Json:
    """Name, cores (present, and usable by this process), instruction sets that matter, bytes of RAM."""
    import psutil

    fields = _cpuinfo(Path("/proc/cpuinfo"))
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    memory = psutil.virtual_memory()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "board": BOARD.read_text("utf-8", "replace").strip("\0\n") if BOARD.exists() else None,
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "isa": [name for name in ISA if name in flags],
        "ram_bytes": memory.total,
        "free_ram_bytes": memory.available,
    }


def _cpuinfo(path: Path) -> dict[str, str]:
    """The fields of the first processor; none where the system has no such file."""
    if not path.exists():
        return {}
    first = path.read_text("utf-8", "replace").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _usable_cores() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cuda() -> Json:
    """The CUDA devices that torch sees, and in one sentence why there are none."""
    torch = _torch()
    if torch is None:
        return {"available": False, "reason": "torch is not installed", "runtime": None, "devices": []}
    found = torch.cuda.is_available()
    devices = [_device(torch, index) for index in range(torch.cuda.device_count())] if found else []
    return {
        "available": found,
        "reason": f"{len(devices)} found" if found else _why_no_cuda(torch.__version__, torch.version.cuda),
        "runtime": torch.version.cuda,
        "devices": devices,
    }


def _torch() -> Any:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch


def _device(torch: Any, index: int) -> Json:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": total,
        "free_memory_bytes": free,
    }


def _why_no_cuda(torch_version: str, runtime: str | None) -> str:
    driver = any(sign.exists() for sign in NVIDIA_SIGNS) or shutil.which("nvidia-smi") is not None
    if not driver:
        return "no NVIDIA driver is installed here"
    if runtime is None:
        return f"there is an NVIDIA driver, but torch {torch_version} is a build for the CPU; install a CUDA build"
    return f"torch {torch_version} is built for CUDA {runtime} and finds no device; the driver may be too old for it"


def backends() -> list[Json]:
    """The kernel backends, the fastest first: {name, available, reason, taken, taken_on_gpu}.

    One is taken on the CPU, and one on a GPU where there is one.
    """
    from tinychat_kernels import registry

    states = registry.backends()
    taken = {device: _taken(device) for device in ("cpu", "cuda")}
    return [
        {
            "name": b.name,
            "available": b.available,
            "reason": b.reason,
            "taken": b.name == taken["cpu"],
            "taken_on_gpu": b.name == taken["cuda"],
        }
        for b in states
    ]


def _taken(device: str) -> str | None:
    """The backend for a kind of device; None without the device, or where TINYCHAT_BACKEND names none that runs."""
    from tinychat_kernels import registry
    from tinychat_kernels.errors import KernelError

    torch = _torch()
    if device == "cuda" and (torch is None or not torch.cuda.is_available()):
        return None
    try:
        return registry.chosen(device).name
    except KernelError:
        return None


def kernels() -> Json:
    """What `doctor --kernels` shows: every CUDA op on this machine's GPU."""
    from tinychat import doctor_kernels

    return {"schema": SCHEMA, "kernels": doctor_kernels.report()}


def cache_folder() -> Path:
    """TINYCHAT_CACHE, or the platform's place for caches. It may not exist yet."""
    import platformdirs

    chosen = os.environ.get("TINYCHAT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("tinychat", appauthor=False))


def folders() -> list[Json]:
    """Our folders and the hub's cache: {name, path, exists, writable, bytes}."""
    from huggingface_hub import constants

    from tinychat import store

    places = {"home": store.home(), "cache": cache_folder(), "hub": Path(constants.HF_HUB_CACHE)}
    return [
        {
            "name": name,
            "path": str(path),
            "exists": path.is_dir(),
            "writable": is_writable(path),
            "bytes": folder_bytes(path),
        }
        for name, path in places.items()
    ]


def is_writable(folder: Path) -> bool:
    """Whether files may be written there, or the folder be made: tried with one that has no name and goes at once."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def folder_bytes(path: Path) -> int:
    """Bytes of the regular files below `path`, each link counted as nothing; what cannot be read counts as nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                status = (Path(folder) / name).lstat()
            except OSError:
                continue
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def awq_owner() -> Json:
    """Whether `import awq` finds ours, and which other distribution has a package of that name."""
    owners = metadata.packages_distributions().get("awq", [])
    foreign = sorted({owner for owner in owners if owner.lower() != "tinychat"})
    spec = importlib.util.find_spec("awq")
    path = Path(spec.origin).parent if spec and spec.origin else None
    ours = path == Path(__file__).parents[1] / "awq"
    return {"foreign": foreign, "path": str(path) if path else None, "ours": ours}


def hub() -> Json:
    """Whether downloads are switched off, and whether a token is set (never the token)."""
    from huggingface_hub import constants, get_token

    return {"offline": constants.is_offline_mode(), "token": get_token() is not None}


def cache() -> Json:
    """What `doctor --cache` shows: the cache folder's parts and their sizes."""
    root = cache_folder()
    parts = [{"name": name, "bytes": folder_bytes(root / name)} for name in CACHES if (root / name).is_dir()]
    return {"schema": SCHEMA, "cache": {"path": str(root), "parts": parts}}


def clear_cache() -> int:
    """Delete our parts of the cache folder and nothing else that lies there; returns the bytes freed."""
    root = cache_folder()
    freed = 0
    for part in (root / name for name in CACHES):
        if part.is_dir() and not part.is_symlink():
            freed += folder_bytes(part)
            _delete(part)
    return freed


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise TinychatError(
            f"{error.filename} cannot be deleted: {error.strerror}", "see that the folder is writable"
        ) from error


def size(count: int) -> str:
    """Bytes in the unit that fits: 1.5 GiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def to_text(found: Mapping[str, Any]) -> str:
    """The report as plain text, one block for each part; each line is cleaned: paths and variables hold anything."""
    from tinychat.terminal.clean import clean_line

    blocks = [(title, lines(found[part])) for part, (title, lines) in BLOCKS.items() if part in found]
    return "\n\n".join(
        "\n".join([title, *(f"  {clean_line(line)}" for line in lines or ["none"])]) for title, lines in blocks
    )


def _version_lines(found: Json) -> list[str]:
    return [f"{name} {version or 'not installed'}" for name, version in found.items()]


def _cpu_lines(found: Json) -> list[str]:
    return [
        found["name"] + (f" on {found['board']}" if found["board"] else ""),
        f"{found['cores']} logical cores, {found['usable_cores']} usable; the kernels take a thread a physical one",
        f"instruction sets: {' '.join(found['isa']) or 'none that matter'}",
        f"RAM {size(found['ram_bytes'])}, {size(found['free_ram_bytes'])} free",
    ]


def _cuda_lines(found: Json) -> list[str]:
    head = f"{'on' if found['available'] else 'off'}: {found['reason']}"
    devices = (
        f"{d['name']}, compute {d['capability']}, {size(d['memory_bytes'])}, {size(d['free_memory_bytes'])} free"
        for d in found["devices"]
    )
    return [head, *devices]


def _backend_lines(found: list[Json]) -> list[str]:
    lines = [f"{b['name']} {'on' if b['available'] else 'off'}: {b['reason']}" for b in found]
    lines += [f"4-bit models on a GPU run on {b['name']}" for b in found if b["taken_on_gpu"]]
    taken = next((b["name"] for b in found if b["taken"]), None)
    if taken is None:
        return [*lines, "4-bit models on the CPU run on none of them: see TINYCHAT_BACKEND and TINYCHAT_ISA"]
    return [*lines, f"4-bit models on the CPU run on {taken}", f"their 16-bit vision towers {TOWERS[taken]}"]


def _folder_lines(found: list[Json]) -> list[str]:
    return [
        f"{f['name']} {f['path']} ({size(f['bytes']) if f['exists'] else 'not made yet'}"
        f"{'' if f['writable'] else ', cannot be written'})"
        for f in found
    ]


def _awq_lines(found: Json) -> list[str]:
    lines = [f"import awq finds {'ours' if found['ours'] else found['path'] or 'nothing'}"]
    if found["foreign"]:
        names = ", ".join(found["foreign"])
        lines.append(f"another distribution has a package awq too: {names}; one hides the other")
        lines.append(f"uninstall {names}, then install tinychat again")
    return lines


def _hub_lines(found: Json) -> list[str]:
    downloads = "off (HF_HUB_OFFLINE is set)" if found["offline"] else "on"
    return [f"downloads {downloads}", f"token {'set' if found['token'] else 'not set'}"]


def _cache_lines(found: Json) -> list[str]:
    return [found["path"], *(f"{part['name']} {size(part['bytes'])}" for part in found["parts"])]


def _environment_lines(found: Json) -> list[str]:
    return [f"{name}={value}" for name, value in found.items()]


def _kernel_lines(found: Json) -> list[str]:
    from tinychat import doctor_kernels

    return doctor_kernels.lines(found)


BLOCKS: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    "versions": ("Versions", _version_lines),
    "cpu": ("CPU", _cpu_lines),
    "cuda": ("CUDA", _cuda_lines),
    "backends": ("Kernels", _backend_lines),
    "folders": ("Folders", _folder_lines),
    "awq": ("AWQ package", _awq_lines),
    "hub": ("Model hub", _hub_lines),
    "environment": ("Environment", _environment_lines),
    "cache": ("Cache", _cache_lines),
    "kernels": ("CUDA kernels", _kernel_lines),
}
