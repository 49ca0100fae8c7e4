"""From turns to one string: the tokenizer's own jinja template, or one of the rows below."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import jinja2

from tinychat.core import Role
from tinychat.errors import ModelError, UsageError
from tinychat.inputs.marks import ANSWER, IMAGE, FastTokenizer, MarkedTokenizer

ContentStyle = Literal["string", "list", "marked_list"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message as marked text: pictures and answers are marks, what people typed is quoted."""

    role: Role
    text: str


class Template(Protocol):
    """What the processor needs: `bos` = begins with BOS, `stop` = ends a turn, `places_images` = writes around them."""

    @property
    def name(self) -> str: ...
    @property
    def bos(self) -> bool: ...
    @property
    def stop(self) -> tuple[str, ...]: ...
    @property
    def places_images(self) -> bool: ...

    def render(self, turns: Sequence[Turn], generate: bool) -> str:
        """The turns as one marked string; `generate` ends it with the header of the answer to come."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """A template as data: what stands around each role's words. `fold`: system words join the first user's."""

    name: str
    system: str
    system_around: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    stop: tuple[str, ...] = ()
    fold: bool = False
    bos: bool = True
    places_images: bool = False

    def render(self, turns: Sequence[Turn], generate: bool) -> str:
        """The turns as one marked string; the row's own system words come first where no turn has any."""
        if all(turn.role != "system" for turn in turns):
            turns = [Turn("system", self.system), *turns]
        if self.fold:
            turns = _fold([self._wrap_system(turn) for turn in turns], "")
        around = {"system": self.system_around, "user": self.user, "assistant": self.assistant}
        texts = [around[turn.role][0] + turn.text + around[turn.role][1] for turn in turns if _is_said(turn)]
        return "".join(texts) + (self.answer if generate else "")

    def _wrap_system(self, turn: Turn) -> Turn:
        if turn.role != "system" or not turn.text:
            return turn
        return Turn("system", self.system_around[0] + turn.text + self.system_around[1])


def _is_said(turn: Turn) -> bool:
    return turn.role != "system" or bool(turn.text)


_VISION_ASSISTANT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_CHATML = Row(
    name="chatml",
    system="You are a helpful assistant",
    system_around=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    answer="<|im_start|>assistant\n",
    stop=("<|im_end|>",),
    bos=False,
)

# The strings are those the models were trained with (VILA's and LLaVA's conversation.py).
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="vicuna_v1",
            system=_VICUNA,
            system_around=("", " "),
            user=("USER: ", " "),
            assistant=("ASSISTANT: ", "</s>"),
            answer="ASSISTANT:",
            stop=("</s>",),
        ),
        Row(
            name="llama_3",
            system=_VISION_ASSISTANT,
            system_around=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
            user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
            answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
            stop=("<|eot_id|>", "<|end_of_text|>"),
        ),
        _CHATML,
        replace(
            _CHATML,
            name="hermes-2",
            system="Answer the questions.",
            system_around=("<|im_start|>system\n", "<|im_end|>"),
            user=("<|im_start|>user\n", "<|im_end|>"),
            assistant=("<|im_start|>assistant\n", "<|im_end|>"),
        ),
        Row(
            name="llama_2",
            system="",
            system_around=("<<SYS>>\n", "\n<</SYS>>\n\n"),
            user=("[INST] ", " [/INST]"),
            assistant=(" ", " </s><s>"),
            answer="",
            stop=("</s>",),
            fold=True,
        ),
        Row(
            name="mistral",
            system="",
            system_around=("", "\n\n"),
            user=("[INST] ", " [/INST]"),
            assistant=(" ", "</s>"),
            answer="",
            stop=("</s>",),
            fold=True,
        ),
        Row(name="plain", system="", system_around=("", "\n"), user=("", "\n"), assistant=("", "\n"), answer=""),
    )
}
_ALIASES = {"v1": "vicuna_v1", "qwen2": "chatml", "llama3": "llama_3", "llama2": "llama_2"}
_BY_TOKEN = (("<|im_start|>", "chatml"), ("<|start_header_id|>", "llama_3"), ("[INST]", "mistral"))


def choose(tokenizer: MarkedTokenizer, name: str | None, config_name: str | None, default: str) -> Template:
    """The template called `name` (a row, `jinja`, or a file), or the one that the tokenizer asks for.

    Without a name: the tokenizer's own, then the config's, then by the special tokens there are, then `default`.
    Raises UsageError for an unknown name.
    """
    own = tokenizer.tokenizer.chat_template
    if name is not None and name != "jinja":
        return _named(tokenizer, name)
    if own:
        return Jinja.of(tokenizer, tokenizer.tokenizer.get_chat_template())
    if name == "jinja":
        raise UsageError("the tokenizer has no chat template of its own", f"take one of {', '.join(ROWS)}")
    if config_name is not None and _ALIASES.get(config_name, config_name) in ROWS:
        return ROWS[_ALIASES.get(config_name, config_name)]
    added = tokenizer.tokenizer.get_added_vocab()
    return ROWS[next((row for token, row in _BY_TOKEN if token in added), default)]


