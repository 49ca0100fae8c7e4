"""The slash commands: rows of data from which the help and the completion are made."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tinychat.errors import UsageError
from tinychat.terminal.answers import count, stats_line
from tinychat.terminal.clean import clean_line
from tinychat.terminal.paths import split_paths
from tinychat.terminal.settings import change, current, known
from tinychat.terminal.staging import from_path, name_of

if TYPE_CHECKING:
    from tinychat.session import Turn
    from tinychat.terminal.repl import Chat

Kind = Literal["", "path", "conversation", "setting"]

_COMMAND = re.compile(r"/([\w?-]*)(?:\s+(.*))?", re.DOTALL)
_EXCERPT = 60


class Leave(Exception):
    """The chat ends with this exit code."""

    def __init__(self, code: int = 0) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class Command:
    """One row: names, what follows them (as help shows it and as completion knows it), a line of help, the function."""

    name: str
    run: Callable[[Chat, str], None]
    help: str
    short: tuple[str, ...] = ()
    argument: str = ""
    kind: Kind = ""
    choices: tuple[str, ...] = ()


def parse(line: str) -> tuple[str, str] | None:
    """The name and the argument of a command; None where the line is none, a path such as `/home/me/cat.png` too."""
    match = _COMMAND.fullmatch(line.strip())
    return (match[1], (match[2] or "").strip()) if match else None


def run(chat: Chat, name: str, argument: str) -> None:
    """Run the command of that name, long or short. Raises UsageError with the nearest name where there is none."""
    command = BY_NAME.get(name)
    if command is None:
        near = difflib.get_close_matches(name, BY_NAME, 1, 0.5)
        raise UsageError(f"there is no command /{name}", f"did you mean /{near[0]}?" if near else "/help lists them")
    if argument and not command.argument:
        raise UsageError(f"/{command.name} takes nothing after it", f"type /{command.name} alone")
    command.run(chat, argument)


def _image(chat: Chat, argument: str) -> None:
    if not argument:
        raise UsageError("/image needs a picture", "type /image and its path; Tab completes it")
    chat.stage([from_path(path) for path in split_paths(argument)])


def _images(chat: Chat, argument: str) -> None:
    if argument == "clear":
        chat.staged = ()
        chat.screen.note("no picture is waiting now")
    elif argument:
        raise UsageError(f"/images does not know {argument!r}", "type /images or /images clear")
    else:
        _list_images(chat)


def _list_images(chat: Chat) -> None:
    shown = chat.session.images
    for number, image in enumerate(shown, 1):
        chat.screen.text(f"[image {number}: {name_of(image)}] in the conversation")
    for number, staged in enumerate(chat.staged, len(shown) + 1):
        chat.screen.text(f"{staged.label(number)} waiting for the next question")
    if not shown and not chat.staged:
        chat.screen.note("no pictures yet; type or drag a path, or use /image")


def _clear(chat: Chat, argument: str) -> None:
    chat.session.clear()
    chat.staged = ()
    chat.screen.note("the conversation begins anew" + (", with the same /system" if chat.session.system else ""))


def _undo(chat: Chat, argument: str) -> None:
    turn = _need(chat.session.undo())
    chat.screen.note(f"took back: {_excerpt(turn)}")
    if turn.user.images:
        chat.stage(turn.user.images, "waiting again; /images clear drops it")


def _drop(chat: Chat, argument: str) -> None:
    turn = _need(chat.session.drop_oldest())
    chat.screen.note(f"forgot the oldest question and its answer: {_excerpt(turn)}")


def _regenerate(chat: Chat, argument: str) -> None:
    events = chat.session.regenerate()
    if chat.session.sampling.temperature == 0:
        chat.screen.note("temperature is 0, so the answer will be the same; /set temperature 0.7 varies it")
    chat.answer(events)


def _edit(chat: Chat, argument: str) -> None:
    chat.answer(chat.session.edit(argument))


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.session.set_system(None if argument == "off" else argument)
    system = chat.session.system
    chat.screen.note(f"system message: {clean_line(system)}" if system else "no system message")


def _set(chat: Chat, argument: str) -> None:
    name, _, word = argument.partition(" ")
    if not argument:
        chat.screen.columns(current(chat.session))
        return
    known(name)
    if word.strip():
        change(chat.session, name, word.strip())
    chat.screen.note(f"{name} is {dict(current(chat.session))[name]}")


def _stats(chat: Chat, argument: str) -> None:
    if argument not in ("", "on", "off"):
        raise UsageError(
            f"/stats does not know {argument!r}", "type /stats on, /stats off, or /stats for the last answer"
        )
    if argument:
        chat.stats = argument == "on"
        chat.screen.note(f"statistics after each answer: {argument}")
    elif chat.session.last is None:
        chat.screen.note("no answer yet")
    else:
        chat.screen.note(stats_line(chat.session.last, chat.session.context))


def _save(chat: Chat, argument: str) -> None:
    if not argument:
        raise UsageError("/save needs a name or a file", "type /save pets, or /save pets.json")
    target = _target(argument)
    replaced = chat.session.save(target)
    chat.screen.note(f"saved as {clean_line(target)}" + (", in place of the one before" if replaced else ""))


def _load(chat: Chat, argument: str) -> None:
    if not argument:
        _list_saved(chat)
        return
    for warning in chat.session.load(_target(argument)):
        chat.screen.problem(clean_line(warning))
    chat.staged = ()
    turns, images = chat.session.turns, chat.session.images
    chat.screen.note(f"loaded: {count(len(turns), 'question')}, {count(len(images), 'picture')}")
    if turns:
        chat.screen.text(f"> {turns[-1].user.text}\n{turns[-1].assistant.text}")


def _list_saved(chat: Chat) -> None:
    saved = chat.session.store.list()
    if saved:
        chat.screen.columns([(clean_line(each.name), each.saved_at) for each in saved])
    else:
        chat.screen.note("nothing is saved yet; /save NAME does it")


def _delete(chat: Chat, argument: str) -> None:
    if not chat.session.store.delete(argument):
        raise UsageError(f"no conversation is saved as {argument!r}", "/load lists those that are")
    chat.screen.note(f"deleted {clean_line(argument)}")


def _help(chat: Chat, argument: str) -> None:
    chat.screen.columns([(usage(command), command.help) for command in COMMANDS])
    chat.screen.text(FOOT)


def _quit(chat: Chat, argument: str) -> None:
    raise Leave


def usage(command: Command) -> str:
    """How a command is typed: `/image PATH... (/i)`."""
    short = " ".join(f"(/{name})" for name in command.short)
    return " ".join(part for part in (f"/{command.name}", command.argument, short) if part)


def _target(argument: str) -> str:
    """What /save and /load mean: a file is written as paths are, a name as it stands."""
    found = split_paths(argument)
    return str(found[0]) if len(found) == 1 and argument[:1] in "'\"~/." else argument


def _need(turn: Turn | None) -> Turn:
    if turn is None:
        raise UsageError("there is nothing to take back", "ask something first")
    return turn


def _excerpt(turn: Turn) -> str:
    text = clean_line(turn.user.text)
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}…"


COMMANDS = (
    Command("image", _image, "put a picture before the next question", ("i",), "PATH...", "path"),
    Command("images", _images, "list the pictures, or drop those that wait", (), "[clear]", "", ("clear",)),
    Command("clear", _clear, "begin anew; the system message stays", ("c",)),
    Command("undo", _undo, "take back the last question and its answer", ("u",)),
    Command("regen", _regenerate, "answer the last question again", ("r",)),
    Command("edit", _edit, "ask the last question in other words", ("e",), "TEXT"),
    Command("drop", _drop, "forget the oldest question and its answer, to make room", ("d",)),
    Command("system", _system, "show or set the system message", (), "[TEXT|off]", "", ("off",)),
    Command("set", _set, "show or change how answers are drawn", (), "[NAME VALUE]", "setting"),
    Command("stats", _stats, "statistics after each answer, or of the last one", (), "[on|off]", "", ("on", "off")),
    Command("save", _save, "save the conversation by name, or as a file", (), "NAME|FILE.json", "conversation"),
    Command("load", _load, "load a conversation, or list the saved ones", (), "[NAME|FILE.json]", "conversation"),
    Command("delete", _delete, "delete a saved conversation", (), "NAME", "conversation"),
    Command("help", _help, "show this", ("h", "?")),
    Command("quit", _quit, "leave; Ctrl-D does it too", ("q", "exit")),
)
BY_NAME = {name: command for command in COMMANDS for name in (command.name, *command.short)}

FOOT = """\
A path in a question, typed, pasted or dragged, shows that picture:
  /home/me/cat.png what is this?
Alt-Enter, or a \\ at the end of a line, begins a new line.
What stands between \"\"\" and \"\"\" is sent as it is.
Ctrl-C stops an answer and keeps what was said; once more leaves."""
