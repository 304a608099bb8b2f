"""Other words for the same questions: frames around what is asked, contractions, politeness, fillers, false starts.

The questions and answers are those of `dialogues`; this module knows many more ways to ask. Every exchange has a few
*seeds*, by kind, and every kind has *frames*: from the seed "np: the capital of France" come "What is the capital of
France?", "Can you tell me what the capital of France is?" and so on.

What is held out is held out by rule: a wording that matches one of ``HELD_OUT`` is never taught, whatever it asks for
and wherever it comes from. So "Name the capital of Italy." is judged, and nothing that begins with "Name" was heard.

Pure Python, no randomness but the generator passed in.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache

from moshi_mlx_training.speech import dialogues, sentences
from moshi_mlx_training.speech.dialogues import Exchange, words

# Patterns of which training has no example, on `normal` text.
HELD_OUT = (
    r"^name ", r"\bnoise\b", r"\b(i'd|i would) like\b", r"\bi wonder\b", r"^any idea\b", r"\bwould you\b",
    r"^what would\b", r"\bhow about you\b", r"\bwhy don't you\b", r"\bjust want to say\b", r"\blet me say\b",
    r"^well then\b", r"\bmy friend\b", r"^listen\b", r"\band also\b",
)  # fmt: skip

# What is asked for, by kind:
#   np     a thing, asked for with "what is"; nps the same in the plural
#   wh     a question that begins with its question word / the same inside a sentence
#   yn     a question to say yes or no to / the same inside a sentence
#   vp     something to do
#   about  something to tell about
#   say    a sentence that is no question
_FRAMES = {
    "np": """What is {0}? | Tell me {0}. | Please tell me {0}. | Can you tell me {0}? | Could you tell me {0}? |
        Do you know {0}? | Give me {0}. | {0}? | What about {0}? | I need {0}. | Tell me what {0} is. |
        Can you tell me what {0} is? | Could you tell me what {0} is? | Do you know what {0} is? | Say what {0} is. |
        Name {0}. | I would like to know {0}. | I would like to know what {0} is. | I wonder what {0} is. |
        Any idea what {0} is? | Would you tell me {0}? | What would {0} be?""",
    "nps": """What are {0}? | Tell me {0}. | Please tell me {0}. | Can you tell me {0}? | Could you tell me {0}? |
        Do you know {0}? | Give me {0}. | {0}? | What about {0}? | Tell me what {0} are. |
        Can you tell me what {0} are? |
        Name {0}. | I would like to know {0}. | I wonder what {0} are. | Any idea what {0} are? |
        Would you tell me {0}?""",
    "wh": """{0}? | Tell me, {0}? | Please tell me, {0}? | Tell me {1}. | Please tell me {1}. | Can you tell me {1}? |
        Could you tell me {1}? | Do you know {1}? |
        I would like to know {1}. | I wonder {1}. | Any idea {1}? | Would you tell me {1}?""",
    "yn": """{0}? | Tell me, {0}? | Please tell me, {0}? | Tell me if {1}. | Please tell me if {1}. |
        Can you tell me if {1}? | Could you tell me if {1}? |
        I would like to know if {1}. | I wonder if {1}. | Any idea if {1}? | Would you tell me if {1}?""",
    "vp": """{0}. | Please {0}. | {0}, please. | Can you {0}? | Could you {0}? | Can you please {0}? |
        Could you please {0}? | Will you {0}? | Now {0}. | Just {0}. | Go ahead and {0}. | I want you to {0}. |
        I would like you to {0}. | Would you {0}? | How about you {0}? | Why don't you {0}?""",
    "about": """Tell me about {0}. | Tell me something about {0}. | Please tell me about {0}. |
        Can you tell me about {0}? | Could you tell me about {0}? | What do you know about {0}? |
        What can you tell me about {0}? |
        I would like to know about {0}. | Would you tell me about {0}?""",
    "say": """{0}. | Moshi, {0}. | {0}, Moshi. | Oh, {0}. | Well, {0}. | Hey, {0}. | Okay, {0}. |
        I just want to say, {0}. | Let me say, {0}. | Well then, {0}. | {0}, my friend.""",
}  # fmt: skip

