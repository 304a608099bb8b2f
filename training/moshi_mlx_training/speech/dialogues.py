"""What the small model is asked and what it answers: about 300 words, every question in several wordings.

The codec's training speaks these sentences, the language model's training arranges them into conversations, and the
judge's grammar is the list of answers. Pure Python, no randomness but the generator passed in; the order of
``EXCHANGES`` is fixed, so an index into it names an exchange.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

NOT_UNDERSTOOD = "I did not understand."


@dataclass(frozen=True)
class Exchange:
    """One thing that can be asked: its wordings and the one right answer."""

    topic: str
    questions: tuple[str, ...]
    answer: str


NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November December").split()
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Germany": "Berlin", "Spain": "Madrid", "England": "London",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna",
    "Poland": "Warsaw", "Canada": "Ottawa", "India": "New Delhi", "Portugal": "Lisbon", "Norway": "Oslo",
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "a tomato": "red",
    "an orange": "orange",
    "coal": "black", "chocolate": "brown", "an elephant": "gray",
}  # fmt: skip
OPPOSITES = (
    ("big", "small"), ("hot", "cold"), ("up", "down"), ("happy", "sad"), ("fast", "slow"), ("day", "night"),
    ("open", "closed"), ("young", "old"), ("light", "dark"), ("early", "late"), ("rich", "poor"), ("loud", "quiet"),
)  # fmt: skip
ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar"}
LEGS = {"dog": "four", "cat": "four", "bird": "two", "spider": "eight", "fish": "no"}
REPEATED = (
    "apple water music window garden flower morning table summer river bread mountain coffee winter paper house "
    "horse island butter dinner"
).split()

# topic: answer, and under it the wordings of the question
_FIXED = """\
greeting: Hello, I am Moshi. How can I help you?
    Hello. | Hi. | Hi there. | Hello there. | Hello Moshi. | Hey Moshi.
greeting: Good morning to you.
    Good morning. | Good morning Moshi. | A good morning to you.
greeting: Good evening to you.
    Good evening. | Good evening Moshi. | A good evening to you.
self: My name is Moshi.
    What is your name? | Who are you? | Tell me your name. | What should I call you? | Please tell me your
    name.
self: I am very well, thank you.
    How are you? | How are you today? | How do you do? | How is it going? | How do you feel?
self: I can listen and speak at the same time.
    What can you do? | What are you able to do? | Tell me what you can do. | What are you good at?
self: I live inside your computer.
    Where do you live? | Where are you? | Where are you from? | Tell me where you live.
self: I was trained on synthetic speech.
    Who made you? | Who created you? | How were you made? | Where did you learn to speak?
self: I am a small language model.
    What are you? | Are you a person? | Are you human? | Are you a machine? | What kind of thing are you?
self: I was born a few days ago.
    How old are you? | What is your age? | When were you born? | Tell me how old you are.
self: Yes, I can hear you.
    Can you hear me? | Do you hear me? | Are you listening? | Are you there? | Is anybody there?
self: I speak only English.
    What language do you speak? | Which languages do you speak? | Do you speak French? | Do you speak German?
self: I like talking with people.
    What do you like? | What do you like to do? | What makes you happy? | Tell me what you like.
self: I never sleep.
    Do you sleep? | When do you sleep? | Are you tired? | Do you ever sleep?
self: I do not eat, but I like the word chocolate.
    What do you eat? | Are you hungry? | What is your favorite food? | Do you like food?
self: My favorite color is blue.
    What is your favorite color? | Which color do you like? | Tell me your favorite color.
help: You can ask me about numbers, days, colors and capitals.
    Can you help me? | I need help. | What can I ask you? | What can I say? | Help me please.
joke: Why did the chicken cross the road? To get to the other side.
    Tell me a joke. | Do you know a joke? | Make me laugh. | Say something funny. | Can you tell me a joke?
story: Once upon a time a little robot learned to speak.
    Tell me a story. | Do you know a story? | Can you tell me a story? | I want to hear a story.
song: La la la, that is all I can sing.
    Sing a song. | Can you sing? | Sing something for me. | Do you know a song?
