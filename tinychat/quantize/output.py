"""The finished folder: it has the layout of the source, whose other tensors, configs and words are carried over."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from awq.save import Work, sync
from tinychat.checkpoint import EMBEDDINGS, rename
from tinychat.config import read_json
from tinychat.int8_tower import quantization as int8_quantization
from tinychat.layouts import quantization_config
from tinychat.quantize.job import LAYER, SPARED, TOWER_LAYER, Job, Source
from tinychat.quantize.tower import spared_linears, tower_part
from tinychat.quantize.writing import Copy, write_sharded
from tinychat.weight_files import Entry, entries_of
from tinychat_kernels.formats import GEMM
from tinychat_kernels.layout import HALVES

Json = dict[str, Any]

TOWER = "vision_tower"
CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
LEFT = ("*.index.json", "quantize.json", "quality.json", "trainer_state.json", "training_args*", "optimizer*")
DTYPE_KEYS = ("dtype", "torch_dtype", "model_dtype")
BLOCK = "block-"
LOG = "quantize.log"


def block_name(i: int) -> str:
    """The name of a layer's part in the work."""
    return f"{BLOCK}{i:05d}"


def assemble(job: Job, source: Source, work: Work, folder: Path) -> None:
    """Write a folder that is complete but for the facts and the log. What stood there before is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for place, copies in _placed(job, source, work).items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_sharded(copies, folder / place)
    _carry_files(source, folder)
    _write_configs(job, source, folder)
    if job.vision == "w8a8":
        _write_tower_config(work, folder / TOWER)


def publish(folder: Path, out: Path) -> None:
    """Everything to the disk, and then to its name, in one step."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    folder.replace(out)
    sync(out.parent)


def _placed(job: Job, source: Source, work: Work) -> dict[Path, list[Copy]]:
    """The tensors of the finished checkpoint by the folder that holds them, in the order of the source."""
    placed: defaultdict[Path, list[Copy]] = defaultdict(list)
    written: set[str] = set()
    for name in source.raw.names():
        entry = source.raw.entry(name)
        part, inner = _part_of(rename(name, source.config.layout), source, work)
        if not part:
            placed[_place(source, entry)].append(Copy(entry.key, entry, source.stored(entry)))
        elif part not in written:
            written.add(part)
            placed[_place(source, entry)] += _layer(work, part, entry.key.removesuffix(inner))
    return placed


def _part_of(name: str, source: Source, work: Work) -> tuple[str, str]:
    """The part of the work that holds a tensor's layer, and its name from there; nothing where it stays as it is."""
    if (match := LAYER.fullmatch(name)) and name in source.index:
        return block_name(int(match[1])), match[2]
    if (match := TOWER_LAYER.fullmatch(name)) and (part := tower_part(int(match[1]))) in work.parts:
        return part, match[2]
    return "", ""


def _layer(work: Work, part: str, prefix: str) -> Iterator[Copy]:
    """A layer's tensors in its part, under the names that the checkpoint gives to the layer."""
    entries = entries_of(work.folder / work.parts[part].file, [])
    for name in sorted(entries):
        yield Copy(prefix + name, entries[name], entries[name].dtype)


def _place(source: Source, entry: Entry) -> Path:
    """The folder of a tensor, relative to the model's; a tower that lies elsewhere comes into vision_tower/."""
    parent = entry.path.parent
    return parent.relative_to(source.folder) if parent.is_relative_to(source.folder) else Path(TOWER)


def _homes(source: Source) -> dict[Path, Path]:
    """Folders to carry files from -> where they go."""
    homes = {source.folder: Path()}
    for name in source.raw.names():
        entry = source.raw.entry(name)
        homes[entry.path.parent] = _place(source, entry)
    for name in ("llm", TOWER, "mm_projector"):
        if (source.folder / name).is_dir():
            homes[source.folder / name] = Path(name)
    return homes


def _carry_files(source: Source, folder: Path) -> None:
    for home, place in _homes(source).items():
        for path in carried(home):
            (folder / place).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place / path.name)


def carried(home: Path) -> list[Path]:
    """The files of a folder that go into the checkpoint as they are: configs, tokenizer, processors, licences."""
    found = {path for pattern in CARRIED for path in home.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not any(path.match(pattern) for pattern in LEFT))


def _write_configs(job: Job, source: Source, folder: Path) -> None:
    """The quantization goes into the decoder's config; dtypes are those that the tensors have now."""
    decoder = folder / "llm" if (folder / "llm" / "config.json").is_file() else folder
    for home in {folder, decoder, *(folder / place for place in _homes(source).values())}:
        path = home / "config.json"
        if path.is_file():
            content = read_json(path)
            if _was_wide(source):
                content = _narrowed(content)
            if home == decoder and not job.pseudo:
                layout = source.config.layout
                content["quantization_config"] = quantization_config(GEMM, job.spec, SPARED[layout], layout)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tower_config(work: Work, home: Path) -> None:
    """The tower's own config says that it has 8 bits."""
    content = {**read_json(home / "config.json"), "quantization_config": int8_quantization(spared_linears(work))}
    (home / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _was_wide(source: Source) -> bool:
    return source.index.dtype(EMBEDDINGS) not in HALVES


def _narrowed(content: Any) -> Any:
    """A config in which every wide float type is float16."""
    if not isinstance(content, Mapping):
        return content
    rows = {key: _narrowed(value) for key, value in content.items()}
    for key in DTYPE_KEYS:
        if isinstance(value := rows.get(key), str):
            rows[key] = value.replace("float32", "float16").replace("float64", "float16")
    return rows
