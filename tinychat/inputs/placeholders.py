"""What stands for a picture in the text of other people's models: image token strings, their counts and their order.

Strings and counts are those of transformers' processors. Text that people typed is to be quoted before it is joined
with them (tinychat.inputs.marks), so that an `<image>` in it stays seven characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinychat.config import VilaConfig
from tinychat.errors import ModelError, UsageError
from tinychat.tiling import Size, Tiling, margins

IMAGE_TOKEN, FAKE_TOKEN = "<image>", "<fake_token_around_image>"
SPLITS = 5  # Idefics2's four quarters of a picture and the whole one
_WORD_AFTER_FAKE = re.compile(rf"{FAKE_TOKEN}(?=[^\s<])")


@dataclass(frozen=True, slots=True)
class Placeholders:
    """How models of one type take pictures: `replacement(processor, image_inputs, config, image_id)` is one's string.

    `fixup` mends the whole text. Where the tokenizer must not add_special_tokens, `arrange(text, bos)` does.
    """

    replacement: Callable[[Any, Mapping[str, Any], Any, int], str]
    fixup: Callable[[str], str] = str
    arrange: Callable[[str, str], str] = lambda text, bos: text
    add_special_tokens: bool = True


def placeholders_for(config_or_type: Any) -> Placeholders:
    """The rules of a model, by its config or the model_type. Raises ModelError for a type that is not known."""
    kind = str(config_or_type if isinstance(config_or_type, str) else config_or_type.model_type)
    if kind not in TYPES:
        raise ModelError(f"how a {kind!r} model takes pictures is not known", f"known are {', '.join(TYPES)}")
    return TYPES[kind]


def image_text_replacement(processor: Any, image_inputs: Mapping[str, Any], config: Any, image_id: int) -> str:
    """What stands in the text for picture number `image_id`, by what the image processor made of all pictures.

    `image_inputs` has pixel_values (LLaVA) or image_sizes (LLaVA-NeXT). Raises ModelError for an unknown type.
    """
    return placeholders_for(config).replacement(processor, image_inputs, config, image_id)


def image_text_replacement_fixup(config_or_type: Any, text: str) -> str:
    """The whole text after its pictures were put in: Idefics2's neighbours share the token between them."""
    return placeholders_for(config_or_type).fixup(text)


def arrange_text(config_or_type: Any, text: str, bos: str = "") -> str:
    """The whole text as the tokenizer takes it; PaliGemma's BOS comes after the pictures, and a newline ends it."""
    rules = placeholders_for(config_or_type)
    return rules.arrange(rules.fixup(text), bos)


def get_number_of_features(height: int, width: int, config: Any, *, swap_grid: bool = False) -> int:
    """Tokens of a LLaVA-NeXT picture. `swap_grid` takes rows of tiles for columns, as LoRAX does: another count."""
    tiling = _tiling(config)
    rows, columns = reversed(tiling.grid((height, width))) if swap_grid else tiling.grid((height, width))
    unpadded, newlines = get_unpadded_features(height, width, tiling.patches, rows, columns)
    return tiling.patches**2 + _beside_patches(config) + unpadded + newlines


def get_unpadded_features(
    height: int, width: int, npatches: int, num_patch_height: int, num_patch_width: int
) -> tuple[int, int]:
    """Features of the tiles without padding, and the newlines after their rows.

    `npatches` features along a tile's side, num_patch_height rows of num_patch_width tiles.
    """
    grid = (npatches * num_patch_height, npatches * num_patch_width)
    vertical, horizontal = margins((height, width), grid)
    rows, columns = grid[0] - 2 * vertical, grid[1] - 2 * horizontal
    return rows * columns, rows


def _tiling(config: Any) -> Tiling:
    """Raises UsageError where the model does not cut its pictures into tiles."""
    if isinstance(config, VilaConfig):
        if config.tiling is None:
            raise UsageError("the model shows its pictures whole", "take config.tokens_per_image")
        return config.tiling
    vision = config.vision_config
    resolutions = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    return Tiling(resolutions, vision.image_size, vision.image_size // vision.patch_size)


def _beside_patches(config: Any) -> int:
    """Features that the whole picture has besides its patches: a class token that is kept is one."""
    if isinstance(config, VilaConfig):
        return 0
    has_class_token = "siglip" not in config.vision_config.model_type
    return has_class_token - (config.vision_feature_select_strategy == "default")


def _token(processor: Any) -> str:
    return str(getattr(processor, "image_token", None) or IMAGE_TOKEN)


def _size(image_inputs: Mapping[str, Any], image_id: int) -> Size:
    if "image_sizes" not in image_inputs:
        raise UsageError("the image inputs have no image_sizes", "give what the model's own image processor makes")
    height, width = image_inputs["image_sizes"][image_id]
    return int(height), int(width)


def _llava(processor: Any, image_inputs: Mapping[str, Any], config: Any, image_id: int) -> str:
    vision = config.vision_config
    height = width = vision.image_size
    if "pixel_values" in image_inputs:
        height, width = image_inputs["pixel_values"][image_id].shape[-2:]
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    return _token(processor) * (patches + _beside_patches(config))


def _llava_next(processor: Any, image_inputs: Mapping[str, Any], config: Any, image_id: int) -> str:
    return _token(processor) * get_number_of_features(*_size(image_inputs, image_id), config)


def _idefics2(processor: Any, image_inputs: Mapping[str, Any], config: Any, image_id: int) -> str:
    count = getattr(processor, "image_seq_len", None) or config.perceiver_config.resampler_n_latents
    splits = SPLITS if processor.image_processor.do_image_splitting else 1
    return f"{FAKE_TOKEN}{IMAGE_TOKEN * count}{FAKE_TOKEN}" * splits


def _shared_fakes(text: str) -> str:
    """One token between neighbours, and a space before a word that follows."""
    return _WORD_AFTER_FAKE.sub(f"{FAKE_TOKEN} ", text.replace(FAKE_TOKEN * 2, FAKE_TOKEN))


def _paligemma(processor: Any, image_inputs: Mapping[str, Any], config: Any, image_id: int) -> str:
    count = getattr(processor, "image_seq_length", None) or config.text_config.num_image_tokens
    return _token(processor) * count


def _pictures_first(text: str, bos: str) -> str:
    before, found, after = text.rpartition(IMAGE_TOKEN)
    return f"{before}{found}{bos}{after}\n"


def _vila(processor: Any, image_inputs: Mapping[str, Any], config: Any, image_id: int) -> str:
    count = config.tokens_per_image if config.tiling is None else config.tiling.tokens(_size(image_inputs, image_id))
    return config.image_token * count + config.image_suffix


TYPES: Mapping[str, Placeholders] = {
    "idefics2": Placeholders(_idefics2, fixup=_shared_fakes),
    "llava": Placeholders(_llava),
    "llava_next": Placeholders(_llava_next),
    "paligemma": Placeholders(_paligemma, arrange=_pictures_first, add_special_tokens=False),
    VilaConfig.model_type: Placeholders(_vila),
}
