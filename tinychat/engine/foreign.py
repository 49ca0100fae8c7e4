"""Models that are not ours behind the engine's Model: any causal language model of transformers."""

from __future__ import annotations

import importlib.util
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from tinychat.engine.foreign_cache import ForeignCache
from tinychat.engine.prefill import Model
from tinychat.engine.requests import TokenReader
from tinychat.engine.rows import Reader
from tinychat.errors import CapacityError, FormatError, ModelError, UsageError
from tinychat.layers.kv_cache import start_positions

CAPACITY = 4096  # tokens a row of a cache that nobody sized
PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def adapted(model: Any) -> Model:
    """A model as the engine sees it: ours are already. Raises ModelError for a model that cannot be made one."""
    if hasattr(model, "make_cache"):
        return model
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"a {type(model).__name__} is given as the model", "give one of transformers, or of ours")
    if hasattr(model.config, "vision_config"):
        from tinychat.engine.foreign_vlm import ForeignVlm

        return ForeignVlm(model)
    return ForeignModel(model)


def reader_of(words: Any, model: Any) -> Any:
    """What makes prompts: as it is given, or over a tokenizer or a processor of transformers."""
    if hasattr(words, "stop_ids"):
        return words
    generation = getattr(model, "generation_config", None)
    if hasattr(words, "image_processor"):
        from tinychat.engine.foreign_vlm import ForeignProcessor

        return ForeignProcessor(words, model.config, generation)
    return TokenReader(words, model.config, generation)


class ForeignModel:
    """A causal language model of transformers. Rows of different lengths are read together, padded in the cache alone.

    Raises ModelError where what it remembers of a text is not keys and values, one a token.
    """

    first_position = 0

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model.eval()
        self.config = model.config
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        _check_memory(model, self._takes)

    @property
    def device(self) -> torch.device:
        return self._table.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def _table(self) -> Any:
        return self.model.get_input_embeddings()

    @torch.no_grad()
    def embed(self, ids: Tensor, slots: Sequence[tuple[int, int]] = (), features: Sequence[Tensor] = ()) -> Tensor:
        """ids `[T]`, slots (start, end) and their picture features `[n, D]` -> embeddings `[1, T, D]`."""
        embeds = self._table(ids.to(self.device))
        for (start, end), rows in zip(slots, features, strict=True):
            if len(rows) != end - start:
                raise UsageError(
                    f"a picture has {len(rows)} features for {end - start} places", "take the model's own processor"
                )
            embeds[start:end] = rows.to(embeds)
        return embeds[None]

    def encode_images(self, images: Any) -> list[Tensor]:
        """Raises UsageError: the model reads text only."""
        raise UsageError(f"{type(self.model).__name__} reads text only and was given pictures", "take a vision model")

    def prefill(self, embeds: Tensor, cache: ForeignCache, start: int | Tensor | Sequence[int]) -> Tensor:
        """embeds `[B, T, D]` written from position `start` -> logits of the last token `[B, 1, V]`."""
        if not embeds.shape[1]:
            raise UsageError("a row has no tokens to prefill", "give at least one token a row")
        cache.truncate(start_positions(start, len(cache)))
        return self._step(embeds, cache, every=False)

    def decode(self, ids: Tensor, cache: ForeignCache) -> Tensor:
        """The newest token of each row `[B, 1]` -> logits `[B, 1, V]`, appended to the cache."""
        return self._step(ids, cache, every=True)

    def verify(self, ids: Tensor, cache: ForeignCache) -> Tensor:
        """K tokens a row `[B, K]`, or their embeddings `[B, K, D]`, appended to the cache -> logits after each."""
        return self._step(ids, cache, every=True)

    def make_cache(self, rows: int = 1, capacity: int | None = None) -> ForeignCache:
        """An empty cache; by default of min(max_position_embeddings, 4096) tokens a row."""
        text = text_config(self.config)
        longest = getattr(text, "max_position_embeddings", None) or CAPACITY
        return ForeignCache(rows, capacity or min(longest, CAPACITY))

    @torch.no_grad()
    def _step(self, inputs: Tensor, cache: ForeignCache, every: bool) -> Tensor:
        """Ids `[B, T]` or embeddings `[B, T, D]` into the cache -> logits, float32, after every token or the last."""
        count = inputs.shape[1]
        cache.check_room(count)
        lengths = torch.tensor(cache.lengths)[:, None]
        given = {
            "inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs.to(self.device),
            "attention_mask": self._mask(lengths, count).to(self.device),
            "position_ids": (lengths + torch.arange(count) + self.first_position).to(self.device),
            "logits_to_keep": 0 if every else 1,
        }
        always = {"inputs_embeds", "input_ids", "attention_mask"}
        given = {name: value for name, value in given.items() if name in always | self._takes}
        with cache.lent(count) as past:
            output = self.model(**given, past_key_values=past, use_cache=True, return_dict=True)
            _check_past(self.model, past, output, max(cache.lengths) + count)
        logits = output.logits if every else output.logits[:, -1:]
        return logits.float()

    def _mask(self, lengths: Tensor, count: int) -> Tensor:
        """int64 `[B, M + T]`: 1 at the tokens of each row, cached ones and new ones."""
        longest = int(lengths.max())
        return (torch.arange(longest + count) >= longest - lengths).long()


