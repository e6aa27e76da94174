"""`eval.py compare`: every technique against full fine-tuning, on one base and one task, over seeds.

    row               what it is
    majority          always the most frequent label
    frozen            the base asked with a template written by hand (the verbaliser), nothing trained
    linear probe      logistic regression on the frozen base's last state, where the answer is asked for
    probe of the mean the same on the mean of a text's states, where a Classifier answers
    from scratch      full fine-tuning from random weights
    the techniques    with their own default settings; --sweep tries other values
    full              full fine-tuning

"forgets" is what the delta of the first seed adds to the pretraining loss, in nats a word.
Finished runs are read from results.jsonl. An interruption loses the run under way and nothing else.
"""

import copy
import csv
import io
import shlex
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

import train
from data import files, tasks
from data.bases import SHAPES
from deltas import attach, merge, methods
from harness.settings import Parser, Settings, add_options, chosen, distinct, positive, settings_from, value
from lab import linear_probe, pictures
from lab.forgotten import forgotten
from lab.runs import Runs, check, dev, mean, scores, sd, steps_to
from lab.timing import side_by_side
from model import Refused

COLUMNS = ("technique", "family", "trained", "%", "stored B", "score", "± sd", "of full", "ms/step", "MB",
           "to 90 %", "latency", "merged", "forgets")
PICTURES = "score-parameters.png", "score-steps.png"


def table(runs, names, sweep, **choice):
    """Rows (a dict a row, keys COLUMNS) of all comparisons; runs what has not been run."""
    check(runs, plan(runs, names, sweep, **choice))
    full = runs.trial("full", **choice)
    goal = mean(scores(full))
    rows = [plain_row(label, mean([r[name] for r in full]), goal)
            for label, name in (("majority class", "majority_score"), ("frozen base", "frozen_score"))]
    if full[0]["metric"] == "accuracy":
        for average in (False, True) if full[0]["head_params"] else (False,):
            probes = [linear_probe.probe(runs, seed, average, **choice) for seed in runs.seeds]
            name = "probe of the mean" if average else "linear probe"
            rows.append(plain_row(name, mean(scores(probes)), goal, sd(scores(probes)), probes[0]["delta_params"]))
    rows.append(row("from scratch", runs.trial("full", scratch=True, **choice), full))
    for name in names:
        for values in sweep:
            label = " ".join([name, *(f"{field}={value}" for field, value in values.items())])
            try:
                records = runs.trial(name, **choice | values)
                rows.append(row(label, records, full, latency(runs, records[0]), forgets(runs, records[0])))
            except train.Diverged:
                rows.append({"technique": label, "family": methods()[name].family, "score": "diverged"})
    return rows + [row("full fine-tuning", full, full, lost=forgets(runs, full[0]))]


def plan(runs, names, sweep, **choice):
    """The Settings of all runs of a table."""
    return [*runs.plan("full", **choice), *runs.plan("full", scratch=True, **choice),
            *(one for name in names for values in sweep for one in runs.plan(name, **choice | values))]


def plain_row(name, score, goal, spread=None, trained=0):
    return {"technique": name, "trained": trained, "score": score, "± sd": spread, "of full": share(score, goal)}


def share(score, goal):
    """A score in percent of full fine-tuning's; None where that is 0."""
    return 100 * score / goal if goal else None


def row(name, records, full, cost=None, lost=None):
    """One line of the table from the records of its seeds."""
    first, goal = records[0], mean(scores(full))
    return {
        "technique": name, "family": methods()[first["method"]].family, "trained": first["trained_params"],
        "%": 100 * first["trained_params"] / first["base_params"],
        "stored B": first["stored_bytes"], "score": mean(scores(records)), "± sd": sd(scores(records)),
        "of full": share(mean(scores(records)), goal), "ms/step": mean([r["ms_per_step"] for r in records]),
        "MB": first["peak_mb"], "machine": first["machine"], "to 90 %": steps_to(records, 0.9 * dev(full)),
        "latency": cost and cost["ratio"], "merged": cost and cost["merged_ratio"], "forgets": lost,
        "command": command(first), "curve": mean_curve(records),
    }


def mean_curve(records):
    """[(step, dev score)], the mean over seeds."""
    return [(points[0][0], mean([score for _, score in points])) for points in zip(*(r["curve"] for r in records))]


def command(record):
    """The command that repeats a run."""
    settings = settings_from(record)
    default = Settings(settings.delta, base=settings.base).plain | asdict(type(settings.delta)()) | {
        "base": Settings.base}
    words, given = ["python", "train.py", "--method", record["method"]], settings.plain | settings.where
    for name, one in given.items():
        if one is None or one == default[name] or name == "device" or name == "task" and given["data"]:
            continue
        if isinstance(one, bool):
            words.append(f"--{name}" if one else f"--no-{name}")
        else:  # a value that begins with a dash would be read as an option
            words += [f"--{name}={one}"] if str(one).startswith("-") else [f"--{name}", str(one)]
    return shlex.join(words)


# ---- latency: forward time against the base's, side by side ----

