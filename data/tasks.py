"""A task is token ids and target ids: what goes in, and which word is wanted where.

    ids      [ we went ... it was ]         targets  [ -100 -100 ... -100 " good" ]         GPT: the next word
    ids      [CLS] ... it was [MASK] . [SEP]         [ -100 ... "good" -100 -100 ]          BERT: the hidden word
    ids      name golden fork ; ... . the golden     [ -100 ... " the" " golden" " fork" ]  a completion
    ids      [CLS] ... [SEP]                         [ 1 -100 ... ]                         a class, for a Classifier

-100 stands where nothing is to be predicted. One loss serves them all: the cross-entropy of the targets. Where
the answer is one of a few label words (a verbaliser) only these words compete: otherwise a small delta
would spend its strength on silencing the rest of the vocabulary.

Strings are joined first and encoded once, as the base has read them: " good" inside a text is another token than
"good" at its start, and a token for a space alone stands in no text. Only what is no string, a mask or a soft
prompt, parts them: the text behind a soft prompt is encoded as at the start of a string.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from data import own, world
from data.files import shown
from model import Refused, finite, generate

SIZES = {"dev": 300, "test": 600}   # of the little world's tasks: two standard errors are 2.4 points at 90 %

# Scripts without spaces between words: Thai to Myanmar, Khmer, Chinese and Japanese with their marks, full width.
NO_SPACES = ("[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef"
             "\U00020000-\U0003ffff]")


@dataclass
class Example:
    ids: list
    targets: list
    text: str
    answers: list                   # the label, or every completion that is right; the first is trained on


@dataclass
class Task:
    """Examples in three splits, and how their answers are read off the logits."""

    name: str
    train: list
    dev: list
    test: list                      # may be empty for own data: then dev is what gets reported
    metric: str = "accuracy"        # accuracy; attributes, overlap: of generated text; nothing for the corpus
    labels: list = field(default_factory=list)
    words: list = None              # the token of each label, where the LM head answers (the verbaliser)
    about: str = ""
    stop: int = None                # the token that ends a generated text
    cut: int = 0                    # texts that were longer than the model reads
    encoder: object = field(default=None, compare=False)  # what made the examples
    ask: object = field(default=None, compare=False)      # a new text -> its Example; where text is written, and answer

    @property
    def classes(self):
        """Classes of the Classifier that this task needs; 0 where the LM head answers."""
        return len(self.labels) if self.labels and self.words is None else 0

    @property
    def reported(self):
        """The examples that a run's score is about."""
        return self.test or self.dev

    @property
    def majority(self):
        """The score of always giving the answer that is most frequent in training."""
        if not self.labels:
            return 0.0
        counts = Counter(e.answers[0] for e in self.train)
        top = max(self.labels, key=lambda label: counts[label])
        return 100 * sum(e.answers[0] == top for e in self.reported) / len(self.reported)


def load_task(name, tokenizer, config, data=None, examples=None, seed=0):
    """A task of the little world, the pretraining corpus, or one's own data from the folder `data`.

    `examples` training examples are drawn with `seed`, and the little world's test, so that the spread over seeds
    holds that of the test too. Dev is one and the same, and so is a test of one's own.
    Raises Refused for an unknown name, or one that this base cannot do.
    """
    encoder = Encoder(tokenizer, config, f"task {name}" if data is None else f"{data}/template.json")
    if data is not None:
        return own_task(own.read(data), encoder, examples, seed)
    most = world.MOST * (10 if name == "corpus" else 1)
    if examples is not None and examples > most:
        raise Refused(f"examples={examples:,}: the world makes {most:,} at most")
    if name == "corpus":
        return corpus_task(encoder, examples or 300_000, seed)
    if name not in world.TASKS:
        raise Refused(f"task {name!r}: choose from {', '.join(world.TASKS)}, or corpus")
    spec = world.TASKS[name]
    sizes = {"train": examples or spec.examples, **SIZES}
    rows = {split: world.rows(name, split, size, 0 if split == "dev" else seed) for split, size in sizes.items()}
    splits = {split: [(text, [answer]) for text, answer in found] for split, found in rows.items()}
    if not spec.labels:
        return text_task(name, splits, encoder, "attributes", spec.about)
    labels = list(spec.labels)
    return label_task(name, splits, encoder, labels, labels, spec.template, spec.about)