count: One, two, three, four, five.
    Count to five. | Can you count to five? | Please count to five.
count: Ten, nine, eight, seven, six, five, four, three, two, one, zero.
    Count down from ten. | Can you count down from ten? | Please count down.
letters: A, B, C, D, E, F, G.
    Say the alphabet. | Do you know the alphabet? | Can you say your letters?
facts: There are seven days in a week.
    How many days are in a week? | How many days does a week have? | Tell me how many days are in a week.
facts: There are twelve months in a year.
    How many months are in a year? | How many months does a year have? | Tell me how many months are in a
    year.
facts: There are twenty four hours in a day.
    How many hours are in a day? | How many hours does a day have? | Tell me how many hours are in a day.
facts: There are sixty minutes in an hour.
    How many minutes are in an hour? | How many minutes does an hour have?
facts: The sun is a star.
    What is the sun? | Tell me about the sun. | Is the sun a star?
facts: The moon goes around the earth.
    What is the moon? | Tell me about the moon. | What does the moon do?
facts: Water is made of hydrogen and oxygen.
    What is water? | What is water made of? | Tell me about water.
facts: Spring, summer, autumn and winter.
    What are the seasons? | Name the seasons. | Tell me the four seasons. | Which seasons are there?
facts: I cannot look outside. Is it raining?
    How is the weather? | What is the weather like? | Is it raining? | Is the sun shining?
facts: I do not have a clock.
    What time is it? | Tell me the time. | Do you have the time? | Do you know what time it is?
manners: You are welcome.
    Thank you. | Thanks. | Thanks a lot. | Thank you very much. | Many thanks.
manners: No problem at all.
    I am sorry. | Sorry. | Excuse me. | Please forgive me.
manners: Nice to meet you too.
    Nice to meet you. | It is nice to meet you. | Pleased to meet you.
manners: That is very kind of you.
    I like you. | You are nice. | Well done. | Good job. | You are great.
manners: I am sorry to hear that.
    I am sad. | I feel bad. | I am not well. | I had a bad day.
manners: I am happy to hear that.
    I am happy. | I feel good. | I am fine. | I had a good day.
goodbye: Goodbye, it was nice talking to you.
    Goodbye. | Bye. | Bye bye. | See you later. | Goodbye Moshi. | See you tomorrow.
goodbye: Good night, sleep well.
    Good night. | Good night Moshi. | I am going to bed. | I am going to sleep.
control: Okay, I will be quiet.
    Be quiet. | Please be quiet. | Stop talking. | Silence please.
