"""The little world: restaurants, what people say about them, and five tasks about what they said.

Everything is made from a seed by the few rules below, so everything is known about it: who liked what, which
word decides a label, how well the best possible reader would do. A document is one line of lower-case words
and punctuation marks with single spaces between them.

    review        we went to the golden fork . the soup was not bland . still , the waiter was rude . it was bad .
    question      the garden was lovely and the bill was low . did we hate the room ? no .
    description   name golden fork ; food italian ; price low ; area river ; children yes . the golden fork ...
    names         golden fork , silver pan , old barrel . golden fork , silver pan , old barrel .

An opinion is a clause about one of four aspects. Its polarity is that of its adjective, turned round by a
negator. A review's polarity is that of all its opinions, or, where two opinions are in contrast, of the one
that the conjunction lets win ("x , but y" and "although x , y": y). The closing word tells it.

No text belongs to two parts of the world: the checksum of a text decides whether it may be pretraining,
train, dev or test (`home`).
"""

import random
import zlib
from dataclasses import dataclass

from model import Refused

# Each aspect: nouns, then adjectives that praise, then adjectives that blame.
ASPECTS = {
    "food": ("food soup dinner bread", "tasty fresh delicious juicy", "bland stale burnt greasy"),
    "service": ("service waiter staff host", "friendly quick polite caring", "rude slow careless grumpy"),
    "room": ("room garden hall table", "cosy clean pretty bright", "dirty noisy ugly dark"),
    "price": ("price bill check menu", "fair low honest modest", "steep high unfair silly"),
}
PRAISE = "lovely nice wonderful pleasant superb charming".split()       # of any aspect
BLAME = "awful poor dreadful nasty horrible dull".split()
NEGATORS = ("not", "never", "hardly", "far from")
INTENSIFIERS = ("", "", "", "very ", "really ", "so ")

CLOSING = {True: ("great", "good", "fine", "perfect"), False: ("terrible", "bad", "sad", "hopeless")}

AGREE = ("{} and {}", "{} . {}", "{} , and {}", "{} . also , {}")
CONTRAST = (                                                            # {0} loses, {1} wins
    "{0} , but {1}", "{0} . still , {1}", "{0} , yet {1}",
    "although {0} , {1}", "{1} , although {0}", "{1} , even though {0}",
)

DISHES = {
    "italian": "lasagne risotto gnocchi ravioli tiramisu polenta",
    "indian": "korma samosa biryani dal naan paneer",
    "japanese": "sushi ramen tempura udon miso teriyaki",
    "mexican": "taco burrito nachos quesadilla mole fajita",
    "french": "quiche ratatouille crepe souffle cassoulet baguette",
    "greek": "moussaka gyros souvlaki tzatziki feta dolma",
    "turkish": "kebab baklava pide borek lahmacun ayran",
    "thai": "satay curry papaya laksa larb khao",
}
DISHES = {cuisine: words.split() for cuisine, words in DISHES.items()}
CUISINES = tuple(DISHES)

FIRST = "golden little old blue happy royal hungry lucky green wild silver red quiet grand sleepy copper".split()
SECOND = "fork barrel lantern kettle anchor spoon garlic rooster oven bridge pepper fig bear mill pan star".split()

# What a listing says -> how prose says it.
PRICES = {"low": "it is cheap", "middle": "it costs a fair amount", "high": "it is expensive"}
AREAS = {
    "river": "by the river", "station": "near the station", "harbour": "at the harbour",
    "market": "on the market square", "park": "next to the park", "centre": "in the town centre",
}
CHILDREN = {"yes": "children are welcome", "no": "it is not for children"}


def clauses(aspect, positive, negated):
    """Every opinion of one kind: ("food", True, True) has "the soup was not bland" among its clauses."""
    nouns, praise, blame = (words.split() for words in ASPECTS[aspect])
    adjectives = praise + PRAISE if positive != negated else blame + BLAME
    before = [word + " " for word in NEGATORS] if negated else INTENSIFIERS
    return [f"the {noun} was {word}{adjective}" for noun in nouns for word in before for adjective in adjectives]


CLAUSES = {(aspect, positive, negated): clauses(aspect, positive, negated)
           for aspect in ASPECTS for positive in (True, False) for negated in (True, False)}


