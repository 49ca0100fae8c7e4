"""A Request becomes a Prompt: token ids with image slots. Pixels are decoded apart, for the pictures that need it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from tinychat.config import VilaConfig, read_json
from tinychat.core import Image, Message, Part, Request, Text
from tinychat.errors import FormatError, ModelError, UsageError
from tinychat.inputs import images as pictures
from tinychat.inputs.marks import ANSWER, ANSWER_ID, IMAGE, IMAGE_ID, FastTokenizer, MarkedTokenizer
from tinychat.inputs.templates import Template, Turn, choose
from tinychat.tiling import Size, Tiles, Tiling


@dataclass(frozen=True, slots=True)
class Slot:
    """A half-open range of token positions that picture number `image` fills."""

    start: int
    end: int
    image: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with placeholders already expanded. `digests`, `sizes` (height, width) and `images` go by picture."""

    ids: tuple[int, ...]
    slots: tuple[Slot, ...] = ()
    digests: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    images: tuple[Image, ...] = ()

    @property
    def image_tokens(self) -> int:
        return sum(slot.end - slot.start for slot in self.slots)

    def keys(self) -> tuple[int | tuple[str, int], ...]:
        """One hashable a token: its id, or (digest, offset) inside a slot. Equal prefixes have equal KV."""
        keys: list[int | tuple[str, int]] = list(self.ids)
        for slot in self.slots:
            name = self.digests[slot.image]
            keys[slot.start : slot.end] = [(name, offset) for offset in range(slot.end - slot.start)]
        return tuple(keys)


