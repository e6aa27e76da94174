"""`eval.py d90`: the smallest number of trained dimensions that reaches 90 % of full fine-tuning.

    d90 = min { d : score(d) >= 0.9 score(full) }        score(d): dev, mean over seeds, theta = theta_0 + P z

Aghajanyan et al. 2021, section 3. Their target can lie below chance, so a second one is reported beside it:
c + 0.9 (score(full) - c), c the majority class. The grid of d is bisected; the next larger d has to meet the
target too. A d90 found so is an upper bound, and a bracket: the largest d tried that fails, the smallest that
does not. Several bases or tasks make "larger model, smaller d90" and "harder task, larger d90" one command:

    python eval.py d90 --bases gpt-xs,gpt-s,gpt-m --tasks sentiment,rating
"""

from dataclasses import fields
from pathlib import Path

from deltas import methods
from harness.settings import Parser, Settings, add_options, chosen, distinct, positive, several
from lab import pictures
from lab.runs import Runs, check, dev, sd
from model import Refused

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


def plan(runs, grid, rates, **choice):
    """The Settings of all runs that a measurement may need, of subspaces the first seed's."""
    own = {f.name for f in fields(methods()["intrinsic"])}
    full = {name: value for name, value in choice.items() if name not in own}
    return [*runs.plan("full", **full), *(one for d in grid for one in runs.plan_tuned(
        "intrinsic", rates, seeded=("projection_seed",), dim=d, **choice))]


def measure(runs, grid=GRID, rates=None, per_layer=False, projection="fastfood", **choice):
    """Everything about one base and task: {full, chance, targets, brackets, curve: {d: (mean, sd)}, D}.

    The target is full fine-tuning's of the pretrained base, also with random weights (`scratch`).
    """
    full, curve = runs.trial("full", **choice | {"scratch": False}), {}
    goal, chance = dev(full), full[0]["majority_score"]
    D = full[0]["base_params"]
    if not (grid := [d for d in grid if d <= D]):
        raise Refused(f"no d of the grid is at most D = {D:,}")

    def reached(d):
        records = at(runs, d, rates, per_layer=per_layer, projection=projection, **choice)
        curve[d] = dev(records), sd([r["dev_score"] for r in records])
        return curve[d][0]

    targets = {"raw": 0.9 * goal, "above chance": chance + 0.9 * (goal - chance)}
    brackets = {name: bracket(reached, target, grid) for name, target in targets.items()}
    return {"full": goal, "chance": chance, "targets": targets, "brackets": brackets,
            "curve": dict(sorted(curve.items())), "D": D}


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
    except Refused as error:
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
    parser, rates = Parser("eval.py d90", __doc__), methods()["intrinsic"].rates
    parser.add_argument("--bases", default="gpt-s", help="bases with commas between, checkpoints too [gpt-s]")
    parser.add_argument("--tasks", help="tasks with commas between [rating]")
    parser.add_argument("--grid", type=several(positive), metavar="D,D,...",
                        help=f"the dimensions to choose from [{','.join(map(str, GRID))}; with --per-layer from 32 on]")
    parser.add_argument("--rates", type=several(float), default=rates, metavar="LR,LR,...",
                        help=f"learning rates to try at each d [{','.join(map(str, rates))}]")
    parser.add_argument("--examples", type=positive, help="training examples [1000; of your own data: all]")
    parser.add_argument("--seeds", type=positive, default=3, help="how many seeds [3]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl [out]")
    add_options(parser, methods()["intrinsic"], without=("dim", "projection_seed"))
    add_options(parser, Settings, without=("base", "task", "examples", "lr", "seed", "scratch"))
    args = parser.parse_args(argv)
    if args.data is not None and args.tasks is not None:
        raise Refused(f"--tasks {args.tasks} and --data {args.data}: name one of them")
    choice = {"examples": 1000 if args.data is None else None} | chosen(args, Settings)
    choice |= chosen(args, methods()["intrinsic"])
    tasks = [Path(args.data).resolve().name] if args.data else distinct("--tasks", (args.tasks or "rating").split(","))
    bases = distinct("--bases", args.bases.split(","))
    named = {(base, task): {"base": base} | ({} if args.data else {"task": task}) for task in tasks for base in bases}
    grid = sorted(distinct("--grid", args.grid or [d for d in GRID if d >= 32 or not args.per_layer]))
    found, runs = {}, Runs(args.out, args.seeds)
    check(runs, [one for where in named.values() for one in plan(
        runs, grid if args.grid else grid[:1], distinct("--rates", args.rates), **choice | where)])
    same = len({Path(base).name for base in bases}) < len(bases)  # two folders with one name are told apart by the path
    for (base, task), where in named.items():
        name = f"{base if same else Path(base).name} on {task}"
        found[name] = measure(runs, grid, args.rates, **choice | where)
        show(name, found[name])
    print(picture(found, Path(args.out) / "d90.png"))