# answer: under it the seeds
_FIXED = """\
Hello, I am Moshi. How can I help you?
    say: hello | hi | hi there | hello there | hey there
Good morning to you.
    say: good morning | a good morning to you | good morning to you | a very good morning
Good evening to you.
    say: good evening | a good evening to you | good evening to you | a very good evening
My name is Moshi.
    np: your name
    wh: who are you / who you are | what are you called / what you are called
    wh: what do people call you / what people call you | what should I call you / what I should call you
I am very well, thank you.
    wh: how are you / how you are | how are you today / how you are today | how are you doing / how you are doing
    wh: how do you feel / how you feel | how is it going / how it is going
I can listen and speak at the same time.
    wh: what can you do / what you can do | what are you able to do / what you are able to do
    wh: what are you good at / what you are good at | what do you do / what you do
I live inside your computer.
    wh: where do you live / where you live | where are you / where you are | where are you from / where you are from
    wh: where is your home / where your home is
I was trained on synthetic speech.
    wh: who made you / who made you | who created you / who created you | how were you made / how you were made
    wh: where did you learn to speak / where you learned to speak
    wh: how did you learn to speak / how you learned to speak
I am a small language model.
    wh: what are you / what you are | what kind of thing are you / what kind of thing you are
    yn: are you a person / you are a person | are you human / you are human | are you a machine / you are a machine
    yn: are you a robot / you are a robot
I was born a few days ago.
    np: your age
    wh: how old are you / how old you are | when were you born / when you were born
Yes, I can hear you.
    yn: can you hear me / you can hear me | do you hear me / you hear me | are you listening / you are listening
    yn: are you there / you are there | is anybody there / anybody is there
I speak only English.
    wh: what language do you speak / what language you speak | which languages do you speak / which languages you speak
    yn: do you speak French / you speak French | do you speak German / you speak German
I like talking with people.
    wh: what do you like / what you like | what do you like to do / what you like to do
    wh: what makes you happy / what makes you happy
I never sleep.
    yn: do you sleep / you sleep | do you ever sleep / you ever sleep | are you tired / you are tired
    wh: when do you sleep / when you sleep
I do not eat, but I like the word chocolate.
    np: your favorite food
    wh: what do you eat / what you eat
    yn: are you hungry / you are hungry | do you like food / you like food
My favorite color is blue.
    np: your favorite color
    wh: which color do you like / which color you like | what color do you like / what color you like
You can ask me about numbers, days, colors and capitals.
    vp: help me
    yn: can you help me / you can help me
    wh: what can I ask you / what I can ask you | what can I say / what I can say
    say: I need help | I need some help
Why did the chicken cross the road? To get to the other side.
    vp: tell me a joke | make me laugh | say something funny
    yn: do you know a joke / you know a joke
Once upon a time a little robot learned to speak.
    vp: tell me a story
    yn: do you know a story / you know a story
    say: I want to hear a story
La la la, that is all I can sing.
    vp: sing | sing a song | sing something for me | sing me a song
    yn: do you know a song / you know a song
One, two, three, four, five.
    vp: count to five | count up to five | count from one to five
Ten, nine, eight, seven, six, five, four, three, two, one, zero.
    vp: count down from ten | count down | count backwards from ten
A, B, C, D, E, F, G.
    vp: say the alphabet | say your letters | say the letters of the alphabet
    yn: do you know the alphabet / you know the alphabet
There are seven days in a week.
    np: the number of days in a week
    wh: how many days are in a week / how many days are in a week
    wh: how many days does a week have / how many days a week has
    wh: how many days are there in a week / how many days there are in a week
There are twelve months in a year.
    np: the number of months in a year
    wh: how many months are in a year / how many months are in a year
    wh: how many months does a year have / how many months a year has
    wh: how many months are there in a year / how many months there are in a year
There are twenty four hours in a day.
    np: the number of hours in a day
    wh: how many hours are in a day / how many hours are in a day
    wh: how many hours does a day have / how many hours a day has
    wh: how many hours are there in a day / how many hours there are in a day
There are sixty minutes in an hour.
    np: the number of minutes in an hour
    wh: how many minutes are in an hour / how many minutes are in an hour
    wh: how many minutes does an hour have / how many minutes an hour has
    wh: how many minutes are there in an hour / how many minutes there are in an hour
The sun is a star.
    about: the sun
    wh: what is the sun / what the sun is
    yn: is the sun a star / the sun is a star
The moon goes around the earth.
    about: the moon
    wh: what is the moon / what the moon is | what does the moon do / what the moon does
Water is made of hydrogen and oxygen.
    about: water
    wh: what is water / what water is | what is water made of / what water is made of
Spring, summer, autumn and winter.
    nps: the seasons | the four seasons
    wh: which seasons are there / which seasons there are
I cannot look outside. Is it raining?
    np: the weather
    wh: how is the weather / how the weather is | what is the weather like / what the weather is like
    yn: is it raining / it is raining | is the sun shining / the sun is shining
I do not have a clock.
    np: the time
    wh: what time is it / what time it is
You are welcome.
    say: thank you | thanks | thanks a lot | thank you very much | many thanks | thank you so much
No problem at all.
    say: I am sorry | sorry | excuse me | please forgive me | I am so sorry | I am very sorry
Nice to meet you too.
    say: nice to meet you | it is nice to meet you | pleased to meet you | good to meet you
That is very kind of you.
    say: I like you | you are nice | well done | good job | you are great | you are very kind
I am sorry to hear that.
    say: I am sad | I feel bad | I am not well | I had a bad day | I feel sad | I am not happy
I am happy to hear that.
    say: I am happy | I feel good | I am fine | I had a good day | I feel great | I am very happy
Goodbye, it was nice talking to you.
    say: goodbye | bye | bye bye | see you later | see you tomorrow | see you soon
Good night, sleep well.
    say: good night | I am going to bed | I am going to sleep | have a good night
Okay, I will be quiet.
    vp: be quiet | stop talking | stop
    say: silence please | quiet please
"""

