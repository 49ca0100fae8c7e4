"""Pictures: from bytes or a path to RGB, and to the pixels that a vision tower wants. Nothing is decoded unchecked."""

from __future__ import annotations

import difflib
import hashlib
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image as pillow
from torch import Tensor

from tinychat.config import VisionConfig
from tinychat.core import Image
from tinychat.errors import MediaError, ModelError
from tinychat.tiling import Tiling

MAX_BYTES = 100_000_000
MAX_PIXELS = 40_000_000
SMALLER = "scale the picture down"  # what to do about one of too many pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

_ORIENTATION = 0x0112  # Exif tag
_UPRIGHT = {  # its value -> what brings the picture upright (Exif 2.3, 4.6.4)
    2: pillow.Transpose.FLIP_LEFT_RIGHT,
    3: pillow.Transpose.ROTATE_180,
    4: pillow.Transpose.FLIP_TOP_BOTTOM,
    5: pillow.Transpose.TRANSPOSE,
    6: pillow.Transpose.ROTATE_270,
    7: pillow.Transpose.TRANSVERSE,
    8: pillow.Transpose.ROTATE_90,
}
_PROCESSOR = re.compile(r"(CLIP|Bit|Siglip|LlavaNext)(ImageProcessor|FeatureExtractor)")
_FAMILIES = {"Bit": "clip"}  # its steps and defaults are CLIP's
TILES = "llavanext"
_CLASSES = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", TILES: "LlavaNextImageProcessor"}
_DAMAGED = (OSError, SyntaxError, EOFError, ValueError, TypeError, LookupError, struct.error, zlib.error)
_TEXT = "a text file"
_KNOWN_OTHERS = (  # (offset, signature, what it is)
    (4, b"ftyphe", "a HEIC photo"),
    (4, b"ftypmif1", "a HEIC photo"),
    (4, b"ftyp", "a video"),
    (0, b"%PDF", "a PDF"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"GGUF", "a GGUF model"),
)


def load_image(image: Image) -> Image:
    """The same picture held as bytes with its digest, so that its file may change or go. Raises MediaError."""
    if image.data is not None and image.digest:
        return image
    data = _read_bytes(image)
    return Image(data=data, path=image.path, digest=hashlib.sha256(data).hexdigest())


def digest(image: Image) -> str:
    """sha256 of the encoded bytes, as hexadecimal digits. Raises MediaError where they cannot be read."""
    return image.digest or hashlib.sha256(_read_bytes(image)).hexdigest()


def image_size(image: Image) -> tuple[int, int]:
    """(height, width) as it will be seen, from the header alone. Raises MediaError."""
    name = _name(image)
    with _open(_read_bytes(image), name) as picture:
        width, height = picture.size
        turned = _orientation(picture) >= 5
    return (width, height) if turned else (height, width)


def read_image(image: Image) -> pillow.Image:
    """The first frame as RGB, upright, on white where it is transparent. Raises MediaError."""
    name = _name(image)
    with _open(_read_bytes(image), name) as picture:
        try:
            with _no_bomb(name):
                picture.load()
            colours, turn = to_rgb(picture), _UPRIGHT.get(_orientation(picture))
        except _DAMAGED as error:
            raise MediaError(f"{name} is damaged ({error})", "download or save the picture again") from error
    return colours if turn is None else colours.transpose(turn)