def _named(tokenizer: MarkedTokenizer, name: str) -> Template:
    key = _ALIASES.get(name, name)
    if key in ROWS:
        return ROWS[key]
    if Path(name).is_file():
        return Jinja.of(tokenizer, Path(name).read_text(encoding="utf-8"))
    near = difflib.get_close_matches(name, ROWS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"there is no template {name!r}", f"{hint}known are {', '.join(ROWS)}, jinja, or a template file")


@dataclass(frozen=True, slots=True)
class Jinja:
    """A jinja chat template, rendered by transformers. How it wants its content is found by trying, once."""

    tokenizer: MarkedTokenizer
    source: str
    style: ContentStyle
    fold: bool
    stop: tuple[str, ...] = ()
    name: str = "jinja"
    bos: bool = False

    @classmethod
    def of(cls, tokenizer: MarkedTokenizer, source: str) -> Jinja:
        """The template with its habits found out. Raises ModelError where it cannot render a message at all."""
        style = _find_style(tokenizer, source)
        bare = cls(tokenizer, source, style, fold=True)
        system = replace(bare, fold=False)._attempt([Turn("system", _PROBE), Turn("user", "a")])
        fold = _PROBE not in system or "'type'" in system
        return replace(bare, fold=fold, stop=bare._find_stop())

    @property
    def places_images(self) -> bool:
        return self.style == "list"

    def render(self, turns: Sequence[Turn], generate: bool) -> str:
        """The turns as one marked string. Raises UsageError with the template's own words where it refuses them."""
        if self.fold:
            turns = _fold(turns, "\n\n")
        try:
            text = self._rendered(turns, generate)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template refuses this conversation: {error}", "change its roles") from error
        wanted = sum(turn.text.count(IMAGE) for turn in turns)
        if text.count(IMAGE) != wanted:
            found = f"{text.count(IMAGE)} places for {wanted} images"
            raise ModelError(f"the chat template made {found}", f"choose --template: {', '.join(ROWS)}")
        return text

    def _rendered(self, turns: Sequence[Turn], generate: bool) -> str:
        messages = [{"role": turn.role, "content": _content(turn.text, self.style)} for turn in turns]
        return _apply(self.tokenizer, self.source, messages, generate, self.style == "list")

    def _attempt(self, turns: Sequence[Turn]) -> str:
        try:
            return self._rendered(turns, False)
        except jinja2.TemplateError:
            return ""

    def _find_stop(self) -> tuple[str, ...]:
        """The special token that the template writes right after an answer, if it writes one."""
        turns = [Turn("user", "a"), Turn("assistant", ANSWER)]
        text = self._attempt([*turns, Turn("user", "b")]) or self._attempt(turns)
        after = text.partition(ANSWER)[2].lstrip()
        starts = [token for token in self.tokenizer.tokenizer.get_added_vocab() if after.startswith(token)]
        return (max(starts, key=len),) if starts else ()


_PROBE = "tinychat probe"


def _find_style(tokenizer: MarkedTokenizer, source: str) -> ContentStyle:
    """A list of parts where the template writes the image token for one; else a string; else a list of texts."""
    image: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": _PROBE}]
    tries: tuple[tuple[ContentStyle, Any, int], ...] = (
        ("list", image, 1),
        ("string", _PROBE, 0),
        ("marked_list", image[1:], 0),
    )
    failure: jinja2.TemplateError | None = None
    for style, content, images in tries:
        try:
            text = _apply(tokenizer, source, [{"role": "user", "content": content}], True, style == "list")
        except jinja2.TemplateError as error:
            failure = error
            continue
        if _PROBE in text and text.count(IMAGE) == images and "'type'" not in text:
            return style
    why = f" ({failure})" if failure else ""
    raise ModelError(f"the chat template does not render a message{why}", f"choose --template: {', '.join(ROWS)}")


def _apply(
    tokenizer: MarkedTokenizer, source: str, messages: list[dict[str, Any]], generate: bool, place_images: bool
) -> str:
    own: FastTokenizer = tokenizer.tokenizer
    try:
        text = own.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=generate)
    except TypeError as error:  # a template that adds a string and a list, or the like
        raise jinja2.TemplateError(str(error)) from error
    return str(text).replace(tokenizer.image_token, IMAGE) if place_images else str(text)


def _content(text: str, style: ContentStyle) -> str | list[dict[str, str]]:
    if style == "string":
        return text
    if style == "marked_list":
        return [{"type": "text", "text": text}]
    first, *others = text.split(IMAGE)
    parts: list[dict[str, str]] = [{"type": "text", "text": first}] if first else []
    for after in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": after}] if after else [])]
    return parts or [{"type": "text", "text": ""}]


def _fold(turns: Sequence[Turn], between: str) -> list[Turn]:
    """System words in front of the first user's own, for templates that have no place for them."""
    system = between.join(turn.text for turn in turns if turn.role == "system" and turn.text)
    others = [turn for turn in turns if turn.role != "system"]
    first = next((i for i, turn in enumerate(others) if turn.role == "user"), None)
    if not system:
        return others
    if first is None:
        return [Turn("user", system), *others]
    others[first] = Turn("user", system + between + others[first].text)
    return others