_CONTRACTED = tuple(
    (re.compile(pattern), short)
    for pattern, short in (
        (r"\b([Ww]hat|[Ww]ho|[Ww]here|[Hh]ow) is(?= \w)", r"\1's"),
        (r"\b([Ii]t|[Tt]hat) is(?= \w)", r"\1's"),
        (r"\bI am(?= \w)", "I'm"),
        (r"\bI would(?= \w)", "I'd"),
        (r"(^|\bif )([Yy]ou) are(?= \w)", r"\1\2're"),
    )
)
_LEADS = (
    "Moshi | Hey | Hey Moshi | Hello Moshi | So | Well | Okay | Oh | Excuse me | Um | Uh | Listen | Well then".split(
        " | "
    )
)
_FILLERS = ("um", "uh", "er")
_JOINTS = ("? And {0}?", ", and {0}?", "? {1}?", ", and then {0}?", ", and also {0}?")
_REGULAR = 0.5  # share of wordings that ask plainly
_SHORT = 0.5  # of those with a long and a short form, at least so many are short
_LED, _POLITE, _FILLED, _STARTED = 0.2, 0.08, 0.12, 0.08  # of taught wordings

# Names like those that are taught, for questions that are not: those that may be heard in training, and those held out.
_COUNTRIES = (
    "Brazil Mexico Turkey Sweden Cuba Ireland Denmark Peru Kenya Vietnam".split(),
    "Finland Chile Iran Hungary Morocco Nepal".split(),
)
_THINGS = (
    "a lemon,the sea,blood,a pig,milk,a carrot,gold,my car".split(","),
    "a rose,the moon,sand,a frog,my shirt".split(","),
)
_WORDS = ("wet hard clean tall strong empty cheap thin".split(), "dry soft short full heavy".split())
_ANIMALS = ("horse pig goat bear frog bee snake".split(), "wolf mouse hen owl".split())
_COUNTED = (
    "wheels does a car have,strings does a guitar have,people live here,teeth do I have,planets are there".split(","),
    "wings does a fly have,keys does a piano have,stars are there".split(","),
)
_BIG = ("thirty forty fifty sixty seventy eighty ninety".split(), ("a hundred", "a thousand"))
# Sentences about something else; training has every second noun, and no sentence of the second kind.
_OTHERS = tuple(
    " ".join(forms.split()).split(" | ")
    for forms in (
        """Where is my {noun}? | Who took the {noun}? | Can I have a {noun}? | Do you have a {noun}? |
        How big is a {noun}? | What is a {noun}? | Is that your {noun}? | Turn on the {noun}. | Call my {noun}. |
        Show me the {noun}. | I went to the {noun}. | I lost my {noun}. | My {noun} is broken. | {noun}. |
        There is a {noun} in here. | Play the {noun}. | The {noun} is over there. | It was about the {noun}. |
        What do you think of the {noun}? | Say the word {noun}. | Tell me about the {noun}. |
        What happened to the {noun}?""",
        """Why is the {noun} so old? | Why did you buy a {noun}? | When did the {noun} come? |
        How far is it to the {noun}? | Let us go to the {noun}. | Should I take the {noun}? |
        Somebody left a {noun} here.""",
    )
)


