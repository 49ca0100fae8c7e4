"""Tiny random CLIP and SigLIP folders as transformers writes them, and folders of random pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from PIL import Image as pillow
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

SIDE, LENGTH = 32, 16
PAD, END, BEGIN = "<pad>", "<end>", "<begin>"


def tokenizer(begins: bool) -> PreTrainedTokenizerFast:
    """Bytes between marks, the first of them where a text `begins` with one."""
    marks = (PAD, END, BEGIN)
    vocabulary = {token: i for i, token in enumerate((*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}" if begins else f"$A {END}",
        special_tokens=[(BEGIN, vocabulary[BEGIN]), (END, vocabulary[END])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BEGIN, eos_token=END, model_max_length=LENGTH
    )


def tower(**more: object) -> dict[str, object]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "hidden_act": "gelu", **more}


def config_of(family: str, words: PreTrainedTokenizerFast) -> CLIPConfig | SiglipConfig:
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    text = tower(vocab_size=len(words), max_position_embeddings=LENGTH, **ids)
    vision = tower(image_size=SIDE, patch_size=8)
    if family == "clip":
        return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision)


def make_clip(folder: Path, family: str = "clip", seed: int = 0) -> Path:
    """A whole model folder; weights are large enough for pictures and texts to differ, and no bias is zero."""
    words = tokenizer(begins=family == "clip")
    torch.manual_seed(seed)
    model = {"clip": CLIPModel, "siglip": SiglipModel}[family](config_of(family, words))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.25)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    made = {
        "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": side},
        "siglip": {"image_processor_type": "SiglipImageProcessor", "size": side, "resample": 3},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(made[family]))
    return folder


def picture(seed: int, size: tuple[int, int] = (40, 36)) -> pillow.Image:
    """A few blocks of random colours."""
    small = pillow.frombytes("RGB", (3, 3), random.Random(seed).randbytes(27))
    return small.resize(size, pillow.Resampling.NEAREST)


def make_pictures(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number).save(folder / f"{number:03}.png")
    return folder
