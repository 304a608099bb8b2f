"""Varied grammatical English, for speech that must contain every sound in every surrounding.

The codec must carry words that no dialogue contains, and the language model must learn to say that it did not
understand them. The words were chosen for their sounds, not their sense.
"""

from __future__ import annotations

import random

NOUNS = (
    "apple arrow artist autumn baker bandage barn basket beach beard bicycle blanket bottle boulder boy branch "
    "bridge brother bucket bullet bushel butcher button cabbage cage camera candle captain carpet castle "
    "ceiling chain chair cheese cherry child chimney church circus cloud coat cobra coin collar cottage "
    "courage cousin cradle crowd curtain cushion daughter desert diamond dinosaur doctor dolphin donkey door "
    "dragon drawer dream driver eagle earthquake elbow engine envelope eyebrow factory failure farmer father "
    "feather fence finger fireplace fisherman flag flute forest fountain fox freezer friend frog fuel fur "
    "galaxy garage garlic gate giant giraffe glove goat goose grandfather guitar hammer harbor hatchet hawk "
    "hedge hill hook hospital hotel hunter ice idea ink insect iron jacket jaguar jar jewel journey judge "
    "juice jungle kangaroo kettle keyboard king kitchen kite knife ladder lamp laundry lawyer leather lemon "
    "lesson letter library lighthouse lizard lobster luggage machine magnet mailbox map marble market measure "
    "medicine melody mirror monkey moth mouse mouth museum mushroom mustache nation needle neighbor nephew "
    "noise nurse oak ocean octopus office oil onion orchard oven owl oyster package palace parrot passenger "
    "path peach pebble pencil penguin pepper photograph piano picture pigeon pillow pilot pirate planet plow "
    "pocket poem poison policeman potato prince pumpkin puzzle queen quilt rabbit radio railway rainbow razor "
    "recipe refrigerator river robe rocket roof rose ruler sailor salad sandwich saucer scarf school scissors "
    "sculpture shadow sheep shelf ship shoe shoulder shower signal silver singer sister skeleton sled smoke "
    "snake soap soldier soup spider spoon square squirrel stable station statue stone storm stove strawberry "
    "student suitcase sugar sweater sword tailor teacher telephone television temple thief thimble thread "
    "throne thumb thunder tiger toast tooth torch tourist tower toy tractor treasure triangle truck trumpet "
    "tunnel turtle umbrella uncle uniform valley vase vegetable vehicle village vineyard violin vision visitor "
    "volcano voyage wagon waiter wall watch waterfall weather wheel whistle wife wizard wolf woman worm wrench "
    "yacht yard youth zebra zipper zoo"
).split()
_ADJECTIVES = (
    "ancient angry awful bitter blind blue brave bright broken calm careful charming cheap clever cloudy "
    "clumsy cold curious curved dangerous deep delicious dirty dusty eager early easy elegant empty enormous "
    "faint famous fearless fierce flat foolish fragile fresh friendly frozen funny gentle giant golden "
    "gorgeous grateful greedy green happy harsh heavy hollow honest hot huge humble hungry icy jealous joyful "
    "juicy kind large lazy little lonely loud loyal lucky lovely mild modern muddy mysterious narrow nervous "
    "noisy odd old orange ordinary pale patient perfect playful pleasant polite poor precious proud purple "
    "quick quiet rare rough round royal rude rusty sad sharp shiny shy silent silly simple sleepy slow small "
    "smooth soft sour spicy square strange strong stupid sudden sunny sweet tall tender thick thin thirsty "
    "tiny tired tough unusual useful usual vague vast warm weak wealthy weird wet wide wild wise wooden "
    "worried wrong yellow young"
).split()
_PAST = (
    "admired answered bought borrowed broke brought brushed built burned buried called carried caught changed "
    "chased checked chose cleaned climbed closed copied counted covered crushed dropped enjoyed examined "
    "explained fed fetched fixed followed forgot found gathered guarded heard helped hid ignored imagined "
    "invited joined judged kicked kissed knew lifted liked lost loved measured mentioned missed mixed moved "
    "needed noticed obeyed offered opened ordered painted passed photographed picked planned polished praised "
    "pulled pushed questioned reached recognized refused remembered repaired rescued returned saved saw "
    "searched served shared showed shut sketched sold stole studied surprised teased thanked threw tied "
    "touched trusted used visited wanted washed watched weighed welcomed wished wrapped"
).split()
# (he ..., they ...) in the present
_PAIRS = (
    "sings sing,works work,jumps jump,reads read,laughs laugh,coughs cough,thinks think,swims swim,"
    "rushes rush,lies lie,breathes breathe,judges judge,watches watch,teaches teach,yawns yawn,"
    "whispers whisper,argues argue,travels travel,vanishes vanish,enjoys enjoy,grows grow,hurries hurry,"
    "marches march,dances dance,shouts shout"
).split(",")
_ADVERBS = (
    "again,slowly,quickly,yesterday,tomorrow,twice,quietly,very well,badly,in secret,without a sound,"
    "every evening,once a year,all day long,usually,rather often,never,as usual,together,alone,too early,"
    "much too late,by accident,on purpose,with pleasure,over there,right here,far away,as soon as possible,"
    "at last"
).split(",")
_PLACES = (
    "in the garden,near the bridge,by the sea,behind the church,under the old tree,on the other side,"
    "at the station,across the valley,in the kitchen,over the hills,beyond the river,through the tunnel,"
    "between two houses,above the clouds,inside the garage,around the corner,along the shore,beside the fire,"
    "upon the roof,outside the village,in the middle of the room,at the edge of the forest,within five miles,"
    "below the surface"
).split(",")
_TIMES = (
    "at night,in the morning,before lunch,during the storm,after the game,for five minutes,at half past three,"
    "on Thursday,in January,last February,next week,an hour ago,since Wednesday,until July,at noon,"
    "this afternoon,in nineteen eighty four,every fourth year,for eleven months,at the weekend"
).split(",")
_PEOPLE = (
    "Anna,Boris,Charlotte,David,Edith,Frank,George,Hannah,Ivan,Joyce,Kevin,Laura,Matthew,Nora,Oliver,Paula,"
    "Quentin,Ruth,Stephen,Theo,Ursula,Vivian,Walter,Yvonne,Zoe,my mother,her brother,their teacher,"
    "our neighbor,his cousin,the judge,your uncle,nobody,everyone,somebody else"
).split(",")
_NUMBERS = (
    "two,three,four,five,six,seven,eight,nine,ten,eleven,twelve,thirteen,fifteen,seventeen,twenty,thirty,"
    "forty one,fifty six,sixty,seventy three,eighty,ninety nine,a hundred,a thousand"
).split(",")
_ASIDES = (
    "I think,as you know,of course,however,by the way,perhaps,unfortunately,they say,you see,in my opinion,"
    "to be honest,after all,for example,believe me"
).split(",")
_ONSETS = (
    "b ch d f g h j k l m n p r s sh t th v w y z bl br cl cr dr fl fr gl gr pl pr sc sk sl sm sn sp st sw tr thr str"
).split()
_RIMES = (
    "ab ack ad ade ag aim air ake all ame an and ang ank ar arb ark arm art ash ast ate aw ay each ead eal eam "
    "ear eat eck ed eed eef eek een eer ell en end ent erd ern esh est et ew ice id ide ife ig ight ile im ime "
    "in ind ine ing ink ip ire ish ist it ive oad oak oat ob ock od oil oin oke old ole ome one ong ood ook "
    "ool oom oon oot op ore orm orn ort ose ost ot ouch oud ought ound out ove ow oy ub uck ud udge uff ug um "
    "un ung unk ur urn ush ust ut"
).split()


