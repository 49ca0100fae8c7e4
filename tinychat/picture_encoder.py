"""A CLIP or SigLIP folder as what pictures and texts are compared by: weights, tokenizer and image processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image as pillow
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.configuration_utils import PretrainedConfig

from tinychat.checkpoint import Index, Weights, compare
from tinychat.config import FLOAT_TYPES, VisionConfig, read_json
from tinychat.core import Image
from tinychat.errors import CapacityError, FormatError, ModelError, UsageError
from tinychat.inputs.images import image_processor_for, read_image, target_size, to_pixels
from tinychat.load import SHORT, resolve
from tinychat.packed_cache import key_of

EMBEDDED = Path(__file__).parent / "assets" / "search"
EXAMPLE = "--model openai/clip-vit-base-patch32"
FAMILIES = ("clip", "siglip")
PLAIN = "text"  # the layout whose names are those on disk
UNFIT = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)  # what values of a config lead to
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "image_size")
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
TRIAL = "a cup, \u00e9 \u65e5"  # not all of it is in every vocabulary
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True)
class Source:
    """A model folder that was opened: nothing but headers is read yet."""

    folder: Path
    family: str
    config: PretrainedConfig
    index: Index

    def digest(self, cache: Path) -> str:
        """What names the embeddings that it makes: its weights' content, its config, how pictures are prepared."""
        files = {path for name in self.index.names() for path in self.index.files(name)}
        texts = ("config.json", *PROCESSORS)
        facts = [path.read_text("utf-8") for name in texts if (path := self.folder / name).is_file()]
        return key_of(files, facts, cache)


class PictureEncoder:
    """Pictures and texts to embeddings [P] of length 1 that can be compared."""

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.pads = source.family == "siglip"  # it was trained on texts of one length, padding included
        self.most_tokens = int(source.config.text_config.max_position_embeddings)
        self.words = int(source.config.text_config.vocab_size)
        self.tokenizer = _read_tokenizer(source.folder, self._tell)
        self.image_processor = _read_image_processor(source)
        with _enough_memory("the model does not fit", "take a smaller one, or --device cpu"):
            self.model = _model_class(source.family)("", source.config, Weights(source.index, "", dtype=dtype))
            nn.Module.to(self.model, device).eval()
        source.index.close()

    def pixels(self, image: Image) -> Tensor:
        """[3, H, W] float32; raises MediaError."""
        return to_pixels(read_image(image), self.image_processor)

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P] float32 on the CPU. Raises CapacityError where the device has no memory for it."""
        with _enough_memory(f"{len(pixels)} pictures at once are too many", "give a smaller --batch"):
            features = self.model.get_image_features(pixels.to(self.device, self.dtype))
        return self._normalized(features)

    @torch.inference_mode()
    def embed_text(self, text: str, note: Callable[[str], None]) -> Tensor:
        """[P] float32 on the CPU; what the model cannot read of a long text is left out with a note."""
        whole = self.tokenizer(text, verbose=False)["input_ids"]
        if len(whole) > self.most_tokens:
            note(f"the query has {len(whole)} tokens, the model reads {self.most_tokens}: its end is left out")
        told = self._tell(self.tokenizer, text)
        mask = {} if self.pads else {"attention_mask": told["attention_mask"].to(self.device)}
        return self._normalized(self.model.get_text_features(told["input_ids"].to(self.device), **mask))[0]

    def _tell(self, tokenizer: Any, text: str) -> Any:
        """The ids [1, T] that the model reads, and their mask. Raises ModelError for ids that it does not have."""
        told = tokenizer(
            text, padding="max_length" if self.pads else False, truncation=True, max_length=self.most_tokens,
            return_tensors="pt",
        )  # fmt: skip
        if (largest := int(told["input_ids"].max())) >= self.words:
            message = f"the tokenizer makes the id {largest}, and the model knows {self.words} tokens"
            raise ModelError(message, "take the tokenizer that belongs to the model")
        return told

    def _normalized(self, features: Tensor) -> Tensor:
        """[N, P], on the CPU. Raises ModelError where the dtype does not hold what the model computes."""
        if not features.isfinite().all():
            kind = str(self.dtype).removeprefix("torch.")
            wide = self.dtype == torch.float32
            remedy = "its weights may be damaged: download them again" if wide else "give --dtype fp32"
            raise ModelError(f"the model computes what {kind} cannot hold", remedy)
        return normalize(features.float(), dim=-1).cpu()


def open_source(model: str | None, revision: str | None) -> Source:
    """A model's headers: the embedded one (None), a folder or a hub id. Raises ModelError, with all that is wrong."""
    if model is None and not (EMBEDDED / "config.json").is_file():
        raise UsageError("this installation has no embedded model for searching", f"name one, such as {EXAMPLE}")
    if model is None and revision is not None:
        message = f"--revision is {revision}, and the embedded model has no others"
        raise UsageError(message, "leave it out, or add --model")
    folder = EMBEDDED if model is None else resolve(model, revision)
    raw = read_json(folder / "config.json")
    family = raw.pop("model_type", None)
    if family not in FAMILIES or not isinstance(raw.get("text_config"), dict):
        what = f"is a {family!r} model" if family else "does not say what it is"
        raise ModelError(f"{folder} {what}, and search compares by CLIP or SigLIP", f"give one, such as {EXAMPLE}")
    try:
        config = AutoConfig.for_model(family, **raw)
        _check_sizes(config)
        with torch.device("meta"):
            empty = _model_class(family)("", config)
    except (StrictDataclassError, RuntimeError, *UNFIT) as error:
        message = f"{folder / 'config.json'} is not the config of a {family} model ({error})"
        raise FormatError(message, "download or copy the file again") from error
    source = Source(folder, family, config, Index.of(folder))
    compare(empty, source.index, PLAIN).check()
    return source


