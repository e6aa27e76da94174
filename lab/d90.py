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

import train
from lab.trials import mean, sd, trial

GRID = tuple(2**k for k in range(2, 13))         # 4 to 4096
RATES = (3e-3, 1e-2)


def dev(records):
    return mean([r["dev_score"] for r in records])


def at_dimension(d, seeds, out, say, rates, **choice):
    """The records at dimension d, all seeds, at the rate that the first seed's dev likes best.

    A seed draws the subspace too, not only the examples.
    """
    def run(seed, lr):
        return trial("intrinsic", [seed], out, say, dim=d, lr=lr, projection_seed=seed, **choice)[0]

    tried = {lr: run(seeds[0], lr) for lr in rates}
    best = max(tried, key=lambda lr: tried[lr]["dev_score"])
    return [run(seed, best) for seed in seeds]


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


def measure(seeds=(0, 1, 2), out="out", say=print, grid=GRID, rates=RATES, per_layer=False,
            projection="fastfood", **choice):
    """Everything about one base and task: {full, chance, targets, brackets, curve: {d: (mean, sd)}, D}."""
    full = trial("full", seeds, out, say, **choice)
    goal, chance, curve = dev(full), full[0]["majority_score"], {}
    grid = [d for d in grid if d <= full[0]["base_params"]]

    def reached(d):
        records = at_dimension(d, seeds, out, say, rates, per_layer=per_layer, projection=projection, **choice)
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


def picture(found, folder):
    try:
        import matplotlib
    except ImportError:
        return "no picture: pip install matplotlib"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, one in found.items():
        line = axes.errorbar(list(one["curve"]), [s for s, _ in one["curve"].values()],
                             yerr=[e for _, e in one["curve"].values()], marker="o", capsize=3, label=name)
        axes.axhline(one["targets"]["raw"], color=line[0].get_color(), linestyle=":")
    tried = sorted({d for one in found.values() for d in one["curve"]})
    axes.set(xscale="log", xlabel="d, trained numbers", ylabel="dev score in %",
             title="Score in a random subspace; dotted: 90 % of full")
    axes.set_xticks(tried, tried, minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(folder / "d90.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return f"picture: {folder / 'd90.png'}"


def main(argv):
    parser = argparse.ArgumentParser(prog="eval.py d90", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", default="gpt-s", help="bases with commas between, checkpoints too [gpt-s]")
    parser.add_argument("--tasks", default="rating", help="tasks with commas between [rating]")
    parser.add_argument("--grid", type=train.several(train.positive), default=GRID, metavar="D,D,...",
                        help=f"the dimensions to choose from [{','.join(map(str, GRID))}]")
    parser.add_argument("--rates", type=train.several(float), default=RATES, metavar="LR,LR,...",
                        help=f"learning rates to try at each d [{','.join(map(str, RATES))}]")
    parser.add_argument("--per_layer", "--per-layer", action="store_true", help="SAID: a trained scale a layer")
    parser.add_argument("--projection", choices=("fastfood", "dense"), default="fastfood",
                        help="the random projection P [fastfood]")
    parser.add_argument("--examples", type=train.positive, help="training examples [1000; of your own data: all]")
    parser.add_argument("--seeds", type=train.positive, default=3, help="how many seeds [3]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl [out]")
    train.add_options(parser, without=("base", "task", "examples", "lr", "seed", "scratch"))
    args = parser.parse_args(argv)
    choice = {"examples": 1000 if args.data is None else None} | train.chosen(args)
    found = {}
    for task in args.tasks.split(",") if args.data is None else [None]:
        for base in args.bases.split(","):
            named = choice if task is None else {"task": task} | choice
            name = f"{Path(base).name} on {task or Path(args.data).name}"
            found[name] = measure(range(args.seeds), args.out, grid=sorted(args.grid), rates=args.rates,
                                  per_layer=args.per_layer, projection=args.projection, base=base, **named)
            show(name, found[name])
    print(picture(found, Path(args.out)))