def to_rgb(picture: pillow.Image) -> pillow.Image:
    """Any mode to RGB: transparency goes on white, more than 8 bits are scaled, not clipped."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return pillow.fromarray(_to_8_bit(picture), "L").convert("RGB")
    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        white = pillow.new("RGBA", colours.size, (255, 255, 255, 255))
        return pillow.alpha_composite(white, colours).convert("RGB")
    return picture.convert("RGB")


def _to_8_bit(picture: pillow.Image) -> np.ndarray[Any, Any]:
    """[H, W] uint8 from 16- and 32-bit greys. The range is that of the type, or of the values where that is unknown."""
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    top = values.max(initial=0)
    if picture.mode != "F":
        white = 65535.0 if picture.mode != "I" or top <= 65535 else top
    else:
        white = next((limit for limit in (1.0, 255.0, 65535.0) if top <= limit), top)
    return np.rint(values.clip(0, white) * (255.0 / white)).astype(np.uint8)


def _name(image: Image) -> str:
    return str(image.path) if image.path is not None else "the image"


def _read_bytes(image: Image) -> bytes:
    if image.data is None:
        data = _read_file(Path(image.path or ""))
        if image.digest and hashlib.sha256(data).hexdigest() != image.digest:
            raise MediaError(
                f"{_name(image)} has changed since it was shown", "show it again, or bring the old one back"
            )
    else:
        _check_bytes(len(image.data), _name(image))
        data = image.data
    if not data:
        raise MediaError(f"{_name(image)} is empty (0 bytes)", "give a picture file")
    return data


def _read_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise MediaError(f"{path} is a folder", "give one picture file in it")
        if not path.exists():
            raise MediaError(f"{path} does not exist", _near_names(path))
        if not path.is_file():
            raise MediaError(f"{path} is not a regular file", "give a picture file")
        _check_bytes(path.stat().st_size, str(path))
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read ({error})", "check its name and its permissions") from error
    _check_bytes(len(data), str(path))
    return data


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_BYTES:
        much = f"{size / 1e6:.1f} MB, the limit is {MAX_BYTES / 1e6:.0f} MB"
        raise MediaError(f"{name} has {much}", "save the picture smaller or as JPEG")


def _near_names(path: Path) -> str:
    """What to do about a missing file: the names beside it that are nearest to what was written."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; check the path"
    names = {other.name.lower(): other.name for other in path.parent.iterdir()}
    near = difflib.get_close_matches(path.name.lower(), names, 3, 0.6)
    return f"did you mean {' or '.join(names[name] for name in near)}?" if near else "check the path"


def _open(data: bytes, name: str) -> pillow.Image:
    """The header only. Formats go by content, and the size is checked before anything is decoded."""
    pillow.init()
    damage = ""
    for kind in FORMATS:
        factory, accepts = pillow.OPEN.get(kind, (None, None))
        if factory is None or accepts is None or accepts(data[:16]) is not True:
            continue
        try:
            with _no_bomb(name):
                picture = factory(BytesIO(data), "")
        except _DAMAGED as error:
            damage = f"begins like {kind} but is damaged ({error})"
            continue
        _check_pixels(picture, name)
        return picture
    what = _looks_like(data)
    if damage and what != _TEXT:
        raise MediaError(f"{name} {damage}", "download or save the picture again")
    raise MediaError(f"{name} is {what}, not a picture", f"supported are {', '.join(FORMATS)}")