def text_config(config: Any) -> Any:
    """The decoder's part of a config."""
    return config.get_text_config(decoder=True)


def _check_memory(model: PreTrainedModel, takes: frozenset[str]) -> None:
    """Raises ModelError for an encoder-decoder, a state-space model, linear attention and the like."""
    name, text = type(model).__name__, text_config(model.config)
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - PLAIN_LAYERS)
    reason = None
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "an encoder reads its prompts"
    elif kinds:
        reason = f"it has layers of {', '.join(kinds)}"
    elif getattr(model, "_is_stateful", False) or "past_key_values" not in takes:
        reason = "it keeps a state instead of keys and values"
    elif not model.can_generate():
        reason = "it has no head that gives the next token"
    if reason is not None:
        raise ModelError(f"{name} cannot be batched here: {reason}", "take a decoder of plain attention")


def _check_past(model: Any, past: Any, output: Any, length: int) -> None:
    """Raises ModelError where the model did not keep its keys and values in the cache that it was given."""
    held = {tuple(layer.keys.shape[-2:-1]) for layer in past.layers if layer.keys is not None}
    if output.past_key_values is not past or held != {(length,)} or any(layer.keys is None for layer in past.layers):
        raise ModelError(
            f"{type(model).__name__} keeps its keys and values in a cache of its own",
            "take a decoder of plain attention",
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """A model as the engine sees it, what reads its prompts, and the tokens that its positions take."""

    model: Model
    reader: Reader
    context: int


def open_model(
    model_id: str,
    revision: str | None = None,
    quantize: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """A folder or a hub id: what our own loader reads is ours, the rest and `quantize` are transformers'.

    dtype None: what our loader says, or of transformers' models float16 on CUDA and float32 elsewhere. Their weights go
    to all GPUs that there are. Raises UsageError for a way to quantize that cannot work here, ModelError or FormatError
    where the model is missing, unknown, incomplete or damaged, CapacityError where memory does not suffice.
    """
    from tinychat import load

    _check_quantize(quantize)
    folder, why = load.resolve(model_id, revision), ""
    if quantize is None:
        try:
            load.open_source(folder)
        except FormatError:
            raise
        except ModelError as error:
            why = f" (and our own loader does not: {error.message})"
        else:
            ready = load.load_folder(folder, load.Placement(dtype))
            return Opened(ready.model, ready.processor, ready.context)
    return TheirFolder(folder, quantize, dtype, trust_remote_code, why).open()


def open_foreign(
    model_id: str,
    model_class: Any = None,
    *,
    processor_class: Any = None,
    processor_kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """A folder or a hub id by classes of transformers, or by its Auto classes where they are None.

    processor_kwargs go to the processor's from_pretrained. Raises what open_model raises.
    """
    from tinychat import load

    folder = TheirFolder(load.resolve(model_id, revision), None, dtype, trust_remote_code)
    return folder.open(model_class, processor_class, processor_kwargs or {})


def _check_quantize(quantize: str | None) -> None:
    if quantize is None:
        return
    if quantize != "bitsandbytes":
        remedy = "give bitsandbytes, or nothing: a checkpoint that is quantized says so itself"
        raise UsageError(f"the way to quantize is {quantize!r}", remedy)
    missing = None if torch.cuda.is_available() else "a CUDA device, and torch finds none"
    if missing is None and importlib.util.find_spec("bitsandbytes") is None:
        missing = "the package bitsandbytes, which is not installed"
    if missing is not None:
        raise UsageError(f"8-bit weights of bitsandbytes need {missing}", "leave quantize out, or take a 4-bit model")


@dataclass(frozen=True, slots=True)
class TheirFolder:
    """A folder that transformers opens. `why` is what our own loader says of it."""

    path: Path
    quantize: str | None = None
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False
    why: str = ""

    def open(self, model_class: Any = None, processor_class: Any = None, options: Any = None) -> Opened:
        """The model, adapted, with what reads its prompts: a tokenizer alone, or a processor where it sees pictures."""
        config = self.read(AutoConfig)
        sees = hasattr(config, "vision_config")
        model = self.model(config, model_class or (AutoModelForImageTextToText if sees else AutoModelForCausalLM))
        kind = processor_class or (AutoProcessor if sees else AutoTokenizer)
        sides = {"padding_side": "left", "truncation_side": "left"}
        words = self.read(kind, **{**({} if sees else sides), **(options or {})})
        tokenizer = words.tokenizer if sees else words
        set_pad_token(tokenizer, model.config)
        check_tokenizer(tokenizer, self.path, model, getattr(words, "image_token", None))
        reader = reader_of(words, model)
        return Opened(adapted(model), reader, reader.context)

    def model(self, config: Any, kind: Any) -> PreTrainedModel:
        """The model in eval mode on the GPUs, or the CPU where there is none. Raises ModelError for missing tensors."""
        cuda = torch.cuda.is_available()
        options: dict[str, Any] = {"config": config, "dtype": self.dtype or (torch.float16 if cuda else torch.float32)}
        if self.quantize is not None:
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        if torch.cuda.device_count() > 1 or self.quantize is not None:
            options["device_map"] = "auto"
        model, loaded = self.read(kind, output_loading_info=True, **options)
        if lacking := sorted(loaded["missing_keys"]):
            some = ", ".join(lacking[:3])
            lacks = f"{self.path} lacks {len(lacking)} tensors of the model ({some})"
            raise ModelError(lacks, "copy all its files again")
        return model if not cuda or "device_map" in options else model.to("cuda")

    def read(self, kind: Any, **options: Any) -> Any:
        """What from_pretrained gives; what it raises, as a sentence of ours."""
        options["trust_remote_code"] = self.trust_remote_code
        try:
            return kind.from_pretrained(str(self.path), local_files_only=True, **options)
        except SafetensorError as error:
            raise FormatError(f"the weights in {self.path} cannot be read ({error})", "copy the files again") from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise CapacityError(f"the memory does not suffice for {self.path}", "take a smaller model") from error
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
            raise self._refusal(str(error)) from error

    def _refusal(self, reason: str) -> ModelError:
        if "trust_remote_code" in reason:
            own = f"{self.path} brings code of its own, which only trust_remote_code runs"
            return ModelError(own, "read that code; then give trust_remote_code=True, or take another model")
        remedy = "check that its files are complete and for this version of transformers"
        short = textwrap.shorten(reason, 300)  # some list every model there is
        return ModelError(f"transformers does not read {self.path}: {short}{self.why}", remedy)


def set_pad_token(tokenizer: Any, config: Any) -> None:
    """Give a tokenizer without padding one: the config's, an EOS, or a new [PAD] that no embedding is needed for."""
    if tokenizer.pad_token_id is not None:
        return
    configs = (config, text_config(config))
    named: list[Any] = [getattr(one, name) for name in ("pad_token_id", "eos_token_id") for one in configs]
    for found in (*named, tokenizer.eos_token_id):
        first = cast("list[object]", found)[0] if isinstance(found, list) and found else cast("object", found)
        if isinstance(first, int) and (token := tokenizer.convert_ids_to_tokens(first)) is not None:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def check_tokenizer(tokenizer: Any, folder: Path, model: Any, image_token: str | None = None) -> None:
    """Raises ModelError where it was made of nothing, or a token has no embedding; padding and pictures need none."""
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in names):
        looked = f"{' or '.join(sorted(names))} was looked for in {folder}"
        raise ModelError(f"{looked}, and there is none", "copy the tokenizer files there")
    unused = {tokenizer.pad_token, image_token}
    largest = max((i for token, i in tokenizer.get_vocab().items() if token not in unused), default=0)
    if largest >= (rows := model.get_input_embeddings().num_embeddings):
        ids = f"has ids up to {largest:,}, the model's vocabulary has {rows:,} tokens"
        raise ModelError(f"the tokenizer {ids}", "copy the tokenizer files of this very model")
