"""`eval.py rates`: is a default learning rate a good one on bases and tasks that it was not found on?

Every technique at every rate of its grid, judged on dev. A line for each base and task: the scores in the order of
the rates, the default's in brackets, and by how much it falls short of the best one. A default that is three points
short anywhere is no default, or its --help says so.
"""

from deltas import methods
from harness.settings import Parser, Settings, add_options, chosen, distinct, positive, settings_of, several
from lab.runs import Runs, check, dev
from train import Diverged


def plan(runs, name, rates, **choice):
    """{rate: its Settings, one a seed}: the technique's grid or `rates`, and the default among them, ascending."""
    default = settings_of(name, **choice).lr
    return {lr: runs.plan(name, lr=lr, **choice) for lr in sorted({default, *(rates or methods()[name].rates)})}


def row(runs, name, rates, **choice):
    """({rate: mean dev score, None where it diverges}, the default rate, its shortfall in points)."""
    found, default = {}, settings_of(name, **choice).lr
    for lr in plan(runs, name, rates, **choice):
        try:
            found[lr] = dev(runs.trial(name, lr=lr, **choice))
        except Diverged:
            found[lr] = None
    return found, default, max(s for s in found.values() if s is not None) - (found[default] or 0)


def main(argv):
    parser = Parser("eval.py rates", __doc__)
    parser.add_argument("--methods", default=",".join(methods()), help="names with commas between [all]")
    parser.add_argument("--bases", default="gpt-xs,gpt-s,gpt-m,bert-s", help="or folders [gpt-xs,gpt-s,gpt-m,bert-s]")
    parser.add_argument("--tasks", default="rating,cuisine", help="of the little world [rating,cuisine]; or --data")
    parser.add_argument("--rates", type=several(float), metavar="LR,LR,...", help="for all [each technique's grid]")
    parser.add_argument("--seeds", type=positive, default=1, help="how many seeds [1]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl [out]")
    add_options(parser, Settings, without=("base", "task", "lr", "seed", "scratch"))
    args = parser.parse_args(argv)
    names, choice = distinct("--methods", args.methods.split(","), methods()), chosen(args, Settings)
    tasks = [{}] if args.data else [{"task": task} for task in distinct("--tasks", args.tasks.split(","))]
    places = [{"base": base, **task, **choice} for base in distinct("--bases", args.bases.split(",")) for task in tasks]
    runs, rates = Runs(args.out, args.seeds), distinct("--rates", args.rates or [])
    check(runs, [one for name in names for place in places
                 for group in plan(runs, name, rates, **place).values() for one in group])
    for name in names:
        print(f"\n{name:<28}{'default short of the best by':>32}")
        for place in places:
            found, default, short = row(runs, name, rates, **place)
            cells = [("[{}]" if lr == default else "{}").format(f"{lr:g}: {'-' if s is None else f'{s:.1f}'}")
                     for lr, s in found.items()]
            where = settings_of(name, **place)
            print(f"  {where.base.split('/')[-1] + ' ' + where.task:<22}{short:5.1f}   {'  '.join(cells)}")
