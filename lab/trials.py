"""Runs over seeds and settings, each done once and kept in results.jsonl: what all comparisons are built on.

    trial("lora", seeds=(0, 1, 2), rank=4, task="cuisine")     -> one record a seed
    tuned("prefix", {"lr": [1e-3, 1e-2]}, seeds=(0, 1, 2))     -> the records of the value that dev likes best
"""

import itertools
import math
import time
from dataclasses import fields

import train
from deltas import methods
from lab import report, results

T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's t


def settings(method, **choice):
    """train.Settings from one flat choice of a technique's fields and training's."""
    kind = methods()[method]
    own = {f.name: choice.pop(f.name) for f in fields(kind) if f.name in choice}
    unknown = set(choice) - {f.name for f in fields(train.Settings)}
    if unknown:
        raise ValueError(f"{method} has no {sorted(unknown)[0]!r}, and neither has training")
    return train.Settings(kind(**own), **choice)


def value(name, text):
    """A field of a technique or of training, read from text: value("rank", "8") -> 8."""
    kinds = {f.name: f.type for kind in (train.Settings, *methods().values()) for f in fields(kind)}
    del kinds["delta"]
    if name not in kinds:
        raise ValueError(f"{name!r} is no field: choose from {', '.join(sorted(kinds))}")
    try:
        return {"true": True, "false": False}[text.lower()] if kinds[name] is bool else kinds[name](text)
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kinds[name]]
        raise ValueError(f"{name}={text}: {name} is {wanted}") from None


def trial(method, seeds=(0, 1, 2), out="out", say=print, **choice):
    """One record a seed; what results.jsonl holds already is not run again. `say` gets a line a new run."""
    found = []
    for seed in seeds:
        wanted, begin = settings(method, seed=seed, **choice), time.time()
        new = results.find(out, wanted.key) is None
        found.append(train.run_once(wanted, out, say=report.quiet))
        if new:
            shown = " ".join(f"{k}={v}" for k, v in choice.items() if v is not None)
            say(f"{method:<11} seed {seed}  {shown:<40} {found[-1]['score']:6.1f}   {time.time() - begin:5.1f} s")
    return found


def tuned(method, grid, seeds=(0, 1, 2), out="out", say=print, **choice):
    """The records of the setting in `grid` ({field: values}) whose mean dev score over seeds is highest."""
    tried = [trial(method, seeds, out, say, **dict(zip(grid, values)), **choice)
             for values in itertools.product(*grid.values())]
    return max(tried, key=lambda records: mean([r["dev_score"] for r in records]))


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


def steps_to(records, target):
    """The mean step at which dev first reached `target`, or None if a run never did."""
    first = [next((step for step, dev in r["curve"] if dev >= target), None) for r in records]
    return None if None in first else mean(first)
