"""`eval.py lowdata`: does prefix tuning beat full fine-tuning where examples are few? (Li & Liang 2021, figure 3)

Both write the same task (describe) from n examples, n = 20 to 500, over seeds that also draw the examples. Both
stop early in the same way, by the dev score, and both have their learning rate picked on dev.
"""

import argparse

import train
from lab.trials import interval, mean, scores, tuned

SIZES = (20, 50, 100, 200, 500)
RATES = {"full": (3e-4, 1e-3), "prefix": (3e-3, 1e-2), "lora": (3e-3, 1e-2), "adapter": (3e-3, 1e-2)}


def table(names=("prefix", "full"), sizes=SIZES, seeds=(0, 1, 2), out="out", say=print, **choice):
    """{(name, n): records} at each method's best learning rate of RATES."""
    choice = {"task": "describe"} | choice
    return {(name, n): tuned(name, {"lr": RATES[name]}, seeds, out, say, examples=n, **choice)
            for n in sizes for name in names}


def difference(found, n, first="prefix", second="full"):
    """(mean, half the 95 % interval) of first - second at n examples, paired by seed."""
    apart = [a - b for a, b in zip(scores(found[first, n]), scores(found[second, n]))]
    return mean(apart), interval(apart)


def main(argv):
    parser = argparse.ArgumentParser(prog="eval.py lowdata", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="prefix,full", help="which of full,prefix,lora,adapter [prefix,full]")
    parser.add_argument("--sizes", type=train.several(train.positive), default=SIZES, metavar="N,N,...",
                        help=f"numbers of training examples [{','.join(map(str, SIZES))}]")
    parser.add_argument("--seeds", type=train.positive, default=3, help="how many seeds [3]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl [out]")
    parser.add_argument("--task", default="describe", help="what is learned from few examples [describe]")
    train.add_options(parser, without=("task", "lr", "seed", "scratch", "examples"))
    args = parser.parse_args(argv)
    names = args.methods.split(",")
    if unknown := set(names) - set(RATES):
        raise ValueError(f"--methods {sorted(unknown)[0]}: choose from {', '.join(RATES)}")
    found = table(names, args.sizes, range(args.seeds), args.out, **train.chosen(args))
    print(f"\n{'examples':>9}" + "".join(f"{name:>20}" for name in names))
    for n in args.sizes:
        cells = [f"{mean(scores(found[name, n])):.1f} (word {mean([r['dev_score'] for r in found[name, n]]):.1f})"
                 for name in names]
        print(f"{n:>9}" + "".join(f"{cell:>20}" for cell in cells))
        if {"prefix", "full"} <= set(names):
            apart, half = difference(found, n)
            print(f"{'':>9}   prefix - full = {apart:+.1f} ± {half:.1f} (95 %)")