class Encoder:
    """Turns texts into Examples for one base: its tokenizer, its special tokens, its longest text.

    `place` is where the template and the label words stand: it is named where one of them is refused.
    """

    def __init__(self, tokenizer, config, place="template"):
        self.tokenizer, self.config, self.place, self.cut = tokenizer, config, place, 0

    def fit(self, head, text, tail, behind=()):
        """head + text + tail, encoded as one string, and the ids `behind`; it is `text` that loses its end."""
        encode, room = self.tokenizer.encode, self.config.n_ctx - len(self.tokenizer.wrap(behind))
        text = text.strip()
        ids = encode(head + text + tail)
        if len(ids) > room:
            start, end = (shared(ids, encode(part)) for part in (head, head + text))
            if room - len(ids[end:]) <= start:
                beside = len(self.tokenizer.wrap(ids[:start] + ids[end:])) + len(behind)
                raise Refused(f"{self.place}: {beside} tokens beside the text leave no room for it: this model reads "
                              f"{self.config.n_ctx}")
            ids = ids[:room - len(ids[end:])] + ids[end:]
            self.cut += 1
        return ids + list(behind)

    def word(self, label, before=" "):
        """The one token that stands for a label word behind the text `before` it."""
        stem = before.rstrip(" ")
        start, ids = (self.tokenizer.encode(t) for t in (stem, stem + " " * (stem != before) + label))
        if ids[:-1] != start:
            raise Refused(f"{self.place}: label word '{shown(label)}' is {len(ids) - shared(ids, start)} tokens here; "
                          "choose a word that is one")
        if ids[-1] == self.tokenizer.unk:
            raise Refused(f"{self.place}: label word '{shown(label)}' is not in this base's vocabulary")
        return ids[-1]

    def cloze(self, text, answers, template, target):
        """The label word `target` behind the text (GPT: all before [MASK] is read) or at its [MASK] (BERT)."""
        head, question, rest = parts(template)
        causal, mask = self.config.causal, self.tokenizer.mask
        ids = self.fit(head, text, question.rstrip(" "), [] if causal else [mask, *self.tokenizer.encode(rest)])
        ids = ids if causal else self.tokenizer.wrap(ids)
        place = len(ids) - 1 if causal else ids.index(mask)
        return Example(ids, only(target, place, len(ids)), text, answers)

    def classified(self, text, answers, target):
        """A class, at [CLS] (BERT) or at the last token (GPT)."""
        ids = self.tokenizer.wrap(self.fit("", text, ""))
        return Example(ids, only(target, len(ids) - 1 if self.config.causal else 0, len(ids)), text, answers)

    def halves(self, before, after):
        """The ids of two texts that are joined to one; white space between them belongs to the second."""
        start = before.rstrip()
        whole = before + gap(before, after) + after
        first, ids = self.tokenizer.encode(start), self.tokenizer.encode(whole)
        if ids[:len(first)] == first:
            return first, ids[len(first):]
        return first, self.tokenizer.encode(whole[len(start):])  # no token may tell what follows: they stay apart

    def completed(self, prompt, answers):
        """A prompt, and the completion as the words to be predicted, up to the end-of-text token.

        Where they are too long the prompt loses its end, and the completion its own if it alone is too long.
        """
        n_ctx = self.config.n_ctx
        start, told = self.halves(prompt, answers[0])
        told, whole = told + [self.tokenizer.eos], len(start) + len(told) + 1
        if len(told) >= n_ctx:
            told = told[:n_ctx - min(len(start), n_ctx // 2)]
        start = start[:n_ctx - len(told)]
        self.cut += len(start) + len(told) < whole
        targets = [-100] * (len(start) - 1) + told
        return Example((start + told)[:-1], targets, prompt, [answer.strip() for answer in answers])

    def hidden(self, given, told, rng):
        """`told` behind `given`, two thirds of its tokens hidden, one at least; these are to be found."""
        before, words = self.halves(given, told)
        hide = [rng.random() < 2 / 3 for _ in words]
        hide[rng.randrange(len(words))] = True
        ids = before + [self.tokenizer.mask if h else word for word, h in zip(words, hide)]
        targets = [-100] * len(before) + [word if h else -100 for word, h in zip(words, hide)]
        return Example(self.tokenizer.wrap(ids), [-100, *targets, -100], given, [told])


def shared(ids, others):
    """How many ids two texts have in common at their start."""
    return next((n for n, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))


def gap(before, after):
    """What joins two texts: a space, but none beside white space, behind "=" or in a script without spaces."""
    return "" if re.search(rf"^=|\s|{NO_SPACES}", before[-1:] + after[:1]) else " "


def parts(template):
    """A template's text before {text}, between {text} and [MASK], and behind [MASK]."""
    head, tail = template.split("{text}")
    return head, *tail.partition("[MASK]")[::2]


def only(target, place, length):
    """Targets with one word wanted, at `place`."""
    return [target if i == place else -100 for i in range(length)]


def label_task(name, splits, encoder, labels, words, template, about=""):
    """Labels answered by the LM head with one word each, where there is such a head and there are words;
    otherwise by a Classifier.
    """
    if words and encoder.config.lm_head != "none":
        words = label_words(encoder, labels, words, parts(template)[1])
        make = lambda text, answers, i: encoder.cloze(text, answers, template, words[i])
    else:
        words, make = None, encoder.classified
    number = {label: i for i, label in enumerate(labels)}
    made = {split: [make(text, answers, number[answers[0]]) for text, answers in rows]
            for split, rows in splits.items()}
    return Task(name, **made, labels=labels, words=words, about=about, cut=encoder.cut, encoder=encoder,
                ask=lambda text: make(text, [], 0))


def label_words(encoder, labels, words, before):
    """The token of each label's word. Two labels never share one: they could not be told apart."""
    if not encoder.config.causal and encoder.tokenizer.mask is None:
        raise Refused(f"{encoder.place}: [MASK] is asked, and this base's tokenizer has no mask token")
    ids, owner = [encoder.word(word, before) for word in words], {}
    for label, word, i in zip(labels, words, ids):
        if (other := owner.setdefault(i, label)) != label:
            raise Refused(f"{encoder.place}: the labels '{shown(other)}' and '{shown(label)}' have one word here, "
                          f"'{shown(word)}'; each needs its own")
    return ids


def text_task(name, splits, encoder, metric, about=""):
    """Completions, written by a GPT. Raises Refused for a BERT."""
    if not encoder.config.causal or encoder.config.lm_head == "none":
        raise Refused(f"task {name!r} is writing text, which a BERT cannot: choose a GPT base")
    if encoder.tokenizer.eos is None:
        raise Refused(f"task {name!r} is writing text, and this base's tokenizer has no token that ends one")
    made = {split: [encoder.completed(prompt, answers) for prompt, answers in rows]
            for split, rows in splits.items()}
    longest = max((answers[0] for _, answers in splits["train"]), key=len)  # so much room is left for an answer
    return Task(name, **made, metric=metric, about=about, stop=encoder.tokenizer.eos, cut=encoder.cut, encoder=encoder,
                ask=lambda text, answer=longest: encoder.completed(text, [answer]))


def corpus_task(encoder, examples, seed):
    """Pretraining: a document is completed (GPT), or words are hidden in its second part (BERT).

    Only what follows from the rest is predicted. Most of a document's first part follows from nothing (which
    restaurant, which dish, whether they liked it), and this noise drowns what there is to learn.
    """
    rng, made = random.Random(f"hide {seed}"), []
    for given, told in world.corpus(examples + SIZES["dev"], seed):
        made.append(encoder.completed(given, [told]) if encoder.config.causal else encoder.hidden(given, told, rng))
    dev = SIZES["dev"]
    return Task("corpus", made[dev:], made[:dev], [], metric="", about="documents of the little world")


def own_task(data, encoder, examples, seed):
    """A task from files: see data/own.py for the formats."""
    train = data.splits["train"]
    if examples is not None and examples > len(train):
        raise Refused(f"examples={examples:,}: {data.name} has {len(train):,} to train on")
    if examples is not None and examples < len(train):
        train = random.Random(f"own {seed}").sample(train, examples)
    splits = {**data.splits, "train": train}
    if not data.labels:
        return text_task(data.name, splits, encoder, data.metric, data.about)
    return label_task(data.name, splits, encoder, data.labels, data.words, data.template, data.about)


# ---- batches, loss and score ----

def batches(examples, batch_size, pad, generator=None):
    """One pass over the examples as (ids, keep, targets), each (B, T), of texts of similar length.

    With a generator the order is random: windows of 16 batches are sorted by length, so that pads cost
    little, and the batches are shuffled again. Without one the examples are sorted by length.
    """
    order, window = list(range(len(examples))), len(examples)
    if generator is not None:
        order, window = torch.randperm(len(examples), generator=generator).tolist(), 16 * batch_size
    groups = []
    for start in range(0, len(order), max(1, window)):
        near = sorted(order[start:start + window], key=lambda i: len(examples[i].ids))
        groups += [near[i:i + batch_size] for i in range(0, len(near), batch_size)]
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    for group in groups:
        yield group, *collate([examples[i] for i in group], pad)


def collate(examples, pad):
    """ids, keep and targets of equal length (B, T), padded on the right; `pad` may be any token."""
    T = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [pad or 0] * (T - len(e.ids)) for e in examples])
    keep = torch.tensor([[True] * len(e.ids) + [False] * (T - len(e.ids)) for e in examples])
    targets = torch.tensor([e.targets + [-100] * (T - len(e.ids)) for e in examples])
    return ids, keep, targets