@contextmanager
def _no_bomb(name: str) -> Iterator[None]:
    """Some decoders look at sizes inside the file with a warning of Pillow's: an error here, and never printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        try:
            yield
        except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
            raise MediaError(f"{name} is too large to decode ({error})", SMALLER) from error


def _check_pixels(picture: pillow.Image, name: str) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise MediaError(f"{name} has {width} x {height} pixels", "give a picture that has some")
    if width * height > MAX_PIXELS:
        much = f"{width} x {height} = {width * height / 1e6:.1f} megapixels"
        raise MediaError(f"{name} has {much}, the limit is {MAX_PIXELS / 1e6:.0f}", SMALLER)


def _looks_like(data: bytes) -> str:
    for offset, signature, what in _KNOWN_OTHERS:
        if data[offset : offset + len(signature)] == signature:
            return what
    try:
        text = data[:512].decode("utf-8")
    except UnicodeDecodeError as error:
        text = data[: error.start].decode("utf-8") if error.start > 500 else "\0"
    return "of an unknown format" if "\0" in text else _TEXT


def _orientation(picture: pillow.Image) -> int:
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1  # Pillow would decode the whole picture to look behind it
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except _DAMAGED:
        return 1


def image_processor_for(
    vision: VisionConfig, stored: dict[str, Any] | None = None, tiling: Tiling | None = None
) -> Any:
    """transformers' PIL processor: from a preprocessor_config.json, or the family's usual one for `vision`.

    With `tiling`, one that makes tiles. Raises ModelError where the stored one is of a type that makes other pixels.
    """
    kind = str((stored or {}).get("image_processor_type") or (stored or {}).get("feature_extractor_type") or "")
    usually = vision.family if tiling is None else TILES
    family = _family_of(kind, tiling is not None) if kind else usually
    side = vision.image_size
    square = {"height": side, "width": side}
    clip = {"size": {"shortest_edge": side}, "crop_size": square}
    usual: dict[str, dict[str, Any]] = {
        "clip": clip,
        "siglip": {"size": square},
        TILES: {**clip, "image_grid_pinpoints": list(map(list, tiling.resolutions if tiling else ()))},
    }
    return _processor_class(family).from_dict(dict(stored) if stored else usual[family])


def _family_of(kind: str, tiled: bool) -> str:
    match = _PROCESSOR.match(kind)
    family = _FAMILIES.get(match[1], match[1].lower()) if match else ""
    if not family or (family == TILES) != tiled:
        wanted = "LLaVA-NeXT's" if tiled else "a CLIP or a SigLIP one"
        raise ModelError(
            f"the image processor {kind!r} is not supported", f"take a model whose image processor is {wanted}"
        )
    return family


def _processor_class(family: str) -> Any:
    """Its name differs: `...Pil` since the plain name asks for torchvision, the plain name before that."""
    stem = _CLASSES[family]
    return getattr(transformers, f"{stem}Pil", None) or getattr(transformers, stem)


def target_size(processor: Any) -> tuple[int, int]:
    """(height, width) of what the processor makes. Raises ModelError where its config does not say."""
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", None) else None
    size = size or processor.size
    try:
        return int(size["height"]), int(size["width"])
    except (KeyError, TypeError) as error:
        raise ModelError(f"the image processor has the size {size}", "give it height and width") from error


def to_pixels(picture: pillow.Image, processor: Any, aspect_ratio: str | None = None) -> Tensor:
    """An RGB picture -> [3, H, W] float32, shaped as VILA and LLaVA do. Raises MediaError for an absurd strip.

    `pad`: to a square with the mean colour. `resize`: to H x W whatever its shape. None: as the processor does.
    """
    if aspect_ratio == "pad":
        picture = expand_to_square(picture, tuple(int(x * 255) for x in processor.image_mean))
    elif aspect_ratio == "resize":
        height, width = target_size(processor)
        picture = picture.resize((width, height), pillow.Resampling.BICUBIC)
    _check_strip(picture, int(processor.size.get("shortest_edge") or 0))
    pixels = processor.preprocess(picture, return_tensors="np")["pixel_values"][0]
    return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))


def to_tiles(picture: pillow.Image, processor: Any) -> Tensor:
    """An RGB picture -> [tiles, 3, S, S] float32 as LLaVA-NeXT does, the whole picture first."""
    made = processor.preprocess(picture, return_tensors="np")
    return torch.from_numpy(np.ascontiguousarray(made["pixel_values"][0], dtype=np.float32))


def expand_to_square(picture: pillow.Image, colour: tuple[int, ...]) -> pillow.Image:
    """The picture centred on a square of its longer side (LLaVA's `pad`), scaled where that would be over the cap."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    if side * side > MAX_PIXELS:
        scale = MAX_PIXELS**0.5 / side
        picture = picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
        side = max(picture.size)
    square = pillow.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _check_strip(picture: pillow.Image, shortest_edge: int) -> None:
    """Scaling the shorter side to `shortest_edge` blows the longer one up."""
    pixels = shortest_edge**2 * max(picture.size) / min(picture.size)
    if pixels > MAX_PIXELS:
        much = f"is a strip that would take {pixels / 1e6:.1f} megapixels"
        raise MediaError(f"a picture of {picture.width} x {picture.height} pixels {much}", "crop it")
