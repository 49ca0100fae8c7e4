#!/usr/bin/env python3
"""Write a random model of any supported layout and architecture, with a tokenizer: for tests and benchmarks.

    scripts/make_tiny_model.py DIR [--layout vila|llava|llava_hf|llava_next|text] [--shape tiny|1b|3b|8b] [--quantize N]

The tensors' names and shapes are written down here, apart from the model classes: loading such a folder checks them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tinychat.checkpoint import SHARD_SIZE, write_safetensors
from tinychat.errors import TinychatError, UsageError
from tinychat.terminal.clean import clean_line
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import QuantSpec, from_logical, quantize

Json = dict[str, Any]
Sized = tuple[str, tuple[int, ...]]

BOS, END, TURN, IMAGE = "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GROUPS = (32, 64, 128)
BLOCK = 2**22 + 15  # larger tensors repeat a random block of this size, which no row length divides
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
LLAVA_TYPES = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}
# Widths of a downsampling projector's linears in units of the tower's, and the side of its squares of patches.
DOWNSAMPLE = {
    "mlp_downsample": (2, (4.0,)),
    "mlp_downsample_2x2_fix": (2, (4.0,)),
    "mlp_downsample_3x3_fix": (3, (9.0, 3.0)),
    "mlp_downsample_3x3_s2": (3, (9.0, 3.0, 1.0, 1 / 3)),
    "mlp_downsample_3x3_s2_new": (3, (9.0, 4.0, 2.0, 1.0, 1 / 3)),
}


@dataclass(frozen=True)
class Shape:
    """What a model is made of; the fields are flags of the script."""

    text: str = "llama"
    vision: str = "clip"
    projector: str = "mlp2x_gelu"
    vocab_size: int = 320
    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    max_positions: int = 2048
    tied: bool = False
    vision_hidden_size: int = 32
    vision_intermediate_size: int = 64
    vision_layers: int = 3
    vision_heads: int = 2
    image_size: int = 56
    patch_size: int = 14

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


_CLIP_L = Shape(
    vision_hidden_size=1024, vision_intermediate_size=4096, vision_layers=24, vision_heads=16, image_size=336
)  # fmt: skip
_SO400M = Shape(
    vision="siglip", projector="mlp_downsample", vision_hidden_size=1152, vision_intermediate_size=4304,
    vision_layers=27, vision_heads=16, image_size=384,
)  # fmt: skip
SHAPES = {
    "tiny": Shape(),
    "1b": replace(  # the decoder of Llama-3.2-1B with the tower of LLaVA-1.5
        _CLIP_L, vocab_size=128256, hidden_size=2048, intermediate_size=8192, layers=16, heads=32, kv_heads=8,
        tied=True, max_positions=8192,
    ),
    "3b": replace(  # VILA-1.5-3B
        _SO400M, vocab_size=32000, hidden_size=2560, intermediate_size=6912, layers=32, heads=20, kv_heads=20,
        max_positions=4096,
    ),
    "8b": replace(  # VILA-1.5-8B
        _SO400M, vocab_size=128256, hidden_size=4096, intermediate_size=14336, layers=32, heads=32, kv_heads=8,
        max_positions=8192,
    ),
}  # fmt: skip


class Recipe(NamedTuple):
    """How the numbers are drawn and stored. `group`: quantize the decoder's linears in groups of this size."""

    seed: int
    dtype: torch.dtype
    group: int | None
    shard_size: int


def make_tiny_model(
    folder: Path,
    layout: str = "vila",
    *,
    shape: str = "tiny",
    seed: int = 0,
    dtype: str = "float32",
    quantize: int | None = None,
    shard_size: int = SHARD_SIZE,
    **changes: Any,
) -> Path:
    """Write a model folder and return it. `changes` are fields of Shape; `quantize` is a group size (AWQ GEMM, 4 bit).

    Tensors are drawn and written one by one, a shard in memory at most. Raises UsageError for what no layout can hold.
    """
    made = replace(SHAPES[shape], **changes)
    if quantize is not None:
        _check_groups(made, quantize)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}", "give another folder") from error
    recipe = Recipe(seed, getattr(torch, dtype), quantize, shard_size)
    _WRITERS[layout](folder, made, recipe)
    return folder


def _check_groups(shape: Shape, group: int) -> None:
    """Raises UsageError, before anything is written, where a linear of the decoder cannot be quantized."""
    try:
        spec = QuantSpec(group_size=group)
        for name, dims in decoder_tensors(shape):
            if _is_quantized(name):
                spec.check(in_features=dims[1], out_features=dims[0])
    except LayoutError as error:
        raise UsageError(str(error), "give another --quantize, or larger sizes") from error