def answer(model, task, ids, keep, targets):
    """Logits where targets stand, (N, V), and what is wanted there, (N,); over the label words if there are any.

    Raises model.NotFinite for logits that are NaN or infinite.
    """
    at = targets != -100
    logits, wanted = model(ids, keep, at=at), targets[at]
    if task.words is not None:
        words = torch.tensor(task.words, device=ids.device)
        logits, wanted = logits[:, words], (wanted[:, None] == words).int().argmax(dim=1)
    return finite(logits), wanted


def loss(model, task, batch):
    """The cross-entropy, in nats a target, of a batch (ids, keep, targets)."""
    logits, wanted = answer(model, task, *batch)
    return F.cross_entropy(logits.float(), wanted)


@torch.no_grad()
def dev_score(model, task, examples, pad, total=list, batch_size=64):
    """What training watches, in percent: accuracy, or the typical probability of a word, exp(-loss).

    Where several processes have a part of the examples each, `total` adds up the counts of all.
    """
    device = next(model.parameters()).device
    right = nats = words = 0
    for _, *batch in batches(examples, batch_size, pad):
        logits, wanted = answer(model, task, *(t.to(device) for t in batch))
        right += (logits.argmax(dim=-1) == wanted).sum().item()
        nats += F.cross_entropy(logits.float(), wanted, reduction="sum").item()
        words += len(wanted)
    right, nats, words = total([right, nats, words])
    return 100 * right / words if task.labels else 100 * float(torch.tensor(-nats / words).exp())