class Processor:
    """Tokenizer, chat template and image processor of one model, and when its answers end.

    Raises ModelError where tokenizer or image processor are those of another model.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        image_processor: Any | None,
        config: VilaConfig,
        generation: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.generation: dict[str, Any] = dict(generation or {})
        self.marked = MarkedTokenizer(tokenizer, config.image_token)
        _check_vocabulary(tokenizer, config)
        named = (config.llm_cfg or {}).get("chat_template")
        default = "plain" if config.layout == "text" else "vicuna_v1"
        self.template: Template = choose(self.marked, template, named if isinstance(named, str) else None, default)
        self.tokens_per_image, self.tiling = config.tokens_per_image, config.tiling
        placeholder = _first_int(config.image_token_id, self.marked.image_token_id, 0)
        self.placeholder_id = placeholder if placeholder < config.text.vocab_size else 0
        self.image_suffix_ids: list[int] = self.marked.encode(config.image_suffix) if config.image_suffix else []
        self.stop_ids, self.stop_strings = self._find_stops()
        self._mode = _mode(image_processor, config)

    @classmethod
    def from_folder(cls, folder: Path, config: VilaConfig, template: str | None = None) -> Processor:
        """From a model folder of any layout; nothing is fetched.

        Raises ModelError where there is no tokenizer, FormatError where it is damaged.
        """
        parts = (folder / "llm", folder)
        generation = next((part / "generation_config.json" for part in parts if _has(part, "generation_config")), None)
        return cls(
            _read_tokenizer(folder, config),
            _read_image_processor(folder, config),
            config,
            read_json(generation) if generation else None,
            template,
        )

    def __call__(self, request: Request) -> Prompt:
        """Ids, slots and digests; of the pictures only bytes and header are read.

        Raises UsageError (pictures for a text-only model, roles out of order) and MediaError (unreadable, too large).
        """
        parts = request.parts or tuple(part for message in request.messages for part in message.parts)
        images = [part for part in parts if isinstance(part, Image)]
        self._check_images(len(images))
        loaded = tuple(pictures.load_image(image) for image in images)
        sizes = tuple(pictures.image_size(image) for image in loaded)
        marked, answers = self._render(request)
        encoded = self._with_bos(self.marked.encode(marked), bool(request.messages))
        ids, slots = self._expand(encoded, answers, [self.image_tokens(size) for size in sizes])
        return Prompt(ids, slots, tuple(f"{image.digest}:{self._mode}" for image in loaded), sizes, loaded)

    def image_tokens(self, size: Size) -> int:
        """Tokens of a picture of this height and width; tokens_per_image is the most that one takes."""
        return self.tokens_per_image if self.tiling is None else self.tiling.tokens(size)

    def pixels(self, prompt: Prompt, images: Sequence[int]) -> Tensor | Tiles:
        """What the model's encode_images takes for the prompt's pictures of these numbers, decoded now.

        [len(images), 3, H, W] float32, or Tiles where the model cuts them. Raises MediaError.
        """
        if self.tiling is None:
            return torch.stack([self._pixels(prompt.images[i]) for i in images])
        tiles = [pictures.to_tiles(pictures.read_image(prompt.images[i]), self.image_processor) for i in images]
        return Tiles(tuple(tiles), tuple(prompt.sizes[i] for i in images))

    def _pixels(self, image: Image) -> Tensor:
        picture = pictures.read_image(image)
        return pictures.to_pixels(picture, self.image_processor, self.config.image_aspect_ratio)

    def _check_images(self, count: int) -> None:
        if count and (self.image_processor is None or not self.tokens_per_image):
            some = "an image" if count == 1 else f"{count} images"
            raise UsageError(f"the model reads text only and was given {some}", "take a vision model, or leave it out")

    def _render(self, request: Request) -> tuple[str, list[tuple[int, ...]]]:
        """The marked string, and the token ids for each ANSWER in it."""
        if request.parts:
            return self._marked_text(request.parts, ""), []
        messages = request.messages
        if messages[-1].role == "assistant":
            raise UsageError("the last message is the assistant's own", "end with a message of the user")
        spliced = [i for i, m in enumerate(messages) if m.role == "assistant" and m.token_ids is not None]
        while True:
            text, broken = self._splice(messages, spliced)
            if not broken:
                return text, [messages[i].token_ids or () for i in spliced]
            spliced = [i for i in spliced if i not in broken]

    def _splice(self, messages: Sequence[Message], spliced: Sequence[int]) -> tuple[str, set[int]]:
        """The conversation with an ANSWER for each of `spliced`, and those whose place the template changes.

        The text before an answer must be what the answer was generated after, but for whitespace that the template
        puts in between: that is dropped.
        """
        turns = [self._turn(message, i in spliced) for i, message in enumerate(messages)]
        whole = self.template.render(turns, True).split(ANSWER)
        if len(whole) != len(spliced) + 1:
            return "", set(spliced)
        broken: set[int] = set()
        for k, i in enumerate(spliced):
            asked = self.template.render(turns[:i], True).split(ANSWER)
            if [text.rstrip() for text in asked] != [text.rstrip() for text in whole[: k + 1]]:
                broken.add(i)
            whole[k] = asked[-1]
        return ANSWER.join(whole), broken

    def _turn(self, message: Message, splice: bool) -> Turn:
        if splice:
            return Turn(message.role, ANSWER)
        after_image = "" if self.template.places_images or self.config.image_suffix else "\n"
        return Turn(message.role, self._marked_text(message.parts, after_image))

    def _marked_text(self, parts: Sequence[Part], after_image: str) -> str:
        """Text quoted, pictures as marks, each followed by `after_image` unless it is the last part."""
        runs = list(_runs(parts))
        pieces = [IMAGE + after_image if isinstance(run, Image) else self.marked.quote(run) for run in runs]
        if runs and isinstance(runs[-1], Image):
            pieces[-1] = IMAGE
        return "".join(pieces)

    def _with_bos(self, ids: list[int], chat: bool) -> list[int]:
        """BOS once: where the tokenizer adds one or the template begins with one, and the text does not have it."""
        bos = self.tokenizer.bos_token_id
        if bos is None or ids[:1] == [bos]:
            return ids
        adds = self.tokenizer("", verbose=False)["input_ids"][:1] == [bos]
        return [bos, *ids] if adds or (chat and self.template.bos) else ids

    def _expand(
        self, marked: Iterable[int], answers: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[Slot, ...]]:
        ids: list[int] = []
        slots: list[Slot] = []
        remaining = iter(answers)
        for i in marked:
            if i == ANSWER_ID:
                ids += next(remaining)
            elif i == IMAGE_ID:
                length = lengths[len(slots)]
                slots.append(Slot(len(ids), len(ids) + length, len(slots)))
                ids += [self.placeholder_id] * length + self.image_suffix_ids
            else:
                ids.append(i)
        return tuple(ids), tuple(slots)

    def _find_stops(self) -> tuple[frozenset[int], tuple[str, ...]]:
        """Ids from generation_config, tokenizer and template; the template's ends that are not one token, as text."""
        added = self.tokenizer.get_added_vocab()
        eos = self.generation.get("eos_token_id")
        ids = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list | tuple) else [eos])}
        ids |= {added[text] for text in self.template.stop if text in added}
        strings = tuple(text for text in self.template.stop if text not in added)
        return frozenset(i for i in ids if isinstance(i, int)), strings