def normal(text: str) -> str:
    """The form in which wordings are compared."""
    return " ".join(words(text))


def pattern(text: str) -> str | None:
    """The first of ``HELD_OUT`` that a wording matches; such wordings are never taught."""
    spoken = normal(text)
    return next((one for one in HELD_OUT if re.search(one, spoken)), None)


def held_out(text: str) -> bool:
    """Whether a wording is never taught."""
    return pattern(text) is not None


def contracted(text: str) -> str:
    """The text with "what's", "I'm" and so on, where people say so."""
    for pattern, short in _CONTRACTED:
        text = pattern.sub(short, text)
    return text


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _lower(text: str) -> str:
    """The text as it stands inside a sentence."""
    first = text.split()[0].strip(",.?").removesuffix("'s")
    proper = first in ("I", "I'm", "I'd", "Moshi") or first in (*dialogues.DAYS, *dialogues.MONTHS, *dialogues.CAPITALS)
    return text if proper else text[0].lower() + text[1:]


def _framed(kind: str, seed: str) -> Iterator[str]:
    for frame in _FRAMES[kind].split("|"):
        yield _capital(" ".join(frame.split()).format(*re.split(" / ", seed)))


@cache
def _seeds() -> dict[str, list[tuple[str, str]]]:
    """(kind, seed) by answer."""
    out: dict[str, list[tuple[str, str]]] = {}
    for line in _FIXED.splitlines():
        if not line.startswith(" "):
            found = out.setdefault(line, [])
            continue
        kind, _, seeds = line.strip().partition(": ")
        found += [(kind, seed) for seed in seeds.split(" | ")]
    for country, city in dialogues.CAPITALS.items():
        out[f"The capital of {country} is {city}."] = [
            ("np", f"the capital of {country}"), ("np", f"{country}'s capital"),
            ("wh", f"which city is the capital of {country} / which city is the capital of {country}"),
            ("wh", f"what city is the capital of {country} / what city is the capital of {country}"),
        ]  # fmt: skip
    for thing, colour in dialogues.COLOURS.items():
        out[f"{_capital(thing)} is {colour}."] = [
            ("np", f"the color of {thing}"),
            ("wh", f"what color is {thing} / what color {thing} is"),
            ("wh", f"which color is {thing} / which color {thing} is"),
            ("wh", f"what color does {thing} have / what color {thing} has"),
        ]  # fmt: skip
    for first, second in dialogues.OPPOSITES:
        for word, other in ((first, second), (second, first)):
            out[f"The opposite of {word} is {other}."] = [
                ("np", f"the opposite of {word}"),
                ("wh", f"which word is the opposite of {word} / which word is the opposite of {word}"),
                ("wh", f"what word means the opposite of {word} / what word means the opposite of {word}"),
            ]  # fmt: skip
    for animal, sound in dialogues.ANIMALS.items():
        out[f"A {animal} says {sound}."] = [
            ("np", f"the sound of a {animal}"),
            ("wh", f"what does a {animal} say / what a {animal} says"),
            ("wh", f"how does a {animal} go / how a {animal} goes"),
            *(("wh", f"{which} does a {animal} make / {which} a {animal} makes")
              for which in ("what sound", "which sound", "what noise", "which noise")),
        ]  # fmt: skip
    for animal, count in dialogues.LEGS.items():
        out[f"A {animal} has {count} legs."] = [
            ("np", f"the number of legs of a {animal}"),
            ("wh", f"how many legs does a {animal} have / how many legs a {animal} has"),
            ("wh", f"how many legs has a {animal} got / how many legs a {animal} has got"),
            ("vp", f"count the legs of a {animal}"),
        ]
    for word in dialogues.REPEATED:
        out[f"{_capital(word)}."] = [
            ("vp", f"{how} {word}") for how in ("say", "say the word", "repeat", "repeat the word", "repeat after me,")
        ]
    for kind, names in (("day", dialogues.DAYS), ("month", dialogues.MONTHS)):
        for index, name in enumerate(names):
            for where, other in (("after", names[(index + 1) % len(names)]), ("before", names[index - 1])):
                asked = (f"what comes {where} {name}", f"which {kind} comes {where} {name}",
                         f"what {kind} is {where} {name}", f"what {kind} comes right {where} {name}")  # fmt: skip
                out[f"{_capital(where)} {name} comes {other}."] = [
                    ("np", f"the {kind} {where} {name}"), *(("wh", f"{question} / {question}") for question in asked),
                ]  # fmt: skip
    for exchange in dialogues.exchanges():
        if exchange.topic == "sums":
            a, operation, b, *_ = words(exchange.answer)
            left = [f"{a} {operation} {b}"]
            left += {"plus": [f"{a} and {b}"], "minus": [f"{a} take away {b}"], "times": [f"{a} multiplied by {b}"]}[
                operation
            ]
            out[exchange.answer] = [("np", one) for one in left]
            out[exchange.answer] += [("wh", f"how much is {one} / how much {one} is") for one in left]
    return out