@torch.no_grad()
def predictions(model, task, examples, tokenizer, batch_size=64):
    """What the model answers to each example: a label, or a text written by greedy decoding."""
    device = next(model.parameters()).device
    found = [None] * len(examples)
    shown = [Example(*prompt(e), e.text, e.answers) for e in examples] if not task.labels else examples
    for group, *batch in batches(shown, batch_size, tokenizer.pad):
        ids, keep, targets = (t.to(device) for t in batch)
        if task.labels:
            texts = [task.labels[i] for i in answer(model, task, ids, keep, targets)[0].argmax(dim=-1).tolist()]
        else:
            longest = max(sum(t != -100 for t in examples[i].targets) for i in group)
            room = model.config.n_ctx - ids.shape[1]
            written = generate(model, ids, keep, steps=max(1, min(room, 2 * longest)), stop=task.stop).tolist()
            texts = [tokenizer.decode(upto(row, task.stop)).strip() for row in written]
        for i, text in zip(group, texts):
            found[i] = text
    return found


def prompt(example):
    """The ids and targets of an example without its completion."""
    start = next(i for i, t in enumerate(example.targets) if t != -100) + 1
    return example.ids[:start], example.targets[:start]


def upto(ids, stop):
    return ids[:ids.index(stop)] if stop in ids else ids


def score(task, examples, predicted):
    """The task's metric in percent: accuracy, attributes got right (F1), or words in common (F1).

    Words are counted, not only noted (`yes yes` is not `yes`), without regard to case. In a script without spaces
    between words (Chinese, Japanese, Thai ...) every character counts as one.
    """
    if task.metric == "accuracy":
        right = [p == e.answers[0] for p, e in zip(predicted, examples)]
    elif task.metric == "attributes":
        right = [f1(attributes(e.text).items(), attributes(p, e.text).items()) for p, e in zip(predicted, examples)]
    else:
        right = [max(f1(spaced(p.lower()).split(), spaced(a.lower()).split()) for a in e.answers)
                 for p, e in zip(predicted, examples)]
    return 100 * sum(right) / len(right)


def attributes(text, prompt=None):
    """What a text states; E2E's prompts look like `name[Aromi], food[Indian]`, the world's do not."""
    if "[" in (prompt or text):
        return own.slots(text) if prompt is None else own.stated(text, prompt)
    return world.attributes(text)


def spaced(text):
    """A text with white space around each character of a script that has none between its words."""
    return re.sub(NO_SPACES, r" \g<0> ", text)


def f1(wanted, got):
    """2 |wanted ∩ got| / (|wanted| + |got|), where what is there twice counts twice."""
    wanted, got = Counter(wanted), Counter(got)
    return 2 * (wanted & got).total() / (wanted.total() + got.total()) if wanted or got else 0.0