def home(text):
    """The one part of the world a text may be used in. (Modulo a prime: the bits of a checksum are linear.)"""
    return ("train", "dev", "test", "corpus")[min(zlib.crc32(text.encode()) % 11, 3)]


# ---- the pieces of a review ----

def opinion(rng, aspect, positive, negation):
    return rng.choice(CLAUSES[aspect, positive, rng.random() < negation])


def agreeing(rng, positive, size, negation):
    """`size` opinions of one polarity on different aspects, as sentences."""
    parts = [opinion(rng, aspect, positive, negation) for aspect in rng.sample(list(ASPECTS), size)]
    text = parts[0]
    for part in parts[1:]:
        text = rng.choice(AGREE).format(text, part)
    return text + " ."


def contrasting(rng, positive, negation):
    """Two opinions against each other; the winning one has the polarity `positive`."""
    loser, winner = rng.sample(list(ASPECTS), 2)
    loser, winner = opinion(rng, loser, not positive, negation), opinion(rng, winner, positive, negation)
    return rng.choice(CONTRAST).format(loser, winner) + " ."


def name(rng):
    return f"{rng.choice(FIRST)} {rng.choice(SECOND)}"


def opener(rng):
    """A sentence without an opinion, or none."""
    kind = rng.randrange(4)
    if kind == 0:
        return f"we went to the {name(rng)} . "
    if kind == 1:
        return f"we had the {rng.choice(DISHES[rng.choice(CUISINES)])} . "
    return ""


# ---- pretraining documents ----

def review(rng):
    """Mostly consistent: where negation and contrast are frequent, no model of ours ever finds polarity."""
    positive, kind = rng.random() < 0.5, rng.random()
    if kind < 0.65:
        body = agreeing(rng, positive, rng.randint(2, 4), negation=0.08)
    elif kind < 0.8:
        body = agreeing(rng, positive, rng.randint(1, 2), negation=0.6)
    else:
        body = contrasting(rng, positive, negation=0.08)
    return opener(rng) + body, f"it was {rng.choice(CLOSING[positive])} ."


def question(rng):
    body, asked, answer = asked_about(rng, rng.choice(("yes", "no", "unknown")), negation=0.08)
    return f"{body} {asked}", f"{answer} ."


def asked_about(rng, answer, negation):
    """Two opinions on two aspects and a question about one of these, or ("unknown") about a third."""
    first, second, third = rng.sample(list(ASPECTS), 3)
    liked = {first: rng.random() < 0.5, second: rng.random() < 0.5}
    aspect = third if answer == "unknown" else rng.choice((first, second))
    verb = "like" if liked.get(aspect, rng.random() < 0.5) == (answer == "yes") else "hate"
    body = " . ".join(opinion(rng, aspect, positive, negation) for aspect, positive in liked.items())
    return body + " .", f"did we {verb} the {aspect} ?", answer


def place(rng):
    """A restaurant: what is known about it."""
    return {"name": name(rng), "food": rng.choice(CUISINES), "price": rng.choice(list(PRICES)),
            "area": rng.choice(list(AREAS)), "children": rng.choice(list(CHILDREN))}


def listing(facts):
    return " ; ".join(f"{key} {value}" for key, value in facts.items()) + " ."


def sentences(facts):
    """Each fact in prose."""
    return {"food": f"the {facts['name']} serves {facts['food']} food", "price": PRICES[facts["price"]],
            "area": f"you find it {AREAS[facts['area']]}", "children": CHILDREN[facts["children"]]}


def description(rng):
    """A listing, and some of it in prose, in any order."""
    facts = place(rng)
    prose = sentences(facts)
    said = rng.sample(list(prose), rng.randint(2, 4))
    text = " . ".join(f"the {facts['name']} is our tip . " * (i == 0) + prose[key] for i, key in enumerate(said))
    return listing(facts), text + " ."


def menu(rng):
    """What a kitchen cooks: where a dish is at home."""
    cuisine = rng.choice(CUISINES)
    dishes = " and ".join(rng.sample(DISHES[cuisine], 2))
    facts = f"the {name(rng)} has {dishes} ."
    if rng.random() < 0.5:
        return facts, f"the food is {cuisine} ."
    return f"the food is {cuisine} .", facts


