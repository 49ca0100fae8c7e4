"""The chat on a terminal: read a line, find out what it is, do it, draw what comes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from tinychat.core import Event, Failed, Finished, Image
from tinychat.errors import TinychatError, UsageError
from tinychat.session import Session
from tinychat.terminal import commands, staging
from tinychat.terminal.answers import count, draw, sentence, stats_line
from tinychat.terminal.clean import clean_line
from tinychat.terminal.commands import Leave
from tinychat.terminal.completion import ChatCompleter
from tinychat.terminal.interrupts import interruptible, quiet_keyboard
from tinychat.terminal.lines import is_block_start, unwrap
from tinychat.terminal.paths import Found, find_pictures
from tinychat.terminal.reading import Editor, LineReader, Reader, is_interactive, open_history
from tinychat.terminal.screen import Screen
from tinychat.terminal.staging import Inspect, Staged, from_path, stage

INTERRUPTED = 130
FULL = 5
MAKE_ROOM = "make room: /drop forgets the oldest question, /undo the last one, /clear all"


def run_chat(
    session: Session, *, plain: bool = False, images: Sequence[Image] = (), title: str = "", stats: bool = False
) -> int:
    """Chat on the process's terminal, or with the lines of a pipe, until the user leaves; returns the exit code.

    `images` wait for the first question. From a pipe, problems go to stderr and the code is that of the first failure.
    Raises MediaError where one of the images cannot be read.
    """
    interactive = is_interactive(sys.stdout)
    screen = Screen(sys.stdout, plain, None if interactive else sys.stderr)
    chat = Chat(session, screen, stats=stats)
    if interactive:
        screen.note(f"{title or 'tinychat'} · /help lists the commands, Ctrl-D leaves")
    if images:
        chat.stage(images)
    if interactive:
        return chat.run(make_editor(chat))
    return chat.run(LineReader(sys.stdin)) or chat.failure


def make_editor(chat: Chat) -> Editor:
    """The editor on the process's terminal, with the user's history."""
    store = chat.session.store
    completer = ChatCompleter(lambda: [saved.name for saved in store.list()])
    history = open_history(store.folder / "history")
    return Editor(history, completer, paste=chat.taker, edited=chat.disarm, plain=chat.screen.plain)


class Chat:
    """The state of a chat on a terminal: the session, the pictures that wait, and whether Ctrl-C leaves.

    `failure` is the exit code of the first failure, 0 without one.
    """

    def __init__(
        self, session: Session, screen: Screen, *, stats: bool = False, inspect: Inspect = staging.inspect
    ) -> None:
        self.session = session
        self.screen = screen
        self.stats = stats
        self.staged: tuple[Staged, ...] = ()
        self.failure = 0
        self._inspect = inspect
        self._armed = False

    def run(self, reader: Reader) -> int:
        """Read and answer until the user leaves; the exit code."""
        while True:
            try:
                line = reader.read(self.prompt)
                self.disarm()
                self.handle(line)
            except EOFError:
                return 0
            except Leave as leave:
                return leave.code
            except KeyboardInterrupt:
                if self._armed:
                    return INTERRUPTED
                self._arm("Ctrl-C once more leaves; so does Ctrl-D")

    def prompt(self) -> str:
        """What stands before the cursor: how many pictures wait."""
        waiting = len(self.staged)
        return f"[{waiting} picture{'s' * (waiting > 1)}] > " if waiting else "> "

    def disarm(self) -> None:
        """The next Ctrl-C at an empty prompt is a first one again."""
        self._armed = False

    def handle(self, line: str) -> None:
        """Do what a line says: a command, pictures, a question. What goes wrong is shown."""
        try:
            self._handle(unwrap(line), literal=is_block_start(line))
        except TinychatError as error:
            self.failure = self.failure or error.exit_code
            self.screen.problem(clean_line(str(error)))

    def stage(self, images: Sequence[Image], remark: str = "") -> None:
        """Let pictures wait for the next question, all or none. Raises MediaError."""
        staged = stage(images, self._inspect)
        first = len(self.session.images) + len(self.staged) + 1
        self.staged += staged
        for number, each in enumerate(staged, first):
            self.screen.text(f"{each.label(number)} {remark}".rstrip())

    def answer(self, events: Iterator[Event]) -> Finished | Failed:
        """Draw an answer; Ctrl-C stops it, a second one leaves."""
        try:
            with quiet_keyboard(), interruptible(self.session.cancel):
                end = draw(events, self.screen.painter(), self.screen.indicator())
        except KeyboardInterrupt:
            raise Leave(INTERRUPTED) from None
        if isinstance(end, Failed):
            self._explain_failure(end)
        else:
            self._explain_end(end)
        return end

    def taker(self, pasted: str) -> Callable[[], None] | None:
        """For a paste of nothing but pictures, what stages them; None for any other."""
        found = find_pictures(pasted)
        if not found.paths or found.text or found.missing or found.mentioned:
            return None
        return lambda: self.handle(pasted)

    def _handle(self, text: str, literal: bool) -> None:
        command = None if literal else commands.parse(text)
        if command is not None:
            commands.run(self, *command)
        elif text.strip():
            self._ask(Found(text) if literal else find_pictures(text))

    def _ask(self, found: Found) -> None:
        _check_found(found)
        if found.paths:
            self.stage([from_path(path) for path in found.paths])
        for name in found.mentioned:
            self.screen.note(f"there is no file {clean_line(name)} here; sent as words")
        if not found.text:
            return
        end = self.answer(self.session.say(found.text, [staged.image for staged in self.staged]))
        if self.session.last is end:
            self.staged = ()

    def _arm(self, note: str) -> None:
        self._armed = True
        self.screen.note(note)

    def _explain_failure(self, failed: Failed) -> None:
        self.failure = self.failure or failed.exit_code
        self.screen.problem(sentence(failed))
        if failed.exit_code == FULL and self.session.turns:
            self.screen.note(f"nothing of it was kept, Up brings it back; {MAKE_ROOM}")

    def _explain_end(self, end: Finished) -> None:
        used = end.usage.prompt_tokens + end.usage.completion_tokens
        if end.finish_reason == "cancelled":
            kept = "what was said is kept" if end.text else "nothing was said yet"
            self._arm(f"stopped; {kept}. Ctrl-C once more leaves")
        elif end.finish_reason == "length" and used >= self.session.context:
            self.screen.problem(f"the context is full: {used:,} of {self.session.context:,} tokens; {MAKE_ROOM}")
        elif end.finish_reason == "length":
            tokens = end.usage.completion_tokens
            self.screen.note(f"cut after {count(tokens, 'token')}; /set max_new_tokens {2 * tokens} allows more")
        if self.stats:
            self.screen.note(stats_line(end, self.session.context))


def _check_found(found: Found) -> None:
    """Nothing is sent where a path leads nowhere: the model would talk about a picture that it never saw."""
    if not found.missing:
        return
    name = clean_line(found.missing[0])
    if name.lower().startswith(("http://", "https://")):
        raise UsageError(f"{name} was not fetched", "download the picture and give its path; nothing was sent")
    raise UsageError(
        f"there is no picture {name}", 'check the path, or put the text in """ to speak about it; nothing was sent'
    )
