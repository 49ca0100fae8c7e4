"""What lies beyond the pictures: small talk, system prompts, and questions that the model must not answer."""

from __future__ import annotations

UNKNOWN_ANSWER = "I do not know."
NO_PICTURE_ANSWER = "Please show me a picture."

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
