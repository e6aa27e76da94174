"""`eval.py d90`: the smallest number of trained dimensions that reaches 90 % of full fine-tuning.

    d90 = min { d : score(d) >= 0.9 score(full) }        score(d): dev, mean over seeds, theta = theta_0 + P z

Aghajanyan et al. 2021, section 3. Their target can lie below chance, so a second one is reported beside it:
c + 0.9 (score(full) - c), c the majority class. The grid of d is bisected; the next larger d has to meet the
target too. A d90 found so is an upper bound, and a bracket: the largest d tried that fails, the smallest that
does not. Several bases or tasks make "larger model, smaller d90" and "harder task, larger d90" one command:

    python eval.py d90 --bases gpt-xs,gpt-s,gpt-m --tasks sentiment,rating
"""

import argparse
from pathlib import Path

from deltas import methods
from harness.settings import Settings, add_options, chosen, positive, several
from lab import pictures
from lab.runs import Runs, dev, sd

GRID = tuple(2**k for k in range(2, 13))         # 4 to 4096


def at(runs, d, rates=None, **choice):
    """The records at dimension d, all seeds, at the rate with the first seed's best dev score.

    A seed draws the subspace too, not only the examples.
    """
    return runs.tuned("intrinsic", rates, seeded=("projection_seed",), dim=d, **choice)


def bracket(reached, target, grid=GRID):
    """(largest d that fails, smallest that meets `target`) by bisection; None where the grid ends.

    `reached(d)` is the score at d. A d counts only if the next larger one meets the target as well.
    """
    low, high = -1, len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        if reached(grid[middle]) >= target:
            high = middle
        else:
            low = middle
        if high - low == 1 and high + 1 < len(grid) and reached(grid[high + 1]) < target:
            low, high = high + 1, len(grid)
    return (grid[low] if low >= 0 else None), (grid[high] if high < len(grid) else None)


def measure(runs, grid=GRID, rates=None, per_layer=False, projection="fastfood", **choice):
    """Everything about one base and task: {full, chance, targets, brackets, curve: {d: (mean, sd)}, D}.

    The target is full fine-tuning's of the pretrained base, also with random weights (`scratch`).
    """
    full, curve = runs.trial("full", **choice | {"scratch": False}), {}
    goal, chance = dev(full), full[0]["majority_score"]
    grid = [d for d in grid if d <= full[0]["base_params"]]

    def reached(d):
        records = at(runs, d, rates, per_layer=per_layer, projection=projection, **choice)
        curve[d] = dev(records), sd([r["dev_score"] for r in records])
        return curve[d][0]

    targets = {"raw": 0.9 * goal, "above chance": chance + 0.9 * (goal - chance)}
    brackets = {name: bracket(reached, target, grid) for name, target in targets.items()}
    return {"full": goal, "chance": chance, "targets": targets, "brackets": brackets,
            "curve": dict(sorted(curve.items())), "D": full[0]["base_params"]}


def show(name, found):
    """One line with the brackets, and one for each d that was tried."""
    def text(bracket):
        low, high = bracket
        return f"> {low}" if high is None else f"<= {high}" if low is None else f"({low}, {high}]"
    print(f"\n{name}   D = {found['D']:,}   full {found['full']:.1f}   chance {found['chance']:.1f}")
    for kind, target in found["targets"].items():
        print(f"  d90 {kind:<13} target {target:5.1f}   {text(found['brackets'][kind])}")
    for d, (score, spread) in found["curve"].items():
        print(f"  {d:>6}  {score:5.1f} ± {spread:4.1f}  {'#' * round(score / 2)}")


def picture(found, path):
    """Draw score against d, a curve for each base and task; says where, or what to install."""
    try:
        figure, axes = pictures.figure()
    except ImportError as error:
        return f"no picture: {error}"
    for name, one in found.items():
        line = axes.errorbar(list(one["curve"]), [s for s, _ in one["curve"].values()],
                             yerr=[e for _, e in one["curve"].values()], marker="o", capsize=3, label=name)
        axes.axhline(one["targets"]["raw"], color=line[0].get_color(), linestyle=":")
    tried = sorted({d for one in found.values() for d in one["curve"]})
    axes.set(xscale="log", xlabel="d, trained parameters", ylabel="dev score in %",
             title="Score in a random subspace; dotted: 90 % of full")
    axes.set_xticks(tried, tried, minor=False)
    axes.minorticks_off()
    axes.legend()
    pictures.save(figure, path)
    return f"picture: {path}"


def main(argv):
    parser = argparse.ArgumentParser(prog="eval.py d90", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", default="gpt-s", help="bases with commas between, checkpoints too [gpt-s]")
    parser.add_argument("--tasks", default="rating", help="tasks with commas between [rating]")
    parser.add_argument("--grid", type=several(positive), default=GRID, metavar="D,D,...",
                        help=f"the dimensions to choose from [{','.join(map(str, GRID))}]")
    rates = methods()["intrinsic"].rates
    parser.add_argument("--rates", type=several(float), default=rates, metavar="LR,LR,...",
                        help=f"learning rates to try at each d [{','.join(map(str, rates))}]")
    parser.add_argument("--examples", type=positive, help="training examples [1000; of your own data: all]")
    parser.add_argument("--seeds", type=positive, default=3, help="how many seeds [3]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl [out]")
    add_options(parser, methods()["intrinsic"], without=("dim", "projection_seed"))
    add_options(parser, Settings, without=("base", "task", "examples", "lr", "seed", "scratch"))
    args = parser.parse_args(argv)
    choice = {"examples": 1000 if args.data is None else None} | chosen(args, Settings)
    choice |= chosen(args, methods()["intrinsic"])
    found, runs = {}, Runs(args.out, args.seeds)
    for task in args.tasks.split(",") if args.data is None else [None]:
        for base in args.bases.split(","):
            named = choice if task is None else {"task": task} | choice
            name = f"{Path(base).name} on {task or Path(args.data).name}"
            found[name] = measure(runs, sorted(args.grid), args.rates, base=base, **named)
            show(name, found[name])
    print(picture(found, Path(args.out) / "d90.png"))