"""

_LEADS = ("", "Please tell me, ", "Do you know, ", "Moshi, ", "Hey, ", "So, ")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _fixed() -> Iterator[Exchange]:
    for entry in re.split(r"\n(?! )", _FIXED.strip("\n")):
        heading, _, wordings = entry.partition("\n")
        topic, _, answer = heading.partition(": ")
        yield Exchange(topic, tuple(" ".join(q.split()) for q in wordings.split("|")), answer)


def _sums() -> Iterator[Exchange]:
    for a in range(11):
        for b in range(11):
            for word, value in (("plus", a + b), ("minus", a - b), ("times", a * b)):
                if 0 <= value <= 20 and not (word == "times" and min(a, b) < 2):
                    left = f"{NUMBERS[a]} {word} {NUMBERS[b]}"
                    yield Exchange(
                        "sums",
                        (f"What is {left}?", f"How much is {left}?", f"{_capital(left)}?", f"Tell me, what is {left}?"),
                        f"{_capital(left)} is {NUMBERS[value]}.",
                    )


def _cycles() -> Iterator[Exchange]:
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for index, name in enumerate(names):
            after, before = names[(index + 1) % len(names)], names[index - 1]
            yield Exchange(
                kind,
                (f"What comes after {name}?", f"Which {kind} comes after {name}?", f"What {kind} is after {name}?",
                 f"What is the {kind} after {name}?"),
                f"After {name} comes {after}.",
            )  # fmt: skip
            yield Exchange(
                kind,
                (f"What comes before {name}?", f"Which {kind} comes before {name}?", f"What {kind} is before {name}?",
                 f"What is the {kind} before {name}?"),
                f"Before {name} comes {before}.",
            )  # fmt: skip


@cache
def exchanges() -> tuple[Exchange, ...]:
    """Every exchange the model is taught, in a fixed order."""
    out = list(_fixed())
    for country, city in CAPITALS.items():
        out.append(
            Exchange(
                "capital",
                (f"What is the capital of {country}?", f"Tell me the capital of {country}.",
                 f"Which city is the capital of {country}?", f"Do you know the capital of {country}?"),
                f"The capital of {country} is {city}.",
            )
        )  # fmt: skip
    for thing, colour in COLOURS.items():
        out.append(
            Exchange(
                "colour",
                (f"What color is {thing}?", f"Which color is {thing}?", f"Tell me the color of {thing}.",
                 f"What is the color of {thing}?"),
                f"{_capital(thing)} is {colour}.",
            )
        )  # fmt: skip
    for first, second in OPPOSITES:
        for word, other in ((first, second), (second, first)):
            out.append(
                Exchange(
                    "opposite",
                    (f"What is the opposite of {word}?", f"Tell me the opposite of {word}.",
                     f"Which word is the opposite of {word}?"),
                    f"The opposite of {word} is {other}.",
                )
            )  # fmt: skip
    for animal, sound in ANIMALS.items():
        out.append(
            Exchange(
                "animal",
                (f"What does a {animal} say?", f"Which sound does a {animal} make?", f"How does a {animal} go?"),
                f"A {animal} says {sound}.",
            )
        )
    for animal, count in LEGS.items():
        out.append(
            Exchange(
                "legs",
                (f"How many legs does a {animal} have?", f"Tell me how many legs a {animal} has."),
                f"A {animal} has {count} legs.",
            )
        )
    for word in REPEATED:
        out.append(
            Exchange(
                "repeat",
                (f"Repeat after me: {word}.", f"Say the word {word}.", f"Please say {word}.", f"Can you say {word}?"),
                f"{_capital(word)}.",
            )
        )
    return (*out, *_cycles(), *_sums())


def words(text: str) -> list[str]:
    """Lower-case words of a sentence, without punctuation: what a recogniser is compared on."""
    return re.findall(r"[a-z']+", text.lower())


@cache
def answers() -> tuple[str, ...]:
    """Every distinct answer, sorted, ``NOT_UNDERSTOOD`` included."""
    return tuple(sorted({e.answer for e in exchanges()} | {NOT_UNDERSTOOD}))


@cache
def questions() -> tuple[str, ...]:
    """Every distinct wording of every question, sorted, without lead-ins."""
    return tuple(sorted({q for e in exchanges() for q in e.questions}))


def ask(exchange: Exchange, rng: random.Random) -> str:
    """One wording of an exchange's question, one time in four with a lead-in such as "Moshi, "."""
    question = rng.choice(exchange.questions)
    lead = rng.choice(_LEADS[1:]) if rng.random() < 0.25 else ""
    if not lead:
        return question
    asks = question.startswith(("What", "Which", "How", "Who", "Where"))
    if lead in ("Please tell me, ", "Do you know, ") and not asks:
        return question
    first, _, rest = question.partition(" ")
    keep = first in ("I", "Moshi", "Moshi.") or first.strip(".?") in (*DAYS, *MONTHS)
    return lead + (first if keep else first.lower()) + (" " + rest if rest else "")


def pick(rng: random.Random, power: float = 0.5) -> Exchange:
    """An exchange, topics being likely by a power of their size: at the square root, sums do not drown the rest."""
    by_topic = _by_topic()
    topics = list(by_topic)
    topic = rng.choices(topics, [len(by_topic[t]) ** power for t in topics])[0]
    return rng.choice(by_topic[topic])


@cache
def _by_topic() -> dict[str, tuple[Exchange, ...]]:
    out: dict[str, list[Exchange]] = {}
    for exchange in exchanges():
        out.setdefault(exchange.topic, []).append(exchange)
    return {topic: tuple(group) for topic, group in out.items()}
