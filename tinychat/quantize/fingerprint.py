"""What decides about a result: the model's files, the calibration, the options, our code, and what computes."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import awq
import tinychat
import tinychat_kernels
from awq.save import sha256
from tinychat.quantize.job import Job, Source
from tinychat.quantize.output import carried

CODE = ("awq", *(f"tinychat_kernels/{name}.py" for name in ("layout", "words", "int8", "ref")))
OURS = (
    "tinychat/layers",
    "tinychat/models",
    "tinychat/quantize/blocks.py",
    "tinychat/quantize/embedding.py",
    "tinychat/quantize/states.py",
    "tinychat/quantize/tower.py",
    "tinychat/search_results.py",
)


def fingerprint(job: Job, files: Mapping[str, str], calibration: str | None) -> dict[str, Any]:
    """All of it, as a tree of names. `files` are those of hash_files, `calibration` is the data's hash."""
    return {
        "model": dict(files),
        "calibration": calibration,
        "options": {**job.options, "seed": job.calibration.seed},
        "code": {"tinychat": tinychat.__version__, "sources": _sources()},
        "machine": machine(job),
    }


def machine(job: Job) -> dict[str, Any]:
    """What floating-point results depend on besides the code."""
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device_name(job.device),
    }


def device_name(device: str) -> str:
    """cpu, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def versions() -> dict[str, str]:
    """Of what made a checkpoint."""
    import transformers

    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "tinychat": tinychat.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": python,
    }


def files_of(job: Job, source: Source) -> dict[str, Path]:
    """Every file that goes into the result, by its name in the model's folder; search results by what they are."""
    weights = {source.raw.entry(name).path for name in source.raw.names()}
    homes = {source.folder, *(path.parent for path in weights)}
    paths = sorted(weights | {path for home in homes for path in carried(home)})
    inside = {path: path.is_relative_to(source.folder) for path in paths}
    given = {} if job.search_results is None else {"search results": job.search_results}
    return given | {str(path.relative_to(source.folder)) if inside[path] else path.name: path for path in paths}


def hash_files(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """(name, hash of the content) of each, as they are read."""
    for name, path in files.items():
        yield name, sha256(path)


@functools.cache
def _sources() -> str:
    """A hash of the modules that decide about a result."""
    return _hash_of(path for name in (*CODE, *OURS) for path in _modules(name))


def _modules(name: str) -> list[Path]:
    packages = {package.__name__: Path(package.__file__ or "").parent for package in (awq, tinychat, tinychat_kernels)}
    package, _, inner = name.partition("/")
    path = packages[package] / inner
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def _hash_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