def names(rng):
    """The same names twice: here copying is all there is to learn."""
    text = " , ".join(name(rng) for _ in range(rng.randint(2, 4)))
    return text + " .", text + " ."


KINDS = (review, review, review, review, review, question, question, description, description, menu, names)


def corpus(n, seed=0):
    """n pretraining documents (given, told): what follows in `told` is decided by what stands in `given`."""
    rng, documents = random.Random(f"corpus {seed}"), []
    while len(documents) < n:
        given, told = rng.choice(KINDS)(rng)
        if home(given) == "corpus":
            documents.append((given, told))
    return documents


# ---- tasks ----

@dataclass(frozen=True)
class WorldTask:
    name: str
    about: str                  # what decides the label
    labels: tuple               # the words that stand for the labels; () where text is to be written
    template: str               # the label word is what [MASK] hides; a GPT reads only what stands before it
    bayes: float                # the share that a perfect reader gets right
    examples: int               # training examples by default


TASKS = {task.name: task for task in (
    WorldTask("sentiment", "do they like it? all opinions agree, some are negated", ("good", "bad"),
              "{text} it was [MASK] .", 1.0, 200),
    WorldTask("rating", "all praise, praise wins, blame wins, all blame: contrast and negation decide",
              ("great", "good", "bad", "terrible"), "{text} it was [MASK] .", 1.0, 200),
    WorldTask("cuisine", "which kitchen a dish is from; the dishes tested are not those trained on",
              CUISINES, "{text} the food is [MASK] .", 1.0, 200),
    WorldTask("claim", "does the review say so? no also where it says nothing about it", ("yes", "no"),
              "{text} [MASK] .", 1.0, 500),
    WorldTask("describe", "a listing in, all of it in prose out", (), "{text}", 1.0, 200),
)}


def sentiment(rng, label, split):
    return opener(rng) + agreeing(rng, label == "good", rng.randint(1, 3), negation=0.35)


def rating(rng, label, split):
    if label in ("great", "terrible"):
        return opener(rng) + agreeing(rng, label == "great", 2, negation=0.3)
    return opener(rng) + contrasting(rng, label == "good", negation=0.3)


def cuisine(rng, label, split):
    dishes = DISHES[label][:3] if split == "train" else DISHES[label][3:]
    return f"we had the {rng.choice(dishes)} . " + agreeing(rng, rng.random() < 0.5, 2, negation=0.08)


def claim(rng, label, split):
    answer = "yes" if label == "yes" else rng.choice(("no", "unknown"))
    body, asked, _ = asked_about(rng, answer, negation=0.08)
    return f"{body} {asked}"


def describe(rng, label, split):
    return listing(place(rng))


WRITERS = {"sentiment": sentiment, "rating": rating, "cuisine": cuisine, "claim": claim, "describe": describe}


TRIES = 20_000    # draws in a row without a new text: then there is none
MOST = 100_000    # examples that are made for one run: half a minute's work


def rows(task, split, n, seed=0):
    """n pairs (text, label word), every label equally often; for describe (prompt, completion).

    Raises Refused where the world has no n different texts.
    """
    labels, write = TASKS[task].labels, WRITERS[task]
    rng, found, since = random.Random(f"{task} {split} {seed}"), {}, 0
    while len(found) < n:
        if since == TRIES:
            raise Refused(f"{n:,} examples of {task}: the world has only some {len(found):,} for {split}")
        since += 1
        label = labels[len(found) % len(labels)] if labels else None
        text = write(rng, label, split)
        if home(text) == split and text not in found:
            found[text], since = label if labels else completion(attributes(text)), 0
    return list(found.items())


def completion(facts):
    """The house style of `describe`: everything, in this order."""
    return " . ".join(sentences(facts).values()) + " ."


def attributes(text):
    """Which facts a text states, be it a listing or prose: {"name": "golden fork", "food": "thai", ...}."""
    words, found = text.split(), {}
    for first, second in zip(words, words[1:]):
        if first in FIRST and second in SECOND:
            found.setdefault("name", f"{first} {second}")
    found |= {"food": word for word in words if word in CUISINES}  # noqa: B035, a text names one cuisine
    for key, phrases in (("price", PRICES), ("area", AREAS), ("children", CHILDREN)):
        for value, phrase in phrases.items():
            if phrase in text or f"{key} {value}" in text:
                found[key] = value
    return found