@cache
def _wordings(exchange: Exchange) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, list[str]]]:
    """Taught wordings, those of them that ask plainly, and those that are held out, by pattern; in a fixed order."""
    plain = list(exchange.questions)
    found: dict[str, str] = {}
    for kind, seed in _seeds()[exchange.answer]:
        framed = list(_framed(kind, seed))
        plain.append(framed[0])
        for text in framed:
            for one in (text, contracted(text)):
                found.setdefault(normal(one), one)
    for text in exchange.questions:
        for one in (text, contracted(text)):
            found.setdefault(normal(one), one)
    held: dict[str, list[str]] = {}
    taught: list[str] = []
    for text in found.values():
        matched = pattern(text)
        (taught if matched is None else held.setdefault(matched, [])).append(text)
    plainly = {normal(one) for text in plain for one in (text, contracted(text))}
    return tuple(taught), tuple(text for text in taught if normal(text) in plainly), held


def wordings(exchange: Exchange) -> tuple[str, ...]:
    """All wordings of an exchange that may be taught, those of `dialogues` among them."""
    return _wordings(exchange)[0]


def held_out_wordings(exchange: Exchange) -> tuple[str, ...]:
    """All its wordings that are never taught."""
    return tuple(text for group in _wordings(exchange)[2].values() for text in group)


@cache
def _complete() -> frozenset[str]:
    return frozenset(normal(text) for e in dialogues.exchanges() for text in (*wordings(e), *held_out_wordings(e)))


@cache
def all_words() -> tuple[str, ...]:
    """Every word that a taught wording may have, sorted."""
    taught = {word for e in dialogues.exchanges() for text in wordings(e) for word in words(text)}
    return tuple(
        sorted(taught | {word for lead in _LEADS if not held_out(lead) for word in words(lead)} | set(_FILLERS))
    )


def _spoken(text: str, social: bool, rng: random.Random) -> str:
    """A taught wording as it may come out of a mouth: called to, politely, with a filler or begun twice."""
    if not social and rng.random() < _LED:
        text = rng.choice([lead for lead in _LEADS if not held_out(lead)]) + ", " + _lower(text)
    if not social and rng.random() < _POLITE and "lease" not in text:
        text = f"{text[:-1]}, please{text[-1]}"
    parts = text.split()
    if len(parts) >= 4 and rng.random() < _FILLED:
        at = rng.randrange(1, len(parts))
        before = parts[at - 1] if parts[at - 1].endswith(",") else parts[at - 1] + ","
        parts[at - 1 : at] = [before, rng.choice(_FILLERS) + ","]
    if len(parts) >= 5 and rng.random() < _STARTED:
        again = parts[: rng.randint(1, 3)]
        again[-1] = again[-1].rstrip(",:") + ","
        parts = [*again, *_lower(" ".join(parts)).split()]
    return " ".join(parts)


def ask(exchange: Exchange, rng: random.Random, held: bool = False) -> str:
    """One wording of an exchange, taught or held out.

    Half of those that are taught ask plainly ("What's the capital of France?"); of all some are led in by "Hey Moshi"
    and the like, end in "please", stop for an "um" or begin twice. Held-out ones stand as they are, every pattern that
    fits being as likely as another.
    """
    taught, plain, kept = _wordings(exchange)
    if held:
        return rng.choice(kept[rng.choice(list(kept))])
    text = rng.choice(plain if rng.random() < _REGULAR else taught)
    if rng.random() < _SHORT:
        text = contracted(text)
    social = exchange.topic in ("greeting", "manners", "goodbye")
    return _spoken(text, social, rng)


