"""`eval.py lowdata`: score against the number of training examples, for a few techniques and full fine-tuning.

    python eval.py lowdata                      prefix and full write descriptions (Li & Liang 2021, figure 3)
    python eval.py lowdata --base DIR --data DIR --sizes 100,500,2000 --arms "full lr=5e-5" "lora lr=3e-3 rank=4"

An arm is a technique, with values of its fields. Its learning rate is the one given or, for each size, the one of its
grid that is best on dev; it takes 300 steps, or two epochs where these are more, and keeps the step that is best on
dev. A seed draws the examples too, but for the whole of your own training set, which is there once.
"""

import math
from pathlib import Path

from data import own
from deltas import methods
from harness.settings import Parser, Settings, add_options, chosen, distinct, positive, settings_of, several, value
from lab import linear_probe, pictures
from lab.runs import Runs, check, interval, mean, scores, sd
from model import Refused

SIZES = (20, 50, 100, 200, 500)


def arm(text):
    """"lora rank=4 lr=1e-3" -> ("lora", (0.001,), {"rank": 4}): technique, learning rates or None, other fields."""
    name, *given = text.split()
    distinct("--arms", [name], methods())
    values = {field: value(field, one) for field, _, one in (part.partition("=") for part in given)}
    settings_of(name, **values)
    lr = values.pop("lr", None)
    return name, None if lr is None else (lr,), values


def planned(runs, arms, sizes, everything=None, **choice):
    """{(text, n): what `tuned` is called with}. `everything`: the rows of your own training set, which are one draw."""
    found, batch_size = {}, choice.get("batch_size", Settings.batch_size)
    for n in sizes:
        steps = {} if choice.keys() & {"steps", "epochs"} else {"steps": max(300, 2 * -(-n // batch_size))}
        seeds = {"seeds": runs.seeds[:1]} if n == everything else {}
        for text in arms:
            name, rates, values = arm(text)
            found[text, n] = name, rates, {"examples": n, **steps, **seeds, **values, **choice}
    return found


def table(runs, arms=("prefix", "full"), sizes=SIZES, everything=None, **choice):
    """{(arm, n): records}."""
    return {key: runs.tuned(name, rates, **how)
            for key, (name, rates, how) in planned(runs, arms, sizes, everything, **choice).items()}


def probes(runs, sizes, everything=None, **choice):
    """{(name, n): records} of logistic regression on the frozen base's states: what is there before anything trains."""
    where = {key: choice[key] for key in ("base", "task", "data") if key in choice}
    return {(name, n): [linear_probe.probe(runs, seed, average, examples=n, **where)
                        for seed in (runs.seeds[:1] if n == everything else runs.seeds)]
            for average, name in ((False, "linear probe"), (True, "probe of the mean")) for n in sizes}


def difference(first, second):
    """(mean, half the 95 % interval) of first - second, records paired by seed."""
    apart = [a - b for a, b in zip(scores(first), scores(second))]
    return mean(apart), interval(apart)


def cell(centre, spread, sign=""):
    """A mean and a spread, which one seed does not have."""
    return f"{centre:{sign}.1f}" + (f" ± {spread:.1f}" if 0 < spread < math.inf else "")


def show(found, arms, sizes):
    """A line for each probe and arm: test scores by size, ± sd over seeds; and what separates arms from full."""
    full, wide = next((text for text in arms if arm(text)[0] == "full"), None), max(map(len, arms)) + 20

    def row(name, cells):
        print(f"{name:<{wide}}" + "".join(f"{one:>16}" for one in cells))
    print()
    row("examples", [f"{n:,}" for n in sizes])
    for name in dict.fromkeys(name for name, _ in found if name not in arms):
        row(name, [cell(mean(scores(found[name, n])), sd(scores(found[name, n]))) for n in sizes])
    for text in arms:
        tried = [scores(found[text, n]) for n in sizes]
        row(text, [cell(mean(one), sd(one)) for one in tried])
        if full not in (None, text):
            row("   minus full, 95 %", [cell(*difference(found[text, n], found[full, n]), "+") for n in sizes])


def picture(found, arms, sizes, path):
    """Draw score against examples, a band of ± sd for each arm; says where, or what to install."""
    try:
        figure, axes = pictures.figure()
    except Refused as error:
        return f"no picture: {error}"
    for text in arms:
        tried = [scores(found[text, n]) for n in sizes]
        line, = axes.plot(sizes, list(map(mean, tried)), marker="o", label=text)
        axes.fill_between(sizes, [mean(s) - sd(s) for s in tried], [mean(s) + sd(s) for s in tried],
                          color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", xlabel="training examples", ylabel="test score in %", title="Score against examples")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes], minor=False)
    axes.minorticks_off()
    axes.legend()
    pictures.save(figure, path)
    return f"picture: {path}"


def main(argv):
    parser = Parser("eval.py lowdata", __doc__)
    parser.add_argument("--arms", nargs="+", default=["prefix", "full"], metavar="ARM",
                        help="techniques, each with values of its fields: full 'lora rank=4 lr=1e-3' [prefix full]")
    parser.add_argument("--sizes", type=several(positive), default=SIZES, metavar="N,N,...",
                        help=f"numbers of training examples [{','.join(map(str, SIZES))}]")
    parser.add_argument("--seeds", type=positive, default=3, help="how many seeds [3]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl and the picture [out]")
    parser.add_argument("--task", help="what is learned from few examples [describe]")
    add_options(parser, Settings, without=("task", "lr", "seed", "scratch", "examples"))
    args = parser.parse_args(argv)
    arms, sizes = distinct("--arms", args.arms), distinct("--sizes", args.sizes)
    choice, runs = chosen(args, Settings), Runs(args.out, args.seeds)
    choice |= {} if args.data else {"task": args.task or "describe"}
    everything = len(own.read(args.data).splits["train"]) if args.data else None
    check(runs, [one for name, rates, how in planned(runs, arms, sizes, everything, **choice).values()
                 for one in runs.plan_tuned(name, rates, **{k: v for k, v in how.items() if k != "seeds"})])
    found = table(runs, arms, sizes, everything, **choice)
    if found[arms[0], sizes[0]][0]["metric"] == "accuracy":
        found |= probes(runs, sizes, everything, **choice)
    show(found, arms, sizes)
    print(picture(found, arms, sizes, Path(args.out) / "lowdata.png"))
