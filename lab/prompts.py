"""`eval.py prompts`: the three stages of prompting, with the same number of prompt tokens P in front of the text.

    manual        a template written by hand, nothing else: the frozen row of every table
    discrete      P real words in front, found by search: place by place, the word that lowers the loss most, of those
                  that the gradient suggests
    continuous    P free vectors in front, found by gradient descent: prompt tuning

The base stays frozen in all three; only what stands before the text is chosen. Words are words: candidates are
tokens that texts are made of, and only those whose string, with a text behind it, is read as these tokens again.
"""

import functools
import itertools
from dataclasses import replace

import torch

import train
from data import tasks
from harness.settings import Parser, Settings, add_options, chosen, positive, settings_of
from lab.runs import Runs, check, mean, scores, sd
from model import Refused


def in_front(example, words, config):
    """The example with the tokens `words` before its text: first of all for GPT, behind [CLS] for BERT."""
    start = 0 if config.causal else 1
    return replace(example, ids=example.ids[:start] + words + example.ids[start:],
                   targets=example.targets[:start] + [-100] * len(words) + example.targets[start:])


def losses(model, task, examples, words, pad):
    """The loss of each batch with `words` in front, times its share of the examples: the sum is the mean loss."""
    found, device = [in_front(e, words, model.config) for e in examples], next(model.parameters()).device
    for group, *batch in tasks.batches(found, 64, pad):
        yield tasks.loss(model, task, [t.to(device) for t in batch]) * len(group) / len(found)


@torch.no_grad()
def mean_loss(model, task, examples, words, pad):
    return sum(loss.item() for loss in losses(model, task, examples, words, pad))


class Nudged(torch.nn.Module):
    """The token embedding with a vector (D,) added at one place of every text."""

    def __init__(self, tokens, place):
        super().__init__()
        self.tokens, self.place = tokens, place
        self.by = torch.nn.Parameter(torch.zeros_like(tokens.weight[0]))               # (D,)

    def forward(self, ids):
        x = self.tokens(ids)                                                           # (B, T, D)
        here = torch.arange(ids.shape[1], device=ids.device) == self.place             # (T,)
        return x + here[:, None] * self.by


def gradient(model, task, examples, words, pad):
    """The gradient (D,) of the mean loss at the embedding of the last of `words`."""
    tokens = model.tokens
    model.tokens = nudged = Nudged(tokens, len(words) - model.config.causal)  # behind [CLS], one place further
    try:
        return sum(torch.autograd.grad(loss, nudged.by)[0] for loss in losses(model, task, examples, words, pad))
    finally:
        model.tokens = tokens