def _runs(parts: Iterable[Part]) -> Iterator[str | Image]:
    """Neighbouring texts as one: a special token's string may lie across two."""
    for is_text, group in groupby(parts, lambda part: isinstance(part, Text)):
        if is_text:
            yield "".join(part.text for part in group if isinstance(part, Text))
        else:
            yield from (part for part in group if isinstance(part, Image))


def _first_int(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _check_vocabulary(tokenizer: FastTokenizer, config: VilaConfig) -> None:
    """Every token that a prompt can hold has a row in the embedding; padding and pictures' places have none to need."""
    unused = {tokenizer.pad_token, config.image_token}
    largest = max((i for token, i in tokenizer.get_vocab().items() if token not in unused), default=0)
    if largest >= config.text.vocab_size:
        ids = f"has ids up to {largest:,}, the model's vocabulary has {config.text.vocab_size:,} tokens"
        raise ModelError(f"the tokenizer {ids}", "copy the tokenizer files of this very model, or correct vocab_size")


def _mode(image_processor: Any | None, config: VilaConfig) -> str:
    """How pixels are made, for the keys of caches. Raises ModelError where the tower expects another size."""
    if image_processor is None:
        return ""
    height, width = pictures.target_size(image_processor)
    vision = config.vision
    if vision is not None and (height, width) != (vision.image_size, vision.image_size):
        sizes = f"makes {height} x {width} pixels, the vision tower takes {vision.image_size} x {vision.image_size}"
        raise ModelError(f"the image processor {sizes}", "correct preprocessor_config.json or config.json")
    if (tiling := config.tiling) is not None:
        _check_resolutions(image_processor, tiling)
    return f"{config.image_aspect_ratio or 'plain'}{height}x{width}"


def _check_resolutions(image_processor: Any, tiling: Tiling) -> None:
    """Raises ModelError where pictures would be cut otherwise than the model puts them together."""
    theirs = [tuple(resolution) for resolution in image_processor.image_grid_pinpoints]
    if theirs != list(tiling.resolutions):
        message = f"image_grid_pinpoints are {theirs} for the image processor, {list(tiling.resolutions)} for the model"
        raise ModelError(message, "correct preprocessor_config.json or config.json")


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def _has(folder: Path, *stems: str) -> bool:
    return any((folder / f"{stem}.json").is_file() for stem in stems)


def _read_tokenizer(folder: Path, config: VilaConfig) -> FastTokenizer:
    parts = [part for part in (folder / "llm", folder) if part.is_dir()]
    home = next((part for part in parts if any((part / name).is_file() for name in _TOKENIZER_FILES)), None)
    if home is None:
        found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
        looked = f"{' or '.join(_TOKENIZER_FILES)} was looked for in {folder} and {folder / 'llm'}"
        raise ModelError(f"{looked}, found {', '.join(found) or 'nothing'}", "copy the tokenizer files there")
    try:
        tokenizer = _load_tokenizer(home, config)
    except Exception as error:  # the Rust reader raises nothing narrower for a damaged file
        for name in _TOKENIZER_JSON:
            if (home / name).is_file():
                read_json(home / name)
        reason = f"{type(error).__name__}: {error}"
        raise FormatError(f"the tokenizer in {home} cannot be read ({reason})", "copy its files again") from error
    if not tokenizer.chat_template and _has(folder, "chat_template"):
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    return tokenizer


def _load_tokenizer(home: Path, config: VilaConfig) -> Any:
    decoder = AutoConfig.for_model((config.llm_cfg or {})["model_type"])  # else a foreign config.json is asked
    try:
        return AutoTokenizer.from_pretrained(str(home), config=decoder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        if not (home / "tokenizer.json").is_file():
            raise
        return PreTrainedTokenizerFast.from_pretrained(str(home), local_files_only=True)


def _read_image_processor(folder: Path, config: VilaConfig) -> Any | None:
    vision = config.vision
    if vision is None:
        return None
    for path in (folder / "vision_tower" / "preprocessor_config.json", folder / "preprocessor_config.json"):
        if path.is_file():
            return pictures.image_processor_for(vision, read_json(path), config.tiling)
    if _has(folder, "processor_config"):  # transformers 5 keeps it inside the processor's file
        stored = read_json(folder / "processor_config.json").get("image_processor")
        return pictures.image_processor_for(vision, stored, config.tiling)
    return pictures.image_processor_for(vision, tiling=config.tiling)
