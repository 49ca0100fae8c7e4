"""Vision-language models of transformers: their pictures encoded once, their prompts made by their own rules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinychat.core import Image, Request, Text
from tinychat.engine.foreign import ForeignModel, text_config
from tinychat.engine.requests import TokenReader
from tinychat.errors import MediaError, ModelError, UsageError
from tinychat.inputs import images as pictures
from tinychat.inputs.marks import IMAGE, IMAGE_ID, MarkedTokenizer
from tinychat.inputs.placeholders import FAKE_TOKEN, arrange_text, image_text_replacement, placeholders_for
from tinychat.inputs.processor import Prompt, Slot
from tinychat.inputs.templates import Turn, choose


@dataclass(frozen=True, slots=True)
class Pixels:
    """One picture as its model's get_image_features takes it. `between` is the token between the parts of one."""

    inputs: Mapping[str, Tensor]
    between: int | None = None

    def to(self, device: torch.device) -> Pixels:
        return Pixels({name: value.to(device) for name, value in self.inputs.items()}, self.between)


@dataclass(frozen=True, slots=True)
class Kind:
    """What sets the models of one type apart: the parts a picture has, how pictures are handed to the image processor.

    `prefix`: the tokens of a prompt see each other in both directions. Positions begin with `first_position`.
    """

    parts: Callable[[Tensor, Any], Sequence[Tensor]] = lambda features, config: [features]
    nested: bool = False
    prefix: bool = False
    first_position: int = 0


def _by_latents(features: Tensor, config: Any) -> Sequence[Tensor]:
    """`[n * latents, D]` of a picture cut into n parts."""
    return list(features.reshape(-1, config.perceiver_config.resampler_n_latents, features.shape[-1]))


KINDS: Mapping[str, Kind] = {
    "idefics2": Kind(_by_latents, nested=True),
    "llava": Kind(),
    "llava_next": Kind(),
    "paligemma": Kind(prefix=True, first_position=1),
}


