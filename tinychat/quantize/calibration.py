"""Calibration data: text and pictures from files, or a set that is generated, as prompts that the model understands.

Sources: a JSONL file (`{"text": ...}`, or messages with pictures), a folder of pictures with questions, a text file.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from tinychat.core import Image, Message, Part, Request, Text
from tinychat.errors import FormatError, UsageError
from tinychat.eval.demo import Sample, sample_at
from tinychat.eval.heldout import speaks_demo
from tinychat.inputs.processor import Processor, Prompt
from tinychat.quantize.job import Calibration
from tinychat.quantize.prose import prose

Draft = Callable[[], Prompt]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXTS = (".txt", ".md", ".rst")
QUESTION = "Describe this picture in detail."
FOR_ALL = "prompt.txt"  # in a folder of pictures: the question where a picture has none of its own
GENERATED = "generated"
TEXT_SHARE = 4  # of the generated set for a vision model, every fourth sequence is text alone
ROWS = 'write {"text": ...} or {"messages": [{"role": ..., "content": ...}], "images": [...]} on each line'
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Data:
    """Prompts in the order in which they are used, and where they came from."""

    prompts: tuple[Prompt, ...]
    sources: tuple[str, ...]
    seqlen: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(min(len(prompt.ids), self.seqlen) for prompt in self.prompts)

    @property
    def pictures(self) -> int:
        return sum(len(prompt.slots) for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """Of the tokens, the pictures' digests and places: equal data has equal hashes, wherever it lies."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            slots = [(slot.start, slot.end, prompt.digests[slot.image]) for slot in prompt.slots]
            digest.update(json.dumps([prompt.ids[: self.seqlen], slots]).encode())
        return digest.hexdigest()


def gather(wanted: Calibration, processor: Processor) -> Data:
    """The calibration's prompts: an equal share of each source, drawn with the seed. Raises UsageError, FormatError."""
    names = wanted.sources or (GENERATED,)
    prompts: list[Prompt] = []
    for i, name in enumerate(names):
        share = (wanted.samples - i + len(names) - 1) // len(names)
        drafts = _drafts(name, wanted, processor, share)
        random.Random(f"{wanted.seed}/{i}").shuffle(drafts)
        drawn = [_light(draft()) for draft in drafts[:share]]
        if not any(prompt.ids for prompt in drawn):
            raise UsageError(f"the calibration source {name} holds nothing to read", "give another --calib")
        prompts += [prompt for prompt in drawn if prompt.ids]
    return Data(tuple(prompts), names, wanted.seqlen)


def _light(prompt: Prompt) -> Prompt:
    """A prompt whose pictures that have a file do not stay in memory."""
    images = tuple(Image(path=image.path, digest=image.digest) if image.path else image for image in prompt.images)
    return replace(prompt, images=images)


def _drafts(name: str, wanted: Calibration, processor: Processor, share: int) -> list[Draft]:
    path = Path(name).expanduser()
    if name == GENERATED:
        return list(_generated(wanted, processor, share))
    if path.is_dir():
        return [_dialogue(processor, messages) for messages in _picture_folder(path)]
    if not path.is_file():
        raise UsageError(f"there is no calibration source {name}", "give a .jsonl file, a text file or a folder")
    if path.suffix == ".jsonl":
        return list(_jsonl(path, processor))
    if path.suffix in TEXTS:
        return list(_windows(_read(path), processor, wanted.seqlen))
    raise UsageError(f"the calibration source {name} is a {path.suffix} file", f"give .jsonl or {', '.join(TEXTS)}")


# Text


def _text(processor: Processor, text: str) -> Draft:
    return lambda: processor(Request("calibration", parts=(Text(text),)))