class Behind:
    """A tokenizer for texts that stand behind a word: their first word begins with a space, as inside a text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text):
        return self.tokenizer.encode(" " * (text != "" and not text[0].isspace()) + text)

    def reads(self, words):
        """Are these tokens what is read where their string stands before a text?"""
        return self.tokenizer.encode(self.tokenizer.decode(words) + " x")[:len(words)] == words


def search(model, task, pad, length, candidates, seed, reads=lambda words: True, alone=None):
    """Search for at most `length` prompt tokens, place by place, by the training loss.

    At a new place a random token stands first. With the gradient g at its embedding e, another token w comes to
    L + (E_w - e) g to first order (HotFlip, Ebrahimi et al. 2018; AutoPrompt, Shin et al. 2020): the `candidates` with
    the lowest estimates are evaluated, and the best of them stays, even if that is no better than one place less. The
    best of all lengths is returned, which may be none at all. Tokens that `reads` forbids stand nowhere. `alone` is
    the task without words.
    """
    generator = torch.Generator().manual_seed(seed)
    words, found = [], {(): mean_loss(model, task, (alone or task).train, [], pad)}
    for _ in range(length):
        drawn = torch.randperm(len(model.in_use), generator=generator).tolist()
        first = next((word for word in (model.in_use[i] for i in drawn) if reads(words + [word])), None)
        if first is None:
            break
        slope = gradient(model, task, task.train, words + [first], pad)                # (D,)
        estimates = (model.tokens.weight.detach() @ slope).tolist()
        ranked = sorted(model.in_use, key=lambda word: estimates[word])
        tried = itertools.islice((word for word in ranked if reads(words + [word])), candidates)
        reached = {word: mean_loss(model, task, task.train, words + [word], pad) for word in tried}
        words = words + [min(reached, key=reached.get)]
        found[tuple(words)] = reached[words[-1]]
    return list(min(found, key=found.get))


def askable(settings, model, tokenizer, task, length, candidates):
    """Refuse a task whose answers no prompt can ask for, or whose texts have no room for one."""
    if not task.metric:
        raise Refused(f"--task {settings.task}: pretraining has no score; choose another task")
    if task.classes:
        raise Refused(f"--data {settings.data}: a new Classifier answers here, which no words can ask; a template.json "
                      "with label words lets the LM head answer, if the base has one")
    if candidates > len(model.in_use):
        raise Refused(f"--candidates {candidates}: choose at most as many as the vocabulary has tokens in use, "
                      f"{len(model.in_use):,}")
    behind(settings, model, tokenizer, length)


def behind(settings, model, tokenizer, length):
    """The task with texts that stand behind `length` words: cut where they would be longer than the model reads."""
    n_ctx = model.config.n_ctx
    if length > n_ctx // 2:
        raise Refused(f"--length {length}: this model reads {n_ctx} tokens in all; choose at most {n_ctx // 2}")
    try:
        return tasks.load_task(settings.task, Behind(tokenizer), replace(model.config, n_ctx=n_ctx - length),
                               settings.data, settings.examples, settings.seed)
    except Refused as error:
        raise Refused(f"--length {length}: {error}, {length} of {n_ctx} being words in front") from None


def discrete(runs, length, candidates, seed, **choice):
    """The record of a search: its words and their score on test."""
    settings = settings_of("full", seed=seed, **choice)

    def measure():
        model, tokenizer, task = train.prepare(settings)
        after = behind(settings, model, tokenizer, length)
        if after.cut:
            runs.say(f"            {after.cut:,} texts are cut, so that {length} words in front fit")
        words = search(model, after, tokenizer.pad, length, candidates, seed, Behind(tokenizer).reads, task)
        shown = [in_front(e, words, model.config) for e in (after if words else task).reported]
        score = tasks.score(task, shown, tasks.predictions(model, task, shown, tokenizer))
        return {"score": score, "words": tokenizer.decode(words)}

    decided = ("base", "task", "data", "examples", "seed", "scratch", "content")
    return runs.kept("discrete prompt", measure, length=length, candidates=candidates,
                     **{name: settings.key[name] for name in decided})


def stages(runs, length=8, candidates=50, **choice):
    """{stage: records} of the three stages; the manual one is a number."""
    soft = runs.trial("prompt", length=length, **choice)
    found = [discrete(runs, length, candidates, seed, **choice) for seed in runs.seeds]
    return {"manual": mean([r["frozen_score"] for r in soft]), "discrete": found, "continuous": soft}


def main(argv):
    parser = Parser("eval.py prompts", __doc__)
    parser.add_argument("--length", type=positive, default=8, help="P, prompt tokens [8]")
    parser.add_argument("--candidates", type=positive, default=50, help="tokens tried at each place [50]")
    parser.add_argument("--seeds", type=positive, default=3, help="how many seeds [3]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl [out]")
    add_options(parser, Settings, without=("lr", "seed", "scratch", "steps", "epochs", "batch_size", "dtype"))
    args = parser.parse_args(argv)
    runs, choice = Runs(args.out, args.seeds), chosen(args, Settings)
    check(runs, runs.plan("prompt", length=args.length, **choice), functools.partial(
        askable, length=args.length, candidates=args.candidates))
    found = stages(runs, args.length, args.candidates, **choice)
    print(f"\n{'stage':<14}{'score':>7}{'± sd':>7}\n{'manual':<14}{found['manual']:7.1f}")
    for stage in ("discrete", "continuous"):
        print(f"{stage:<14}{mean(scores(found[stage])):7.1f}{sd(scores(found[stage])):7.1f}")
    for seed, record in enumerate(found["discrete"]):
        print(f"   seed {seed} found: {record['words']!r}")
