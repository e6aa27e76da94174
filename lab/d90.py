"""`eval.py d90`: the smallest number of trained dimensions that reaches 90 % of full fine-tuning.

    d90 = min { d : score(d) >= 0.9 score(full) }        score(d): theta = theta_0 + P z, on test

Aghajanyan et al. 2021, section 3. Both sides are tuned alike: dev picks the learning rate, from equally many, and the
step; test judges. Each seed draws examples, subspace and test, and has a d90 of its own. Their target can lie below
chance, so a second one is reported beside it: c + 0.9 (score(full) - c), c the majority class.
The grid of d is bisected; the next larger d has to meet the target too. A d90 found so is an upper bound, and a
bracket: the largest d tried that fails, the smallest that does not. d = 0 is the frozen base or, where a Classifier
answers, the Classifier alone: its parameters train beside every d. Several bases or tasks are one command:

    python eval.py d90 --bases gpt-xs,gpt-s,gpt-m --tasks rating,cuisine
"""

from dataclasses import dataclass, fields
from pathlib import Path

from data.bases import SHAPES
from deltas import Delta, methods
from harness.settings import Parser, Settings, add_options, chosen, distinct, positive, several
from lab import pictures
from lab.runs import Runs, check, mean, sd, trained
from model import Refused

GRID = tuple(2**k for k in range(5, 13))  # 32 to 4096: a scale for each layer takes some of them


@dataclass
class HeadAlone(Delta):
    """Nothing but the Classifier is trained."""

    def attach(self, model):
        return model


def at(runs, d, seed, rates=None, **choice):
    """The record at dimension d of a seed, which draws the subspace too, at the rate with the best dev score."""
    return runs.tuned("intrinsic", rates, (seed,), seeded=("projection_seed",), dim=d, **choice)[0]


def full_rates(base, number):
    """The learning rates of full fine-tuning, as many as the subspace has: a thousand examples take high ones."""
    return ((1e-3, 3e-3, 3e-4, 1e-4) if base in SHAPES else (5e-5, 2e-4, 1e-4, 2e-5))[:number]


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
    return [*(one for lr in full_rates(full["base"], len(rates)) for one in runs.plan("full", lr=lr, **full)),
            *(one for d in grid for one in runs.plan_tuned(
                "intrinsic", rates, seeded=("projection_seed",), dim=d, **choice))]


def measure(runs, grid=GRID, rates=None, per_layer=False, projection="fastfood", **choice):
    """Everything about one base and task: {full, chance, targets, brackets, curve, D, head}, a value for each seed.

    `curve` is {d: scores of the seeds that tried it}, d = 0 first; `head` counts the Classifier's parameters.
    The target is full fine-tuning's of the pretrained base, also with random weights (`scratch`).
    """
    rates = rates or methods()["intrinsic"].rates
    tuned = full_rates(choice["base"], len(rates))
    full = [runs.tuned("full", tuned, (seed,), **choice | {"scratch": False})[0] for seed in runs.seeds]
    D, head, curve, zero = full[0]["base_params"], full[0]["head_params"], {}, {}
    if not (grid := [d for d in grid if d <= D]):
        raise Refused(f"no d of the grid is at most D = {D:,}")
    goals, chances = ([r[name] for r in full] for name in ("score", "majority_score"))
    targets = {"raw": [0.9 * goal for goal in goals],
               "above chance": [chance + 0.9 * (goal - chance) for goal, chance in zip(goals, chances)]}

    def reached(d, seed):
        record = at(runs, d, seed, rates, per_layer=per_layer, projection=projection, **choice)
        if seed not in zero:
            zero[seed] = head_alone(runs, seed, **choice) if head else record["frozen_score"]
        curve.setdefault(d, {})[seed] = record["score"]
        return record["score"]

    brackets = {kind: [bracket(lambda d, seed=seed: reached(d, seed), target, grid)
                       for seed, target in zip(runs.seeds, values)] for kind, values in targets.items()}
    return {"full": goals, "chance": chances, "targets": targets, "brackets": brackets, "D": D, "head": head,
            "curve": {d: [found[seed] for seed in sorted(found)] for d, found in [(0, zero), *sorted(curve.items())]}}


def head_alone(runs, seed, **choice):
    """The score where d = 0 and a Classifier answers."""
    settings, = runs.plan("full", (seed,), **choice)
    return runs.kept("head alone", lambda: trained(settings, HeadAlone()), **settings.key)["score"]


def text(low, high):
    """A bracket, as it is printed."""
    return f"> {low}" if high is None else f"<= {high}" if low is None else f"({low}, {high}]"


def show(name, found):
    """One line with each seed's bracket for each kind of target, and one for each d that was tried."""
    def row(d, scores, more=""):
        print(f"  {d:>6}  {mean(scores):5.1f} ± {sd(scores):4.1f}  {'#' * round(mean(scores) / 2)}{more}")
    head = f"   and {found['head']:,} of a Classifier beside every d" if found["head"] else ""
    print(f"\n{name}   D = {found['D']:,}{head}   chance {mean(found['chance']):.1f}")
    for kind, targets in found["targets"].items():
        print(f"  d90 {kind:<13} target {mean(targets):5.1f}   {'  '.join(text(*b) for b in found['brackets'][kind])}")
    for d, scores in found["curve"].items():
        row(d, scores, f"  {len(scores)} of {len(found['full'])} seeds" if len(scores) < len(found["full"]) else "")
    row("full", found["full"])


def picture(found, path):
    """Draw score against d, a curve for each base and task; says where, or what to install."""
    try:
        figure, axes = pictures.figure()
    except Refused as error:
        return f"no picture: {error}"
    for name, one in found.items():
        tried = {d: scores for d, scores in one["curve"].items() if d}  # a logarithmic axis has no zero
        line = axes.errorbar(list(tried), [mean(scores) for scores in tried.values()],
                             yerr=[sd(scores) for scores in tried.values()], marker="o", capsize=3, label=name)
        axes.axhline(mean(one["targets"]["raw"]), color=line[0].get_color(), linestyle=":")
    tried = sorted({d for one in found.values() for d in one["curve"] if d})
    axes.set(xscale="log", xlabel="d, trained parameters", ylabel="test score in %",
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
                        help=f"the dimensions to choose from [{','.join(map(str, GRID))}]")
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
    grid = sorted(distinct("--grid", args.grid or GRID))
    found, runs = {}, Runs(args.out, args.seeds)
    check(runs, [one for where in named.values() for one in plan(
        runs, grid if args.grid else grid[:1], distinct("--rates", args.rates), **choice | where)])
    same = len({Path(base).name for base in bases}) < len(bases)  # two folders with one name are told apart by the path
    for (base, task), where in named.items():
        name = f"{base if same else Path(base).name} on {task}"
        found[name] = measure(runs, grid, args.rates, **choice | where)
        show(name, found[name])
    print(picture(found, Path(args.out) / "d90.png"))
