"""`eval.py lowdata`: does prefix tuning beat full fine-tuning where examples are few? (Li & Liang 2021, figure 3)

Both write the same task (describe) from n examples, n = 20 to 500, over seeds that also draw the examples. Both
keep the step that is best on dev, and both have their learning rate picked on dev.
"""

from deltas import methods
from harness.settings import Parser, Settings, add_options, chosen, distinct, positive, several
from lab.runs import Runs, check, dev, interval, mean, scores

SIZES = (20, 50, 100, 200, 500)


def table(runs, names=("prefix", "full"), sizes=SIZES, **choice):
    """{(name, n): records} at each technique's best learning rate of its grid."""
    return {(name, n): runs.tuned(name, examples=n, **{"task": "describe"} | choice) for n in sizes for name in names}


def difference(found, n, first="prefix", second="full"):
    """(mean, half the 95 % interval) of first - second at n examples, paired by seed."""
    apart = [a - b for a, b in zip(scores(found[first, n]), scores(found[second, n]))]
    return mean(apart), interval(apart)


def main(argv):
    parser = Parser("eval.py lowdata", __doc__)
    parser.add_argument("--methods", default="prefix,full", help="names with commas between [prefix,full]")
    parser.add_argument("--sizes", type=several(positive), default=SIZES, metavar="N,N,...",
                        help=f"numbers of training examples [{','.join(map(str, SIZES))}]")
    parser.add_argument("--seeds", type=positive, default=3, help="how many seeds [3]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl [out]")
    parser.add_argument("--task", help="what is learned from few examples [describe]")
    add_options(parser, Settings, without=("task", "lr", "seed", "scratch", "examples"))
    args = parser.parse_args(argv)
    names, sizes = distinct("--methods", args.methods.split(","), methods()), distinct("--sizes", args.sizes)
    choice, runs = {"task": "describe"} | chosen(args, Settings), Runs(args.out, args.seeds)
    check(runs, [one for n in sizes for name in names for one in runs.plan_tuned(name, examples=n, **choice)])
    found = table(runs, names, sizes, **choice)
    print(f"\n{'examples':>9}" + "".join(f"{name:>20}" for name in names))
    for n in sizes:
        cells = [f"{mean(scores(found[name, n])):.1f} (word {dev(found[name, n]):.1f})" for name in names]
        print(f"{n:>9}" + "".join(f"{cell:>20}" for cell in cells))
        if {"prefix", "full"} <= set(names):
            apart, half = difference(found, n)
            print(f"{'':>9}   prefix - full = {apart:+.1f} ± {half:.1f} (95 %)")
