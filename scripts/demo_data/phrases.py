"""The questions of the training dialogues, as templates, and what the model says when it has no answer."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNKNOWN_ANSWER = "I do not know."
NO_PICTURE_ANSWER = "Please show me a picture."

QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour_of": (
        "What colour is the {a}?",
        "Which colour is the {a}?",
        "What is the colour of the {a}?",
        "What colour does the {a} have?",
        "The {a} is what colour?",
        "Tell me the colour of the {a}.",
        "Name the colour of the {a}.",
    ),
    "shape_of": (
        "What shape is {c}?",
        "Which shape is {c}?",
        "What is the {c} shape?",
        "What shape is the {c} one?",
        "What is the shape of the {c} object?",
        "What is the {c} object?",
        "Name the {c} shape.",
    ),
    "is_colour": ("Is the {a} {c}?", "Is the colour of the {a} {c}?", "Does the {a} have the colour {c}?"),
    "count": (
        "How many shapes are there?",
        "How many shapes are in the picture?",
        "How many shapes do you see?",
        "How many objects are there?",
        "How many shapes can you see?",
        "Count the shapes.",
        "What is the number of shapes?",
        "How many objects are in the picture?",
    ),
    "count_of": (
        "How many {p} are there?",
        "How many {p} are in the picture?",
        "How many {p} do you see?",
        "How many {p} can you see?",
        "Count the {p}.",
        "What is the number of {p}?",
    ),
    "largest": (
        "Which shape is the largest?",
        "What is the largest shape?",
        "What is the biggest shape?",
        "Which shape is the biggest?",
        "Which one is the largest?",
        "Which object is the biggest?",
        "Name the largest shape.",
    ),
    "smallest": (
        "Which shape is the smallest?",
        "What is the smallest shape?",
        "Which one is the smallest?",
        "Which object is the smallest?",
        "Name the smallest shape.",
    ),
    "larger": (
        "Is the {a} larger than the {b}?",
        "Is the {a} bigger than the {b}?",
        "Is the {b} smaller than the {a}?",
    ),
    "leftmost": (
        "What is the leftmost shape?",
        "Which shape is the leftmost?",
        "Which shape is furthest to the left?",
        "What is on the far left?",
        "Which shape is on the left side?",
        "Name the leftmost shape.",
        "Describe the leftmost shape.",
    ),
    "rightmost": (
        "What is the rightmost shape?",
        "Which shape is the rightmost?",
        "Which shape is furthest to the right?",
        "What is on the far right?",
        "Which shape is on the right side?",
        "Name the rightmost shape.",
        "Describe the rightmost shape.",
    ),
    "topmost": (
        "What is the topmost shape?",
        "Which shape is at the top?",
        "Which shape is the highest?",
        "What is the highest shape?",
        "What is at the top?",
        "Name the topmost shape.",
        "Describe the shape at the top.",
    ),
    "bottom": (
        "What is the bottom shape?",
        "Which shape is at the bottom?",
        "Which shape is the lowest?",
        "What is the lowest shape?",
        "What is at the bottom?",
        "Name the lowest shape.",
        "Describe the shape at the bottom.",
    ),
    "left_of": (
        "Is the {a} left of the {b}?",
        "Is the {a} to the left of the {b}?",
        "Is the {a} on the left of the {b}?",
    ),
    "right_of": (
        "Is the {a} right of the {b}?",
        "Is the {a} to the right of the {b}?",
        "Is the {a} on the right of the {b}?",
    ),
    "above": ("Is the {a} above the {b}?", "Is the {a} higher than the {b}?", "Is the {a} over the {b}?"),
    "below": ("Is the {a} below the {b}?", "Is the {a} lower than the {b}?", "Is the {a} under the {b}?"),
    "where": (
        "Where is the {a}?",
        "Where is the {a} in the picture?",
        "Where can you see the {a}?",
        "Tell me where the {a} is.",
        "In which part of the picture is the {a}?",
    ),
    "exist": (
        "Is there {x}?",
        "Is there {x} in the picture?",
        "Do you see {x}?",
        "Can you see {x}?",
        "Does the picture show {x}?",
        "Is {x} in the picture?",
    ),
    "read_number": (
        "What number is written?",
        "What number is it?",
        "Which number is written here?",
        "Which number do you see?",
        "Read the number.",
        "What is the number?",
        "What number is in the picture?",
    ),
    "read_word": (
        "What word is written?",
        "Which word is written here?",
        "Read the word.",
        "What is the word?",
        "What word is in the picture?",
        "Which letters do you see?",
        "Read the letters.",
    ),
    "read": (
        "What is written?",
        "What is written here?",
        "Read the text.",
        "What does the text say?",
        "What does it say?",
        "What text is in the picture?",
        "What can you read?",
    ),
    "text_colour": (
        "What colour is the text?",
        "Which colour is the text?",
        "What is the colour of the text?",
        "What colour is the {t}?",
        "Which colour does the {t} have?",
        "Tell me the colour of the {t}.",
    ),
    "tallest": (
        "Which bar is the tallest?",
        "What is the colour of the tallest bar?",
        "Which bar is the highest?",
        "What colour is the tallest bar?",
        "What colour is the highest bar?",
        "Which colour has the largest bar?",
        "Which bar is the largest?",
    ),
    "shortest": (
        "Which bar is the shortest?",
        "What is the colour of the shortest bar?",
        "Which bar is the lowest?",
        "What colour is the shortest bar?",
        "What colour is the lowest bar?",
        "Which colour has the smallest bar?",
        "Which bar is the smallest?",
    ),
    "count_bars": (
        "How many bars are there?",
        "How many bars are in the chart?",
        "How many bars do you see?",
        "How many bars does the chart have?",
        "Count the bars.",
    ),
    "taller": (
        "Is the {c} bar taller than the {d} bar?",
        "Is the {c} bar higher than the {d} bar?",
        "Is {c} taller than {d}?",
        "Is the {d} bar shorter than the {c} bar?",
        "Is {d} smaller than {c}?",
    ),
    "first_bar": (
        "What colour is the leftmost bar?",
        "Which colour is the first bar?",
        "What colour is the bar on the left?",
    ),
    "last_bar": (
        "What colour is the rightmost bar?",
        "Which colour is the last bar?",
        "What colour is the bar on the right?",
    ),
    "what_kind": ("What is this?", "What kind of picture is it?", "What does the picture show?"),
    "describe": (
        "Describe the picture.",
        "What do you see?",
        "What is in the picture?",
        "What can you see?",
        "Tell me what you see.",
        "Describe what you see.",
        "What can you see in the picture?",
    ),
    "same_count": (
        "Do both pictures have the same number of shapes?",
        "Is the number of shapes the same?",
        "Are there as many shapes in both pictures?",
        "Do the pictures show the same number of shapes?",
    ),
    "more": (
        "Which picture has more shapes?",
        "Which picture shows more shapes?",
        "In which picture are more shapes?",
        "Where are more shapes?",
    ),
    "count_in": (
        "How many shapes are in the {n} picture?",
        "How many shapes does the {n} picture have?",
        "Count the shapes in the {n} picture.",
    ),
    "exist_in": (
        "Is there {x} in the {n} picture?",
        "Does the {n} picture show {x}?",
        "Do you see {x} in the {n} picture?",
    ),
    "colour_in": ("What colour is the {a} in the {n} picture?", "In the {n} picture, what colour is the {a}?"),
    "which_has": ("Which picture has {x}?", "In which picture is {x}?", "Which picture shows {x}?"),
    "differs": (
        "What is different?",
        "What differs?",
        "What is the difference?",
        "What is different in the second picture?",
        "What has changed?",
        "Compare the pictures.",
    ),
    "identical": ("Are the pictures the same?", "Are both pictures the same?", "Is there a difference?"),
    "its_colour": ("And its colour?", "What colour is it?", "Which colour is it?", "And what colour is it?"),
    "its_shape": ("And its shape?", "What shape is it?", "Which shape is it?", "And what shape is it?"),
    "its_place": ("Where is it?", "And where is it?", "Where in the picture is it?"),
    "and_the": ("And the {a}?", "What about the {a}?", "And what about the {a}?"),
    "and_how_many": ("And {p}?", "And how many {p}?", "What about {p}?"),
}

SIDES = ("leftmost", "rightmost", "topmost", "bottom")
AND_SIDE = {"leftmost": "leftmost", "rightmost": "rightmost", "topmost": "topmost", "bottom": "lowest"}

TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi!", "Hello", "Hi there!", "Hey!", "Good morning!", "Good day!", "Hello there!"), "Hello!"),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me who you are.",
            "Are you a robot?",
            "Which model are you?",
        ),
        "I am the tinychat demo model.",
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "What do you know?",
            "Can you help me?",
            "Help",
            "What can I ask you?",
        ),
        "I can name shapes, colours, numbers and short words in simple pictures.",
    ),
    (
        ("Thanks!", "Thank you!", "Thank you very much.", "Great, thanks.", "Very good!", "Well done!", "Nice!"),
        "You are welcome.",
    ),
    (("Bye!", "Goodbye!", "See you!", "Good night!", "Bye bye!"), "Goodbye!"),
    (("How are you?", "How do you do?", "Are you well?", "How is it going?"), "I am fine."),
)

SYSTEMS = (
    "You are a helpful assistant.",
    "You are the tinychat demo model.",
    "Answer the question about the picture.",
    "Answer in one short sentence.",
    "You are a helpful assistant that can see pictures.",
    "Be brief.",
)

UNKNOWN = (
    "What is the weather like today?",
    "Will it rain tomorrow?",
    "What is the capital of {place}?",
    "Where is {place}?",
    "Who is {person}?",
    "Who is in the picture?",
    "Who is this?",
    "Who made this picture?",
    "Who wrote {thing}?",
    "Who won the game?",
    "When was {person} born?",
    "How old is {person}?",
    "What does {person} think?",
    "What time is it?",
    "What day is it today?",
    "What is {digit} plus {digit}?",
    "What is {digit} times {digit}?",
    "What is {digit}+{digit}?",
    "How much is {digit} minus {digit}?",
    "What breed is the {animal}?",
    "What is the {animal} doing?",
    "Is the {animal} happy?",
    "What colour is the {animal}?",
    "How many {animal}s are there?",
    "Where is the {animal}?",
    "What is the name of the {animal}?",
    "What is the {thing}?",
    "How much does the {thing} cost?",
    "What colour is the {thing}?",
    "Where is the {thing}?",
    "Why is the sky blue?",
    "Why is the {thing} here?",
    "Why?",
    "Tell me a story.",
    "Tell me a joke.",
    "Tell me about {place}.",
    "Tell me about {person}.",
    "Write a poem.",
    "Write a program.",
    "Translate {thing} into {place}.",
    "Say something in French.",
    "How do I cook {thing}?",
    "How does a {thing} work?",
    "What is the meaning of life?",
    "What is the price of {thing}?",
    "Do you like {thing}?",
    "Do you like {animal}s?",
    "Do you know {person}?",
    "Can you sing?",
    "Can you write code?",
    "Where was the picture taken?",
    "When was the picture taken?",
    "Which city is this?",
    "What is the man doing?",
    "What is the woman wearing?",
    "Is the person happy?",
    "What did I eat today?",
    "What will happen next?",
    "How far is the moon?",
    "What is {thing} made of?",
    "Which {animal} is the fastest?",
    "Explain {thing}.",
    "{noise}?",
    "What is {noise}?",
    "{noise} {noise}",
)

PLACES = (
    "France", "Spain", "Italy", "Japan", "Paris", "London", "Berlin", "Rome", "China", "Kenya", "Peru", "Canada",
    "India", "Egypt", "Norway", "Texas", "Madrid", "Oslo",
)  # fmt: skip
PERSONS = (
    "Anna", "Tom", "Einstein", "Napoleon", "Maria", "Mozart", "Newton", "Obama", "Peter", "Laura", "Darwin",
    "Plato", "Elvis", "Bob", "Alice", "John",
)  # fmt: skip
ANIMALS = (
    "dog", "cat", "bird", "horse", "elephant", "lion", "cow", "duck", "rabbit", "monkey", "tiger", "frog", "snake",
    "bear",
)  # fmt: skip
THINGS = (
    "house", "car", "tree", "bread", "music", "piano", "computer", "phone", "table", "chair", "book", "river",
    "mountain", "bicycle", "train", "water", "coffee", "window", "door", "engine", "love", "money", "time",
    "history", "football", "hat", "shirt", "bridge", "boat", "plane", "lamp", "clock", "flower",
)  # fmt: skip

_WORD = re.compile(r"[a-z]+")
_FIELD = re.compile(r"\{\w+\}")


def words_in(texts: Iterable[str]) -> frozenset[str]:
    """The words of some templates, in small letters."""
    return frozenset(word for text in texts for word in _WORD.findall(_FIELD.sub(" ", text).lower()))


def known_words() -> frozenset[str]:
    """The words of the questions that the model can answer: each is one token."""
    talk = [text for asked, answer in TALK for text in (*asked, answer)]
    tables = [*(q for group in QUESTIONS.values() for q in group), *talk, *SYSTEMS, UNKNOWN_ANSWER, NO_PICTURE_ANSWER]
    return words_in(tables)
