"""What lies beside a converted checkpoint's weights: configs, words, and what is carried over."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tinychat import layouts
from tinychat.config import read_json
from tinychat.eval import page
from tinychat.hub import find_tower
from tinychat.inputs.processor import Processor
from tinychat.quantize.job import SPARED

if TYPE_CHECKING:
    from tinychat.convert import ImageToken, Job

Json = dict[str, Any]

LINEAR = re.compile(r"llm\.model\.(layers\..*_proj)\.weight")
POOLING = "vision_tower.vision_model.head."  # no computation of ours needs it, and SigLIP's config in transformers may


def write_files(job: Job, draft: Path) -> None:
    """Configs and words, and what is carried over; a quality card only where it still tells of these weights."""
    tower = find_tower(job.folder, job.config) if job.config.layout == "llava" else None
    for place, path in layouts.files_to_carry(job.folder, tower, job.layout == "vila").items():
        if place.name != "processor_config.json" or job.layout == "llava_hf":
            shutil.copyfile(path, draft / place)
    if job.rounds_head:
        page.remove(draft)
    quantization = layouts.quantization_config(job.target.format, job.spec, _spared(job), job.layout, job.head)
    if job.layout == "vila":
        _write_vila_configs(job, draft, quantization)
    else:
        _write_root_config(job, draft, quantization)
    if job.image is not None:
        _write_words_of_pictures(job, draft, job.image)


def _spared(job: Job) -> list[str]:
    """The modules that stay in 16 bit; linears of the decoder among them, named from `layers` on as all programs do."""
    return [*SPARED[job.layout], *(match[1] for name in job.index.names() if (match := LINEAR.fullmatch(name)))]


def _write_vila_configs(job: Job, draft: Path, quantization: Json | None) -> None:
    said = {"quantization_config": quantization} if quantization else {}
    for part in layouts.VILA_PARTS:
        fields = layouts.part_config(job.config, part)
        _write_json(draft / part / "config.json", {**fields, **said} if part == "llm" else fields)
    if job.config.layout != "vila":
        root = layouts.vila_config(job.config, job.dtype)
    else:
        root = _without_quantization(read_json(job.folder / "config.json"))
        root |= {key: part for part, key in layouts.VILA_PARTS.items() if isinstance(root.get(key), dict)}
    _write_json(draft / "config.json", {**root, **said})


def _write_root_config(job: Job, draft: Path, quantization: Json | None) -> None:
    said = {"quantization_config": quantization} if quantization else {}
    if job.image is None:
        root = _without_quantization(read_json(job.folder / "config.json"))
    else:
        head = any(name.startswith(POOLING) for name in job.index.names())
        root = layouts.llava_config(job.config, job.image.id, job.image.vocab_size, head, job.dtype)
    _write_json(draft / "config.json", {**root, **said})


def _without_quantization(root: Json) -> Json:
    """A config that says nothing of it, at no level."""
    kept = {key: value for key, value in root.items() if key not in ("quantization_config", "compression_config")}
    return {key: _without_quantization(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _write_words_of_pictures(job: Job, draft: Path, image: ImageToken) -> None:
    """What a processor of transformers reads, and a tokenizer that has the image token."""
    from tokenizers import AddedToken

    words = Processor.from_folder(job.folder, job.config)
    tokenizer, pictures = cast("Any", words.tokenizer), cast("Any", words.image_processor)
    if tokenizer.get_added_vocab().get(job.config.image_token) != image.id:
        tokenizer.add_tokens([AddedToken(job.config.image_token, special=True, normalized=False)])
        tokenizer.save_pretrained(draft)
    stored = draft / layouts.OF_PICTURES[0]
    raw = read_json(stored) if stored.is_file() else pictures.to_dict()
    _write_json(stored, layouts.preprocessor_config(raw, job.config))
    _write_json(draft / "processor_config.json", layouts.processor_config(job.config))


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