def _noun(rng: random.Random) -> str:
    adjective = rng.choice(_ADJECTIVES) + " " if rng.random() < 0.55 else ""
    return adjective + rng.choice(NOUNS)


def _thing(rng: random.Random) -> str:
    determiner = rng.choice(("the", "the", "the", "this", "that", "my", "your", "his", "our", "every", "a"))
    noun = _noun(rng)
    if determiner == "a" and noun[0] in "aeiou" and not noun.startswith(("u", "eu")):
        determiner = "an"
    return f"{determiner} {noun}"


def _someone(rng: random.Random) -> str:
    return rng.choice(_PEOPLE) if rng.random() < 0.5 else _thing(rng)


def _when_or_where(rng: random.Random) -> str:
    return rng.choice((_ADVERBS, _PLACES, _TIMES)[rng.randrange(3)])


def _invented(rng: random.Random) -> str:
    syllables = rng.choice((1, 1, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_RIMES) for _ in range(syllables))


def words() -> tuple[str, ...]:
    """What sentences without invented words are made of: words and groups of words."""
    lists = (NOUNS, _ADJECTIVES, _PAST, _PAIRS, _ADVERBS, _PLACES, _TIMES, _PEOPLE, _NUMBERS, _ASIDES)
    return tuple(word for words in lists for word in words)


def sentence(rng: random.Random, invented: bool = True) -> str:
    """One sentence of three to some sixteen words, ending in punctuation; without ``invented`` all words exist."""
    kind = rng.randrange(14)
    while kind == 12 and not invented:
        kind = rng.randrange(14)
    if kind <= 2:
        text = f"{_someone(rng)} {rng.choice(_PAST)} {_thing(rng)} {_when_or_where(rng)}."
    elif kind == 3:
        text = f"{rng.choice(_PEOPLE)} {rng.choice(_PAIRS).split()[0]} {rng.choice(_PLACES)} {rng.choice(_TIMES)}."
    elif kind == 4:
        text = f"{rng.choice(_NUMBERS)} {_noun(rng)}s {rng.choice(_PAIRS).split()[1]} {_when_or_where(rng)}."
    elif kind == 5:
        text = f"did {_someone(rng)} really say that {_thing(rng)} was {rng.choice(_ADJECTIVES)}?"
    elif kind == 6:
        starts = ("where is", "who has", "what about", "why not use", "have you seen", "shall we buy", "how big is")
        text = f"{rng.choice(starts)} {_thing(rng)}?"
    elif kind == 7:
        text = f"{_thing(rng)} is {rng.choice(_ADJECTIVES)}, but {_thing(rng)} is {rng.choice(_ADJECTIVES)}."
    elif kind == 8:
        aside = rng.choice(_ASIDES)
        text = f"{aside}, {_someone(rng)} {rng.choice(_PAST)} {_thing(rng)}."
    elif kind == 9:
        text = f"{_thing(rng)} {_when_or_where(rng)}."
    elif kind == 10:
        text = f"please give {rng.choice(('me', 'him', 'her', 'us', 'them'))} {rng.choice(_NUMBERS)} {_noun(rng)}s."
    elif kind == 11:
        text = f"{', '.join(rng.choice(NOUNS) for _ in range(rng.randint(2, 4)))} and {rng.choice(NOUNS)}."
    elif kind == 12:
        text = f"{' '.join(_invented(rng) for _ in range(rng.randint(2, 5)))}."
    else:
        text = f"when {_someone(rng)} {rng.choice(_PAST)} {_thing(rng)}, {_someone(rng)} {rng.choice(_PAST)} it."
    return text[0].upper() + text[1:]
