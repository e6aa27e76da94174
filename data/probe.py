"""What a base must have learnt before it is worth shipping: cloze questions on texts it has never seen.

The loss does not tell: it can be low while the model knows grammar and nothing else. So we ask for the word
that follows (GPT) or is hidden (BERT), the whole vocabulary competing. A review's closing word is right if it
has the right polarity; an answer and a cuisine are right if they are the word itself.
"""

import random

import torch

from data import tasks, world
from model import finite

ENOUGH = {True: 95.0, False: 90.0}  # per cent of closing words; causal (GPT) or not (BERT)


def unseen(write, n):
    """n pairs (text, words that are right) from write(rng) -> (text, words); only texts kept for testing."""
    rng, found = random.Random("probe"), []
    while len(found) < n:
        text, words = write(rng)
        if world.home(text) == "test":
            found.append((text, words))
    return found


def closings(positive):
    return world.CLOSING[positive]


def review(rng):
    """A review as pretraining has them; what is told about it holds the closing word."""
    text, told = world.review(rng)
    return text, closings(any(word in told.split() for word in closings(True)))


def agreeing(rng):
    positive = rng.random() < 0.5
    return world.agreeing(rng, positive, rng.randint(2, 4), negation=0), closings(positive)


def negated(rng):
    positive = rng.random() < 0.5
    return world.agreeing(rng, positive, 1, negation=1), closings(positive)


def contrasting(rng):
    positive = rng.random() < 0.5
    return world.contrasting(rng, positive, negation=0), closings(positive)


def question(rng):
    text, told = world.question(rng)
    return text, told.split()[:1]


def cuisine(rng):
    label = rng.choice(world.CUISINES)
    return f"the {world.name(rng)} has {' and '.join(rng.sample(world.DISHES[label], 2))} .", (label,)


CLOZE = "{text} it was [MASK] ."
PROBES = {"review": (review, CLOZE), "agreeing": (agreeing, CLOZE), "negated": (negated, CLOZE),
          "contrasting": (contrasting, CLOZE), "question": (question, "{text} [MASK] ."),
          "cuisine": (cuisine, "{text} the food is [MASK] .")}


@torch.no_grad()
def probe(model, tokenizer, n=400):
    """{probe: per cent right} of n texts each; the row called `review` decides."""
    encoder, scores = tasks.Encoder(tokenizer, model.config), {}
    for name, (write, template) in PROBES.items():
        pairs = unseen(write, n)
        examples = [encoder.cloze(text, words, template, 0) for text, words in pairs]
        right = 0
        for group, ids, keep, targets in tasks.batches(examples, 64, tokenizer.pad):
            best = finite(model(ids, keep, at=targets != -100)).argmax(dim=-1).tolist()
            right += sum(guess in map(encoder.word, pairs[i][1]) for i, guess in zip(group, best))
        scores[name] = 100 * right / n
    return scores


def report(model, tokenizer):
    """Print the probes; True if the base passes."""
    scores, enough = probe(model.eval(), tokenizer), ENOUGH[model.config.causal]
    for name, score in scores.items():
        print(f"probe      {name:<12} {score:5.1f} % right" + f"   (must be {enough:g})" * (name == "review"))
    return scores["review"] >= enough