class ForeignVlm(ForeignModel):
    """A vision-language model of transformers. Raises ModelError where its type is not in KINDS."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.kind = kind_of(model.config)
        self.first_position = self.kind.first_position

    @property
    def reads_whole(self) -> bool:
        """Whether a prompt is to be read as one piece, from its beginning."""
        return self.kind.prefix

    @torch.no_grad()
    def encode_images(self, images: Any) -> list[Tensor]:
        """Pixels of one picture -> its features `[n, D]`, those of the tokens between its parts included."""
        floats = {name: value.to(self.dtype) for name, value in images.inputs.items() if value.is_floating_point()}
        output = self.model.get_image_features(**{**images.inputs, **floats})
        features: Any = getattr(output, "pooler_output", output)
        found: Tensor = features if isinstance(features, Tensor) else torch.cat(list(features))
        parts = self.kind.parts(found.flatten(0, -2), self.config)
        if images.between is None or len(parts) == 1:
            return [torch.cat(list(parts))]
        between = self.embed(torch.tensor([images.between]))[0]
        joined = [piece for part in parts for piece in (between.to(part), part)]
        return [torch.cat(joined[1:])]

    def _mask(self, lengths: Tensor, count: int) -> Tensor:
        """Where prompts are read in both directions: float `[B, 1, T, M + T]`, what is hidden is the dtype's lowest.

        The first piece of a row sees itself wholly; what comes after it sees what came before. (Left to itself the
        model shows the tokens of every piece to each other, those of a guess too.)
        """
        if not self.kind.prefix:
            return super()._mask(lengths, count)
        longest, newest = int(lengths.max()), torch.arange(count)
        columns = torch.arange(longest + count)
        whole = columns >= (longest - lengths)[:, :, None]
        later = (columns > longest + newest[:, None]) & (lengths[:, :, None] > 0)
        hidden = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype)
        return torch.where(whole & ~later, torch.zeros_like(hidden), hidden)[:, None]


def kind_of(config: Any) -> Kind:
    """Raises ModelError for a type of model whose pictures are not known."""
    if config.model_type not in KINDS:
        raise ModelError(
            f"how a {config.model_type!r} model sees pictures is not known", f"known are {', '.join(KINDS)}"
        )
    return KINDS[config.model_type]


class ForeignProcessor:
    """Prompts and pixels as a processor of transformers makes them, but that typed text is never a special token."""

    def __init__(self, processor: Any, config: Any, generation: Any = None) -> None:
        self.processor, self.config, self.kind = processor, config, kind_of(config)
        self.rules = placeholders_for(config)
        self.tokenizer = processor.tokenizer
        if not self.tokenizer.chat_template:
            self.tokenizer.chat_template = getattr(processor, "chat_template", None)
        self.image_token: str = getattr(processor, "image_token", None) or "<image>"
        self.marked = MarkedTokenizer(self.tokenizer, self.image_token)
        if self.marked.image_token_id is None:
            raise ModelError(f"the tokenizer has no {self.image_token}", "copy the tokenizer files of this very model")
        self.template = choose(self.marked, None, None, "plain")
        alone, added = TokenReader(self.tokenizer, config, generation), self.tokenizer.get_added_vocab()
        self.stop_ids = alone.stop_ids | {added[text] for text in self.template.stop if text in added}
        self.stop_strings = tuple(text for text in self.template.stop if text not in added)
        self.context = alone.context
        vocabulary = text_config(config).vocab_size
        self.placeholder_id = self.marked.image_token_id if self.marked.image_token_id < vocabulary else 0
        fake: int | None = added.get(FAKE_TOKEN)
        self._between = fake if self.config.model_type == "idefics2" else None
        made = repr(sorted(processor.image_processor.to_dict().items(), key=lambda item: item[0]))
        self._mode = hashlib.sha256(made.encode()).hexdigest()[:16]

    def __call__(self, request: Request) -> Prompt:
        """Ids, slots and digests; of the pictures only bytes and header are read. Raises UsageError, MediaError.

        Log-probabilities of a prompt that is read in both directions are refused: no token of it is predicted.
        """
        if self.kind.prefix and request.sampling.prompt_logprobs:
            raise UsageError(
                "the model reads its prompts in both directions: their tokens have no log-probabilities",
                "leave prompt_logprobs out",
            )
        parts = request.parts or tuple(part for message in request.messages for part in message.parts)
        images = tuple(pictures.load_image(part) for part in parts if isinstance(part, Image))
        sizes = tuple(pictures.image_size(image) for image in images)
        strings = [
            image_text_replacement(self.processor, {"image_sizes": sizes}, self.config, i) for i in range(len(images))
        ]
        marked = self._render(request)
        if (count := marked.count(IMAGE)) != len(images):
            raise UsageError(f"the chat template takes {count} of {len(images)} pictures", "put all into the question")
        ids = self._encode(_filled(marked, strings))
        return self._prompt(ids, [text.count(self.image_token) for text in strings], images, sizes)

    def pixels(self, prompt: Prompt, images: Sequence[int]) -> Pixels:
        """What encode_images takes: one of the prompt's pictures, decoded now. Raises MediaError."""
        (image,) = images
        picture = pictures.read_image(prompt.images[image])
        given = [[picture]] if self.kind.nested else [picture]
        try:
            made = self.processor.image_processor(given, return_tensors="pt")
        except ValueError as error:
            raise MediaError(f"the model's image processor cannot take the picture ({error})", "convert it") from error
        return Pixels({name: value for name, value in made.items() if isinstance(value, Tensor)}, self._between)

    def _render(self, request: Request) -> str:
        if request.parts:
            return self._marked(request.parts)
        turns = [Turn(message.role, self._marked(message.parts)) for message in request.messages]
        return self.template.render(turns, True)

    def _marked(self, parts: Sequence[Text | Image]) -> str:
        return "".join(IMAGE if isinstance(part, Image) else self.marked.quote(part.text) for part in parts)

    def _encode(self, text: str) -> list[int]:
        """Token ids of the whole text, IMAGE_ID for each feature of a picture; a BOS where the tokenizer adds one."""
        bos = self.tokenizer.bos_token or ""
        ids = self.marked.encode(arrange_text(self.config, text, bos))
        adds = self.rules.add_special_tokens and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return [self.tokenizer.bos_token_id, *ids] if adds and ids[:1] != [self.tokenizer.bos_token_id] else ids

    def _prompt(
        self, ids: list[int], counts: Sequence[int], images: tuple[Image, ...], sizes: tuple[tuple[int, int], ...]
    ) -> Prompt:
        places = iter([at for at, token in enumerate(ids) if token == IMAGE_ID])
        slots = tuple(_slots(places, counts))
        digests = tuple(f"{image.digest}:{self._mode}" for image in images)
        known = tuple(self.placeholder_id if token == IMAGE_ID else token for token in ids)
        return Prompt(known, slots, digests, sizes, images)


def _filled(marked: str, strings: Sequence[str]) -> str:
    """Each mark of a picture replaced by what stands for it."""
    first, *others = marked.split(IMAGE)
    return first + "".join(text + after for text, after in zip(strings, others, strict=True))


def _slots(places: Iterator[int], counts: Sequence[int]) -> Iterator[Slot]:
    """From the places of all features, and how many each picture has: its range, tokens between its parts included."""
    for image, count in enumerate(counts):
        own = [next(places) for _ in range(count)]
        yield Slot(own[0], own[-1] + 1, image)