def _is_quantized(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def decoder_tensors(shape: Shape) -> Iterator[Sized]:
    """Names and shapes as transformers writes them for Llama, Mistral and Qwen2."""
    wide, inner, kv = shape.hidden_size, shape.intermediate_size, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, wide)
    for i in range(shape.layers):
        at = f"model.layers.{i}"
        yield f"{at}.input_layernorm.weight", (wide,)
        for name, rows in (("q", wide), ("k", kv), ("v", kv)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, wide)
            if shape.text == "qwen2":
                yield f"{at}.self_attn.{name}_proj.bias", (rows,)
        yield f"{at}.self_attn.o_proj.weight", (wide, wide)
        yield f"{at}.post_attention_layernorm.weight", (wide,)
        yield f"{at}.mlp.gate_proj.weight", (inner, wide)
        yield f"{at}.mlp.up_proj.weight", (inner, wide)
        yield f"{at}.mlp.down_proj.weight", (wide, inner)
    yield "model.norm.weight", (wide,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab_size, wide)


def tower_tensors(shape: Shape) -> Iterator[Sized]:
    """Names and shapes under `vision_model.` of a published CLIP or SigLIP tower."""
    wide, patch, clip = shape.vision_hidden_size, shape.patch_size, shape.vision == "clip"
    if clip:
        yield "embeddings.class_embedding", (wide,)
    yield "embeddings.patch_embedding.weight", (wide, 3, patch, patch)
    if not clip:
        yield "embeddings.patch_embedding.bias", (wide,)
    yield "embeddings.position_embedding.weight", ((shape.image_size // patch) ** 2 + clip, wide)
    if clip:
        yield from _affine("pre_layrnorm", (wide,))
    for i in range(shape.vision_layers):
        at = f"encoder.layers.{i}"
        yield from _affine(f"{at}.layer_norm1", (wide,))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{at}.self_attn.{name}", (wide, wide))
        yield from _affine(f"{at}.layer_norm2", (wide,))
        yield from _affine(f"{at}.mlp.fc1", (shape.vision_intermediate_size, wide))
        yield from _affine(f"{at}.mlp.fc2", (wide, shape.vision_intermediate_size))
    yield from _affine("post_layernorm", (wide,))


def projector_tensors(shape: Shape) -> Iterator[Sized]:
    """Names and shapes by the layers' numbers: `0.weight`, `2.weight`; a single linear has no number."""
    wide, out = shape.vision_hidden_size, shape.hidden_size
    if shape.projector == "linear":
        yield from [("weight", (out, wide)), ("bias", (out,))]
    elif shape.projector in DOWNSAMPLE:
        widths = [int(wide * part) for part in DOWNSAMPLE[shape.projector][1]]
        for i, (inner, after) in enumerate(zip(widths, [*widths[1:], out], strict=True)):
            yield from _affine(f"{3 * i + 1}", (inner,))
            yield from _affine(f"{3 * i + 2}", (after, inner))
        yield from _affine(f"{3 * len(widths) + 1}", (out, out))
    elif shape.projector != "identity":
        depth = int(shape.projector.removeprefix("mlp").removesuffix("x_gelu"))
        for i in range(depth):
            yield from _affine(f"{2 * i}", (out, wide if i == 0 else out))


def _affine(name: str, weight: tuple[int, ...]) -> Iterator[Sized]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def draw(name: str, dims: tuple[int, ...], recipe: Recipe) -> Tensor:
    """A tensor that depends on the seed and its name alone, of a size that keeps a deep model's activations sane."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{recipe.seed} {name}".encode()))
    count = math.prod(dims)
    values = torch.randn(min(count, BLOCK), generator=generator).to(recipe.dtype)
    if count > BLOCK:
        values = values.repeat(-(-count // BLOCK))[:count]
    values = values.reshape(dims)
    if len(dims) > 1:
        return values * math.prod(dims[1:]) ** -0.5
    return values * 0.1 + 1 if "norm" in name and name.endswith("weight") else values * 0.1


def drawn(tensors: Iterator[Sized], recipe: Recipe, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one; a decoder's linears come as qweight, qzeros and scales where the recipe says so."""
    for name, dims in tensors:
        tensor = draw(prefix + name, dims, recipe)
        if recipe.group and _is_quantized(name):
            spec = QuantSpec(group_size=recipe.group)
            packed = from_logical(quantize(tensor.half(), spec), spec)
            yield from ((f"{prefix}{name.removesuffix('weight')}{key}", part) for key, part in packed._asdict().items())
        else:
            yield prefix + name, tensor


def text_config(shape: Shape, recipe: Recipe) -> Json:
    """A decoder's config.json."""
    return {
        "architectures": [ARCHITECTURES[shape.text]],
        "model_type": shape.text,
        "dtype": str(recipe.dtype).removeprefix("torch."),
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 256,
        **({"sliding_window": None} if shape.text != "llama" else {}),
    }


def vision_config(shape: Shape) -> Json:
    """A tower's config.json."""
    return {
        "architectures": ["CLIPVisionModel" if shape.vision == "clip" else "SiglipVisionModel"],
        "model_type": f"{shape.vision}_vision_model",
        "hidden_size": shape.vision_hidden_size,
        "intermediate_size": shape.vision_intermediate_size,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "hidden_act": "quick_gelu" if shape.vision == "clip" else "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-5 if shape.vision == "clip" else 1e-6,
        **({"vision_use_head": False} if shape.vision == "siglip" else {}),
    }


def preprocessor_config(shape: Shape) -> Json:
    """The image processor of the tower."""
    square = {"height": shape.image_size, "width": shape.image_size}
    shared: Json = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    if shape.vision == "siglip":
        half = [0.5, 0.5, 0.5]
        own: Json = {"image_processor_type": "SiglipImageProcessor", "size": square, "resample": 3}
        return {**shared, **own, "image_mean": half, "image_std": half}
    return {
        **shared,
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": shape.image_size},
        "crop_size": square,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def tokenizer(image: bool) -> PreTrainedTokenizerFast:
    """Bytes as tokens 0 to 255, then the special tokens, with a ChatML template. `image`: `<image>` is one of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = [BOS, TURN, END, *([IMAGE] if image else [])]
    inner.add_special_tokens([AddedToken(text, special=True) for text in special])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token=END, pad_token=BOS)
    made.chat_template = TEMPLATE
    return made


def write_json(path: Path, value: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _quantization(recipe: Recipe, *spared: str) -> Json:
    if not recipe.group:
        return {}
    config = {"quant_method": "awq", "bits": 4, "group_size": recipe.group, "zero_point": True, "version": "gemm"}
    return {"quantization_config": {**config, "modules_to_not_convert": list(spared) or None}}


def _write_words(folder: Path, shape: Shape, image: bool = False) -> None:
    made = tokenizer(image)
    if len(made) > shape.vocab_size:
        raise UsageError(f"the tokenizer has {len(made)} tokens, vocab_size is {shape.vocab_size}", "give a larger one")
    made.save_pretrained(folder)
    ids = {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})


def _write_tower(folder: Path, shape: Shape, recipe: Recipe) -> None:
    write_json(folder / "config.json", vision_config(shape))
    write_json(folder / "preprocessor_config.json", preprocessor_config(shape))
    write_safetensors(drawn(tower_tensors(shape), recipe, "vision_model."), folder, recipe.shard_size)


def _write_text(folder: Path, shape: Shape, recipe: Recipe) -> None:
    write_json(folder / "config.json", {**text_config(shape, recipe), **_quantization(recipe)})
    write_safetensors(drawn(decoder_tensors(shape), recipe), folder, recipe.shard_size)
    _write_words(folder, shape)


def _write_vila(folder: Path, shape: Shape, recipe: Recipe) -> None:
    projector = {"model_type": "v2l_projector", "mm_projector_type": shape.projector}
    root = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "model_dtype": str(recipe.dtype),
        "image_aspect_ratio": "resize",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch" if shape.vision == "clip" else "cls_patch",
        "llm_cfg": {**text_config(shape, recipe), **_quantization(recipe)},
        "vision_tower_cfg": vision_config(shape),
        "mm_projector_cfg": projector,
    }
    write_json(folder / "config.json", root)
    _write_text(folder / "llm", shape, recipe)
    _write_tower(folder / "vision_tower", shape, recipe)
    write_json(folder / "mm_projector" / "config.json", projector)
    write_safetensors(drawn(projector_tensors(shape), recipe, "layers."), folder / "mm_projector", recipe.shard_size)


def _write_llava(folder: Path, shape: Shape, recipe: Recipe) -> None:
    root = {
        **text_config(shape, recipe),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": LLAVA_TYPES[shape.text],
        "mm_vision_tower": "vision_tower",
        "mm_projector_type": shape.projector,
        "mm_hidden_size": shape.vision_hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch" if shape.vision == "clip" else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        **_quantization(recipe, "vision_tower", "mm_projector"),
    }
    write_json(folder / "config.json", root)
    _write_tower(folder / "vision_tower", shape, recipe)
    projector = drawn(projector_tensors(shape), recipe, "model.mm_projector.")
    tensors = (tensor for part in (drawn(decoder_tensors(shape), recipe), projector) for tensor in part)
    write_safetensors(tensors, folder, recipe.shard_size)
    _write_words(folder, shape)


def _write_llava_hf(folder: Path, shape: Shape, recipe: Recipe) -> None:
    _write_hf(folder, shape, recipe, "llava")


def _write_llava_next(folder: Path, shape: Shape, recipe: Recipe) -> None:
    _write_hf(folder, shape, recipe, "llava_next")


def _write_hf(folder: Path, shape: Shape, recipe: Recipe, kind: str) -> None:
    """A folder of transformers' LLaVA, or of its LLaVA-NeXT."""
    if shape.projector != "mlp2x_gelu":
        raise UsageError(f"the projector is {shape.projector}", "the layout llava_hf knows mlp2x_gelu alone")
    strategy, side = "default" if shape.vision == "clip" else "full", shape.image_size
    name = {"llava": "Llava", "llava_next": "LlavaNext"}[kind]
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    tiles: Json = {"image_grid_pinpoints": pinpoints} if kind == "llava_next" else {}
    root = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "dtype": str(recipe.dtype).removeprefix("torch."),
        "text_config": text_config(shape, recipe),
        "vision_config": vision_config(shape),
        "image_token_index": 259,
        "image_seq_length": (shape.image_size // shape.patch_size) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": shape.tied,
        **tiles,
        **_quantization(recipe, "vision_tower", "multi_modal_projector"),
    }
    write_json(folder / "config.json", root)
    pictures = preprocessor_config(shape)
    if tiles:
        pictures |= {**tiles, "image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
        pictures |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    write_json(folder / "preprocessor_config.json", pictures)
    extra = {"num_additional_image_tokens": int(shape.vision == "clip"), "image_token": IMAGE}
    processor = {"processor_class": f"{name}Processor", "vision_feature_select_strategy": strategy}
    write_json(folder / "processor_config.json", {**processor, "patch_size": shape.patch_size, **extra})
    numbers = {"0": "linear_1", "2": "linear_2"}
    named = ((f"{numbers[name[0]]}{name[1:]}", dims) for name, dims in projector_tensors(shape))
    parts = (
        drawn(decoder_tensors(shape), recipe, "language_model."),
        drawn(tower_tensors(shape), recipe, "vision_tower.vision_model."),
        drawn(named, recipe, "multi_modal_projector."),
        drawn(iter([("image_newline", (shape.hidden_size,))] if tiles else []), recipe),
    )
    write_safetensors((tensor for part in parts for tensor in part), folder, recipe.shard_size)
    _write_words(folder, shape, image=True)


_WRITERS = {
    "vila": _write_vila,
    "llava": _write_llava,
    "llava_hf": _write_llava_hf,
    "llava_next": _write_llava_next,
    "text": _write_text,
}


CHOICES = {
    "text": sorted(ARCHITECTURES),
    "vision": ["clip", "siglip"],
    "projector": ["identity", "linear", "mlp2x_gelu", "mlp3x_gelu", *DOWNSAMPLE],
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("folder", type=Path)
    made.add_argument("--layout", choices=sorted(_WRITERS), default="vila")
    made.add_argument("--shape", choices=sorted(SHAPES), default="tiny", help="sizes to start from (%(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    made.add_argument("--quantize", type=int, choices=GROUPS, help="4-bit decoder, AWQ GEMM: the size of the groups")
    for field in fields(Shape):
        kind, action = type(getattr(Shape(), field.name)), dict[str, Any](action="store_true")
        if kind is not bool:
            action = {"type": positive if kind is int else kind, "choices": CHOICES.get(field.name)}
        made.add_argument(f"--{field.name.replace('_', '-')}", default=None, **action)
    return made


def positive(text: str) -> int:
    """A count; argparse makes a sentence of the ValueError."""
    if (count := int(text)) < 1:
        raise ValueError
    return count


def main(argv: list[str] | None = None) -> int:
    flags = vars(parser().parse_args(argv))
    changes = {name: flags.pop(name) for name in asdict(Shape())}
    try:
        folder = make_tiny_model(**flags, **{name: value for name, value in changes.items() if value is not None})
    except TinychatError as error:
        print(clean_line(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    print(clean_line(f"wrote {folder}: random weights, {size / 2**20:.1f} MiB"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