def latency(runs, record, rounds=20):
    """{"ratio", "merged_ratio"}: time of a forward pass (batch 16) over the base's.

    merged_ratio is None where the technique cannot be merged.
    """
    settings = settings_from(record)

    @torch.no_grad()
    def measure():
        base, tokenizer, task = train.prepare(settings)
        _, *batch = next(tasks.batches(task.reported[:16], 16, tokenizer.pad))
        ids, keep, targets = (t.to(settings.device) for t in batch)
        model = attach(settings.delta.for_task(task), copy.deepcopy(base))
        model.delta.finish(model)
        models = {"base": base, "ratio": model}
        try:
            models["merged_ratio"] = merge(copy.deepcopy(model))
        except Refused:
            pass
        passes = {name: lambda one=one: one(ids, keep, at=targets != -100) for name, one in models.items()}
        return {"merged_ratio": None} | side_by_side(passes, rounds)[1]

    return runs.kept("latency", measure, **{name: one for name, one in settings.key.items() if name != "seed"})


def forgets(runs, record):
    """What a run's delta adds to the pretraining loss; None where no words are predicted, or the file is gone."""
    known = record["base"] in SHAPES and not record["head_params"] and (runs.out / record["file"]).is_file()
    return forgotten(runs, record) if known else None


# ---- table, file, pictures ----

def show(rows):
    widths = (24, 17, 10, 7, 11, 7, 6, 8, 8, 7, 8, 8, 7, 8)
    print("".join(f"{name:<{w}}" if i < 2 else f"{name:>{w}}" for i, (name, w) in enumerate(zip(COLUMNS, widths))))
    for one in rows:
        cells = [shown(name, one.get(name)) for name in COLUMNS]
        print("".join(f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths))))


def shown(name, value):
    if value is None:
        return ""
    if name in ("trained", "stored B"):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{2 if name in ('%', 'latency', 'merged') else 0 if name == 'to 90 %' else 1}f}"
    return str(value)


def write_csv(rows, path):
    """Write the table; False if the file held just that already."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, "command"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    written = text.getvalue().encode(errors="surrogateescape")  # a folder's name need not be UTF-8
    new = not path.is_file() or path.read_bytes() != written
    files.replace(path, lambda part: part.write_bytes(written))
    return new


def draw(rows, folder):
    """Write score-parameters.png and score-steps.png; says where, or what to install."""
    try:
        figure, axes = pictures.figure()
    except Refused as error:
        return f"no pictures: {error}"
    for one in rows:
        if one.get("trained"):
            axes.errorbar(one["trained"], one["score"], yerr=one["± sd"] or 0, fmt="o", capsize=3)
            axes.annotate(one["technique"], (one["trained"], one["score"]), xytext=(5, 5), textcoords="offset points")
    axes.set(xscale="log", xlabel="trained parameters", ylabel="score in %", title="Score against trained parameters")
    pictures.save(figure, folder / PICTURES[0])
    figure, axes = pictures.figure()
    for one in rows:
        if "curve" in one:
            axes.plot(*zip(*one["curve"]), label=one["technique"])
    axes.set(xlabel="step", ylabel="dev score in %", title="Score against steps")
    axes.legend()
    pictures.save(figure, folder / PICTURES[1])
    return "pictures: " + ", ".join(str(folder / name) for name in PICTURES)


def sweep_values(texts):
    """["lr=1e-3,1e-2"] -> [{"lr": 0.001}, {"lr": 0.01}]; several fields multiply.

    Values that hold commas themselves have semicolons between: "targets=query;query,value".
    """
    found = [{}]
    for text in texts:
        name, _, values = text.partition("=")
        if not values:
            raise Refused(f"--sweep {files.shown(text)}: write field=value,value")
        if name in found[0]:
            raise Refused(f"--sweep {text}: {name} is swept already")
        if name in ("base", "task", "data", "seed"):
            raise Refused(f"--sweep {text}: all rows have one {name}; choose a field of a technique or of training")
        values = distinct(f"--sweep {name}", [value(name, v) for v in values.split(";" if ";" in values else ",")])
        found = [one | {name: v} for one in found for v in values]
    return found


def main(argv):
    techniques = [name for name in methods() if name != "full"]
    parser = Parser("eval.py compare", __doc__)
    parser.add_argument("--methods", help="names with commas between [all]", default=",".join(techniques))
    parser.add_argument("--seeds", type=positive, default=3, help="how many seeds [3]")
    parser.add_argument("--sweep", nargs="*", default=[], metavar="FIELD=V,V",
                        help="any field of a technique or of training; 'targets=query;query,value' where "
                        "a value has commas")
    parser.add_argument("--out", default="out", help="folder of results.jsonl, the table and the pictures [out]")
    add_options(parser, Settings, without=("lr", "seed", "scratch"))
    args = parser.parse_args(argv)
    choice, out = chosen(args, Settings), Path(args.out)
    names, sweep = distinct("--methods", args.methods.split(","), methods()), sweep_values(args.sweep)
    if twice := sorted(set(sweep[0]) & set(choice)):
        raise Refused(f"--{twice[0]} {choice[twice[0]]}: --sweep sets {twice[0]} already")
    for kind in (Settings, *(methods()[name] for name in names)):
        for values in sweep:  # what is swept is refused as if it had been typed
            chosen(Namespace(**vars(args) | values), kind)
    rows = table(Runs(out, args.seeds), names, sweep, **choice)
    new = write_csv(rows, out / "compare.csv")
    print()
    show(rows)
    print(f"ms/step on {'; '.join(dict.fromkeys(one['machine'] for one in rows if 'machine' in one))}")
    print(f"\ntable: {out / 'compare.csv'}, with the command that repeats each row")
    if not new and (out / PICTURES[-1]).is_file():  # drawing takes longer than all the rest
        return print("pictures: as they were")
    print(draw(rows, out))
