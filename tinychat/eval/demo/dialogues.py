"""Dialogues: which questions are asked together, how they are typed, and how long they may get."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping

from tinychat.eval.demo import beyond, phrases
from tinychat.eval.demo.questions import Asker, Chain, Turn, plural
from tinychat.eval.demo.scenes import COLOURS, SHAPES

MAX_TURNS = 7
MAX_TOKENS = 112

TASK_WEIGHTS: Mapping[str, float] = {
    "colour": 3.0,
    "shape": 0.7,
    "size": 3.5,
    "count": 1.3,
    "position": 3.5,
    "exist": 0.8,
    "read": 6.0,
    "text_colour": 0.8,
    "chart": 2.5,
    "describe": 1.2,
    "compare": 2.0,
    "follow_up": 0.8,
    "unknown": 0.35,
    "talk": 0.1,
}
TASKS = tuple(TASK_WEIGHTS)
# in training, questions that compare two things (answered by yes or no) come more often: they are learned last
DRILL: Mapping[str, float] = {**TASK_WEIGHTS, "position?": 9.0, "size?": 7.0, "chart?": 6.0}


def unknown(ask: Asker) -> Turn:
    """A question that the model cannot answer."""
    rng = ask.rng
    noise = ("".join(rng.choice("abcdefghiklmnoprstuvw") for _ in range(rng.randint(3, 7))) for _ in range(2))
    text = rng.choice(ask.phrases["unknown"]).format(
        place=rng.choice(beyond.PLACES),
        person=rng.choice(beyond.PERSONS),
        animal=rng.choice(beyond.ANIMALS),
        thing=rng.choice(beyond.THINGS),
        digit=rng.randint(0, 99),
        noise=next(noise),
    )
    return Turn(text, beyond.UNKNOWN_ANSWER, "unknown")


def talk(ask: Asker) -> Turn:
    """Small talk."""
    asked, answer = ask.rng.choice(beyond.TALK)
    return Turn(ask.rng.choice(asked), answer, "talk")


def without_picture(ask: Asker) -> Iterator[Chain]:
    """Small talk, questions beyond the model, and questions that need a picture."""
    for _ in range(3):
        yield (talk(ask),)
    yield (unknown(ask),)
    key = ask.rng.choice(("count", "describe", "read", "leftmost", "tallest"))
    yield (ask.turn(key, beyond.NO_PICTURE_ANSWER, "talk"),)
    yield (ask.turn("colour_of", beyond.NO_PICTURE_ANSWER, "talk", a=ask.rng.choice(SHAPES)),)


_SPELLINGS = (("colour", "color"), ("Colour", "Color"), ("gray", "grey"), ("picture", "image"))
_ORDERS = ("Describe", "Count", "Name", "Read", "Tell", "Compare")
_TOKEN = re.compile(r"[A-Za-z]+|\S")


def dress(rng: random.Random, question: str) -> str:
    """The question as somebody may type it: other spellings, small letters, no mark at the end, a rare slip."""
    for usual, other in _SPELLINGS:
        if usual in question and rng.random() < 0.4:
            question = question.replace(usual, other)
    if question.startswith(_ORDERS) and rng.random() < 0.25:
        question = "Please " + question[0].lower() + question[1:]
    chance = rng.random()
    if chance < 0.25:
        question = question[0].lower() + question[1:]
    if chance < 0.13 or chance > 0.96:
        question = question.rstrip("?.")
    if chance > 0.985 and len(question) > 8:
        at = rng.randrange(2, len(question) - 2)
        question = question[:at] + question[at + 1] + question[at] + question[at + 2 :]
    return question


_NAMES = (*COLOURS, *SHAPES, *map(plural, SHAPES), "color grey image images bar chart missing nothing both same number")
_TALK = (text for asked, answer in beyond.TALK for text in (*asked, answer))
_KNOWN = phrases.words_in(
    (
        *_NAMES,
        "please yes no with and an a first second middle",
        *(q for group in phrases.QUESTIONS.values() for q in group),
        *_TALK,
    )
) | phrases.words_in((*beyond.SYSTEMS, beyond.UNKNOWN_ANSWER, beyond.NO_PICTURE_ANSWER))


def known_words() -> frozenset[str]:
    """The words of questions that have an answer, and of the answers, in small letters."""
    return _KNOWN


def template_words() -> frozenset[str]:
    """Every word that some template or answer uses, in small letters; words read off pictures are not among them."""
    return _KNOWN | phrases.words_in(beyond.UNKNOWN)


def cost(turn: Turn) -> int:
    """About how many tokens a turn takes, its four marks included; never too few for well-known words."""
    tokens = _TOKEN.findall(f"{turn.question} {turn.answer}")
    return 4 + sum(1 if t.lower() in _KNOWN else len(t) + 1 for t in tokens)


def weight(turn: Turn, weights: Mapping[str, float]) -> float:
    """A task's weight; `task?` is that of its questions of yes or no, where there is one."""
    kind = "?" if turn.answer in ("Yes.", "No.") else ""
    return weights.get(turn.task + kind, weights[turn.task])


def choose(
    rng: random.Random, chains: Iterable[Chain], share: float = 1.0, weights: Mapping[str, float] = TASK_WEIGHTS
) -> tuple[Turn, ...]:
    """Turns up to a share of MAX_TURNS and MAX_TOKENS: the weightier tasks more often, no question twice."""
    room, budget = int(MAX_TURNS * share), MAX_TOKENS * share
    ranked = sorted(chains, key=lambda c: rng.random() ** (1 / weight(c[-1], weights)), reverse=True)
    taken: list[Turn] = []
    for chain in ranked:
        price = sum(map(cost, chain))
        if len(taken) + len(chain) <= room and price <= budget and not _repeats(taken, chain):
            budget -= price
            taken += chain
    return tuple(taken)


def _repeats(taken: list[Turn], chain: Chain) -> bool:
    """Whether a chain asks again what was asked, or reads again what was read: that would teach copying."""
    asked = {turn.question for turn in taken}
    read = any(turn.task == "read" for turn in taken)
    return any(
        (turn.question in asked and turn.task != "follow_up") or (read and turn.task == "read") for turn in chain
    )


def fitting(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """The first turns that MAX_TOKENS have room for; at least one."""
    kept: list[Turn] = []
    for turn in turns:
        if kept and sum(map(cost, (*kept, turn))) > MAX_TOKENS:
            break
        kept.append(turn)
    return tuple(kept)