def _check_sizes(config: PretrainedConfig) -> None:
    """Raises ValueError for a size of which nothing can be."""
    for part in ("text_config", "vision_config"):
        for name in SIZES:
            if (size := getattr(getattr(config, part), name, 1)) < 1:
                raise ValueError(f"{part} has the {name} {size}")


def dtype_of(asked: str | None, device: torch.device) -> torch.dtype:
    """float32 on a CPU, float16 on a GPU, or what is asked for. Raises UsageError."""
    if asked is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    if (name := SHORT.get(asked, asked)) not in FLOAT_TYPES:
        raise UsageError(f"dtype is {asked!r}", f"give one of {', '.join((*FLOAT_TYPES, *SHORT))}")
    return FLOAT_TYPES[name]


def _model_class(family: str) -> Any:
    from tinychat.models import clip, siglip

    return {"clip": clip.CLIPModel, "siglip": siglip.SiglipModel}[family]


def _read_tokenizer(folder: Path, tell: Callable[[Any, str], Any]) -> Any:
    """The folder's tokenizer, which has been tried. Raises ModelError where there is none, or FormatError."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        message = f"{folder} has no tokenizer ({', '.join(TOKENIZERS)} were looked for)"
        raise ModelError(message, "copy tokenizer.json and tokenizer_config.json into it")
    where = str(folder)
    try:
        try:
            found = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError):
            if not (folder / "tokenizer.json").is_file():
                raise
            found = PreTrainedTokenizerFast.from_pretrained(where, local_files_only=True)
        tell(found, TRIAL)
    except ModelError:
        raise
    except Exception as error:  # the Rust reader raises nothing narrower for a damaged file
        reason = f"{type(error).__name__}: {error}"
        raise FormatError(f"the tokenizer in {folder} cannot be read ({reason})", "copy its files again") from error
    return found


def _read_image_processor(source: Source) -> Any:
    """transformers' processor from its own file, from a whole processor's, or the family's usual one; it was tried.

    Raises ModelError, or FormatError for values that it cannot work with.
    """
    vision = VisionConfig.of(source.config.vision_config)
    path = next((path for name in PROCESSORS if (path := source.folder / name).is_file()), None)
    try:
        stored = read_json(path) if path else None
        processor = image_processor_for(vision, stored.get("image_processor", stored) if stored else None)
        height, width = target_size(processor)
        if (height, width) == (vision.image_size, vision.image_size):
            to_pixels(pillow.new("RGB", (width, height)), processor)
    except UNFIT as error:
        message = f"{path or source.folder} describes no image processor that works ({error})"
        raise FormatError(message, "download or copy the file again") from error
    if (height, width) != (vision.image_size, vision.image_size):
        sizes = f"makes {height} x {width} pixels, the model takes {vision.image_size} x {vision.image_size}"
        raise ModelError(f"the image processor {sizes}", "correct preprocessor_config.json or config.json")
    return processor


@contextmanager
def _enough_memory(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"{what}: {str(error).partition('. ')[0]}", remedy) from error