@cache
def _questions() -> tuple[tuple[int, tuple[str, ...]], ...]:
    """(exchange, its plain questions without their last mark) of those that two can be asked of at once."""
    out = []
    for index, exchange in enumerate(dialogues.exchanges()):
        asked = tuple(
            text[:-1] for text in _wordings(exchange)[1] if re.match(r"(What|Which|How|Who|Where)\b.*\?$", text)
        )
        if asked and len(words(exchange.answer)) <= 8:
            out.append((index, asked))
    return tuple(out)


def ask_two(rng: random.Random, held: bool = False) -> tuple[str, int, int]:
    """Two questions in one breath, and the indices of their exchanges; they are to be answered one after the other."""
    by_topic: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
    for one in _questions():
        by_topic.setdefault(dialogues.exchanges()[one[0]].topic, []).append(one)
    while True:
        (first, asked), (second, then) = (rng.choice(by_topic[rng.choice(list(by_topic))]) for _ in range(2))
        if first == second:
            continue
        joint = rng.choice([j for j in _JOINTS if held_out(j) == held])
        other = rng.choice(then)
        return rng.choice(asked) + joint.format(_lower(other), _capital(other)), first, second


def unknown(rng: random.Random, held: bool = False) -> str:
    """A sentence that is none of the questions: like one of them, unfinished, something else, or a strange sentence."""
    while True:
        text = _unknown(rng, held)
        if normal(text) not in _complete() and not held_out(text):
            return text


def _unknown(rng: random.Random, held: bool) -> str:
    kind = rng.random()
    if kind < 0.35:
        return _nearly(rng, held)
    if kind < 0.45 and not held:  # one of the questions, unfinished
        parts = rng.choice(wordings(dialogues.pick(rng))).split()
        return " ".join(parts[: rng.randint(2, max(2, len(parts) - 1))]).rstrip(",.?") + "."
    if kind < 0.8:
        form, noun = rng.choice(_OTHERS[held]), rng.choice(sentences.NOUNS[held::2])
        return _an(_capital(form.format(noun=noun)))
    return sentences.sentence(rng)


def _nearly(rng: random.Random, held: bool) -> str:
    """A question like those that are taught, about something that is not."""
    like = rng.randrange(7)
    if like == 0:
        kind, seed = "np", f"the capital of {rng.choice(_COUNTRIES[held])}"
    elif like == 1:
        thing = rng.choice(_THINGS[held])
        kind, seed = "wh", f"what color is {thing} / what color {thing} is"
    elif like == 2:
        kind, seed = "np", f"the opposite of {rng.choice(_WORDS[held])}"
    elif like == 3:
        animal = rng.choice(_ANIMALS[held])
        kind, seed = "wh", f"what does a {animal} say / what a {animal} says"
    elif like == 4:
        return f"How many {rng.choice(_COUNTED[held])}?"
    elif like == 5:
        one, other = rng.sample((rng.choice(_BIG[held]), rng.choice(dialogues.NUMBERS)), 2)
        kind, seed = "np", f"{one} {rng.choice(('plus', 'minus', 'times'))} {other}"
    else:
        noun = rng.choice([noun for noun in sentences.NOUNS[held::2] if not held_out(noun)])
        kind, seed = "vp", f"say the word {noun}"
    text = _an(rng.choice([text for text in _framed(kind, seed) if not held_out(text)]))
    return contracted(text) if rng.random() < 0.5 else text


def _an(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def pauses(text: str) -> tuple[int, ...]:
    """Words of a text before which a speaker may be silent for long: what came before asks for nothing yet.

    "What is the capital of" may be followed by any silence; "Okay, what is water" may not, whatever comes after.
    """
    parts = [normal(part) for part in text.split()]
    out = []
    for count in range(1, len(parts)):
        said = [part for part in parts[:count] if part not in _FILLERS]
        if not any(" ".join(said[begin:]) in _complete() for begin in range(len(said))):
            out.append(count)
    return tuple(out)
