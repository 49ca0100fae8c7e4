"""What is known about a checkpoint that was made here: options, data, losses, versions; quantize.json in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awq.save import Work
from tinychat.bench import peak_ram
from tinychat.config import read_json
from tinychat.quantize.calibration import Data
from tinychat.quantize.fingerprint import versions
from tinychat.quantize.job import Job, spared
from tinychat.quantize.output import BLOCK
from tinychat.quantize.tower import facts_of_tower

SCHEMA = "tinychat.quantize/1"
FACTS = "quantize.json"
SPENT = "_s"  # of the work's notes, the seconds
ON_CARD = ("model", "format", "options", "calibration", "fallbacks", "spared", "versions")


def facts_of(job: Job, layout: str, data: Data | None, work: Work) -> dict[str, Any]:
    """All of it; but for wall time and memory the same for every run."""
    layers = [dict(work.parts[name].facts) for name in sorted(work.parts) if name.startswith(BLOCK)]
    tower, spent = facts_of_tower(work)
    wall = (
        spent
        + sum(layer.pop("seconds") for layer in layers)
        + sum(value for name, value in work.notes.items() if name.endswith(SPENT))
    )
    return {
        "schema": SCHEMA,
        "model": job.name or job.folder.name,
        "layout": layout,
        "format": "float" if job.pseudo else "awq gemm",
        "options": job.options,
        "calibration": _calibration(job, data) if data else None,
        "layers": layers,
        "vision": tower if job.vision == "w8a8" else None,
        "fallbacks": [i for i, layer in enumerate(layers) if job.searches and layer["kept"] == "rtn"],
        "spared": list(spared(job, layout)),
        "versions": versions(),
        "fingerprint": work.fingerprint,
        "wall_s": round(wall, 3),
        "peak_ram": peak_ram(),
    }


def of_folder(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint that was made here. Raises ModelError where it was not."""
    return read_json(folder / FACTS)


def for_card(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a quality card tells: without the losses of each linear, the hashes of each file, and the hour."""
    told = {name: found[name] for name in ON_CARD if found.get(name) is not None}
    if vision := found.get("vision"):
        told["vision"] = {name: value for name, value in vision.items() if name != "layers"}
    return told


def title_of(method: str, bits: int, pseudo: bool = False) -> str:
    """What a quantized model is called in a table: `AWQ 4 bit`."""
    return f"{method.upper()} {bits} bit{', as floats' if pseudo else ''}".strip()


def _calibration(job: Job, data: Data) -> dict[str, Any]:
    return {
        "sources": [Path(name).name for name in data.sources],
        "sequences": len(data.prompts),
        "pictures": data.pictures,
        "tokens": sum(data.lengths),
        "seqlen": data.seqlen,
        "seed": job.calibration.seed,
        "sha256": data.sha256,
    }
