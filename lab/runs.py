"""Runs over seeds and settings, each done once and kept in results.jsonl: what all comparisons are built on.

    runs = Runs("out", seeds=3)
    runs.trial("lora", rank=4, task="cuisine")           -> one record a seed
    runs.tuned("prefix", (1e-3, 1e-2), task="cuisine")   -> the records of the learning rate that is best on dev
    runs.kept("energy", measure, file="...")             -> what measure() returned, once
"""

import copy
import functools
import math
import time
from pathlib import Path

import torch

import train
from data.files import shown
from deltas import attach, methods
from harness import checks, report, results
from harness.settings import settings_of
from lab.sizes import attached
from model import Refused

T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's t


MOST_SEEDS = 1000


class Runs:
    """The runs and measurements of a folder: what is not kept there is run now.

    `say` gets a line for every new one. `always` overrules the settings of every run.
    """

    def __init__(self, out="out", seeds=3, say=print, **always):
        if seeds > MOST_SEEDS:
            raise Refused(f"--seeds {seeds}: {MOST_SEEDS:,} at most")
        self.out, self.seeds, self.say, self.always = Path(out), tuple(range(seeds)), say, always

    def plan(self, method, seeds=None, seeded=(), **choice):
        """The Settings of a trial, one a seed. The fields named in `seeded` take the seed's own number."""
        return [settings_of(method, seed=seed, **choice | self.always | dict.fromkeys(seeded, seed))
                for seed in (self.seeds if seeds is None else seeds)]

    def trial(self, method, seeds=None, seeded=(), **choice):
        """One record a seed, of the runs that `plan` has."""
        return [self.one(settings, choice | self.always) for settings in self.plan(method, seeds, seeded, **choice)]

    def one(self, settings, choice):
        begun = []
        record = train.run_once(settings, self.out, report.quiet, lambda: begun.append(time.time()))
        if begun:
            typed = shown(" ".join(f"{k}={v}" for k, v in choice.items() if v is not None), 500)
            self.say(f"{settings.delta.name:<11} seed {settings.seed}  {typed:<40} {record['score']:6.1f}   "
                     f"{time.time() - begun[0]:5.1f} s")
        return record

    def plan_tuned(self, method, rates=None, seeded=(), **choice):
        """The Settings that `tuned` begins with: every rate, the first seed."""
        return [one for lr in rates or methods()[method].rates
                for one in self.plan(method, self.seeds[:1], seeded, lr=lr, **choice)]

    def tuned(self, method, rates=None, seeds=None, **choice):
        """All seeds at the learning rate of `rates` (or the technique's) with the best dev score of the first seed.

        The first of equals wins. A rate that diverges is out; if all do, so does this.
        """
        seeds, tried = self.seeds if seeds is None else seeds, {}
        for lr in rates or methods()[method].rates:
            try:
                tried[lr] = self.trial(method, seeds[:1], lr=lr, **choice)[0]["dev_score"]
            except train.Diverged as error:
                diverged = error
        if not tried:
            raise diverged
        return self.trial(method, seeds, lr=max(tried, key=tried.get), **choice)

    def kept(self, name, measure, **settings):
        """The dictionary that `measure()` returns, measured once and kept under this name and these settings."""
        @functools.wraps(measure)
        def now():
            typed = (f"{key}={settings[key]}" for key in ("base", "task", "seed", "method") if key in settings)
            self.say(shown(f"measuring   {name} {' '.join(typed)}".rstrip(), 500))
            return {"method": "measure"} | measure()
        return results.once(self.out, {"measure": name} | settings, now)


def check(runs, plan, fits=lambda settings, model, tokenizer, task: None):
    """Refuse, before anything trains, what one of the runs in `plan` (Settings) would be refused for.

    Base and task are loaded, every technique is attached; then `fits` may refuse as well. What is kept already is
    not looked at again: if all is, nothing is loaded.
    """
    kept = [[record.get("settings"), record.get("content")] for record in results.read(runs.out)]
    new = [settings for settings in plan if results.find_by(settings.key, train.run_once) not in kept]
    groups, needed = {}, 0
    for settings in new:
        groups.setdefault((settings.base, settings.data, settings.task), []).append(settings)
    for group in groups.values():
        widest = max(group, key=lambda one: (not one.scratch, one.examples or math.inf))
        model, tokenizer, task = train.prepare(widest)
        with checks.blame(f"base {widest.base}: before anything is attached it gives"):
            first = checks.Check(model, task, tokenizer.pad, report.quiet)
        if widest.examples and widest.examples > len(task.train):
            raise Refused(f"examples={widest.examples}: {widest.data} has {len(task.train):,} to train on")
        for settings in group:
            settings.completed(task)
        for settings in {repr(one.delta): one for one in group if one.seed == group[0].seed}.values():
            delta = settings.delta.for_task(task)
            checks.sensible(delta, model)
            if not settings.shipped or getattr(delta, "projection", "") == "dense":
                # A large copy, or drawing a dense projection, takes longer than a first use of the meta device.
                attached(model.config, delta)
                continue
            with checks.blame(f"{delta}: with these settings a new delta gives"):
                first.start(attach(delta, copy.deepcopy(model)))
        needed += sum(4 * one.delta.training_formula(model.config) for one in group)
        fits(widest, model, tokenizer, task)
    checks.writable(runs.out, needed)


def trained(settings, delta):
    """{score, dev_score} of a delta that is no technique of methods/, with a run's settings; nothing is saved."""
    torch.manual_seed(settings.seed)
    model, tokenizer, task = train.prepare(settings)
    settings, model = settings.completed(task), attach(delta, model)
    train.to_precision(model, settings.dtype)
    curve, _ = train.train(model, task, tokenizer.pad, settings, report.quiet)
    return {"score": train.score(model, task, tokenizer, settings), "dev_score": max(dev for _, dev in curve)}


def mean(values):
    return sum(values) / len(values)


def sd(values):
    """The standard deviation of a sample; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def interval(values):
    """Half the width of the 95 % confidence interval of a mean, by Student's t; infinite for one value."""
    if len(values) < 2:
        return math.inf
    return T_975[min(len(values) - 1, 9)] * sd(values) / math.sqrt(len(values))


def scores(records):
    return [r["score"] for r in records]


def dev(records):
    return mean([r["dev_score"] for r in records])


def steps_to(records, target):
    """The mean step at which dev first reached `target`, or None if a run never did."""
    first = [next((step for step, dev in r["curve"] if dev >= target), None) for r in records]
    return None if None in first else mean(first)