def _windows(text: str, processor: Processor, seqlen: int) -> Iterator[Draft]:
    """A long text in windows of seqlen tokens, each with the beginning-of-sequence token where the model has one."""
    ids = _text(processor, text)().ids
    head = ids[:1] if ids[:1] == (processor.tokenizer.bos_token_id,) else ()
    body, size = ids[len(head) :], max(1, seqlen - len(head))
    for at in range(0, max(1, len(body) - size // 2), size):  # what is left over counts from half a window on
        window = Prompt((*head, *body[at : at + size]))
        yield lambda window=window: window


# Conversations


def _dialogue(processor: Processor, messages: Sequence[Message]) -> Draft:
    """A conversation; its last answer, where there is one, follows as the model would have said it."""

    def draft() -> Prompt:
        asked = tuple(messages[:-1] if messages[-1].role == "assistant" else messages)
        prompt = processor(Request("calibration", messages=asked))
        if len(asked) == len(messages):
            return prompt
        answer = processor.marked.encode(processor.marked.quote(messages[-1].text))
        end = [processor.tokenizer.eos_token_id] if processor.tokenizer.eos_token_id is not None else []
        return replace(prompt, ids=(*prompt.ids, *answer, *end))

    return draft


def _picture_folder(folder: Path) -> Iterator[tuple[Message, ...]]:
    """Each picture with the text file of its name, else with prompt.txt, else with a question of ours."""
    for_all = _read(folder / FOR_ALL).strip() if (folder / FOR_ALL).is_file() else QUESTION
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURES:
            own = path.with_suffix(".txt")
            question = _read(own).strip() if own.is_file() else for_all
            yield (Message("user", (Image(path=str(path)), Text(question))),)


def _jsonl(path: Path, processor: Processor) -> Iterator[Draft]:
    for number, line in enumerate(_read(path).split("\n"), 1):  # a string of JSON may hold other ends of lines
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if isinstance(text := row.get("text"), str):
                yield _text(processor, text)
            else:
                yield _dialogue(processor, _messages(row, path.parent))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise FormatError(f"{path}, line {number} is not a calibration sample ({error!r:.120})", ROWS) from error


def _messages(row: dict[str, Any], folder: Path) -> tuple[Message, ...]:
    """OpenAI's messages or LLaVA's conversations; pictures stand where `<image>` is, else before the first question."""
    turns = row["messages"] if "messages" in row else row["conversations"]
    named = row.get("images", row.get("image")) or []
    images = iter([named] if isinstance(named, str) else list(named))
    messages = [
        Message(cast("Any", ROLES[_either(turn, "role", "from")]), tuple(_parts(turn, images, folder)))
        for turn in turns
    ]
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if (left := [_image(name, folder) for name in images]) and first is not None:
        messages[first] = replace(messages[first], parts=(*left, *messages[first].parts))
    if first is None:
        raise ValueError("no message of a user")
    return tuple(messages)


def _parts(turn: dict[str, Any], images: Iterator[str], folder: Path) -> Iterator[Part]:
    content = _either(turn, "content", "value")
    if isinstance(content, str):
        first, *others = content.split("<image>")
        yield Text(first.removesuffix("\n"))
        for text in others:
            yield _image(_next(images), folder)
            yield Text(text.removeprefix("\n"))
        return
    for part in content:
        if "text" in part:
            yield Text(part["text"])
        else:
            named = part.get("image", part.get("path"))
            yield _image(named if isinstance(named, str) else _next(images), folder)


def _either(turn: dict[str, Any], name: str, other: str) -> Any:
    return turn[name] if name in turn else turn[other]


def _next(images: Iterator[str]) -> str:
    for name in images:
        return name
    raise ValueError("more places of pictures than pictures")


def _image(name: str, folder: Path) -> Image:
    return Image(path=str(folder / name))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is not text in UTF-8 ({error.reason})", "convert it, or give another file"
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "give another --calib") from error


# The generated set


def _generated(wanted: Calibration, processor: Processor, share: int) -> Iterator[Draft]:
    """What the demo model was trained on, for it; for others pictures with questions and our text, or text alone."""
    knows_demo, sees = speaks_demo(processor), bool(processor.tokens_per_image)
    for i in range(share):
        if knows_demo or (sees and i % TEXT_SHARE):
            yield _demo(processor, i, wanted.seed, None if knows_demo else 1)
        else:
            windows = list(_windows(prose(wanted.seed, i), processor, wanted.seqlen))
            yield random.Random(f"{wanted.seed}/{i}").choice(windows)


def _demo(processor: Processor, index: int, seed: int, pictures: int | None) -> Draft:
    def draft() -> Prompt:
        return _dialogue(processor, _told(sample_at("train", index, seed, pictures)))()

    return draft


def _told(sample: Sample) -> tuple[Message, ...]:
    """A generated sample as messages, with its pictures as bytes."""
    pictures = iter(sample.pictures)
    messages = [Message("system", (Text(sample.system),))] if sample.system else []
    for turn in sample.turns:
        shown = [_encoded(next(pictures)) for _ in range(turn.pictures)]
        messages.append(Message("user", (*shown, Text(turn.question))))
        messages.append(Message("assistant", (Text(turn.answer),)))
    return tuple(messages)


def _encoded(pixels: Any) -> Image:
    """pixels uint8 `[H, W, 3]` as a BMP, whose bytes do not depend on a compressor's version."""
    from PIL import Image as pillow

    out = BytesIO()
    pillow.fromarray(pixels).save(out, "BMP")
    return Image(data=out.getvalue())
