"""`eval.py compare`: every technique against full fine-tuning, on one base and one task, over seeds.

    row               what it is
    majority          always the most frequent label
    frozen            the base asked with a template written by hand (the verbaliser), nothing trained
    linear probe      logistic regression on the frozen base's last state
    from scratch      full fine-tuning from random weights
    the techniques    with their own default settings; --sweep tries other values
    full              full fine-tuning

Finished runs are read from results.jsonl. An interruption loses the run under way and nothing else.
"""

import argparse
import copy
import csv
import io
import time
from pathlib import Path

import torch

import train
from deltas import METHODS, attach, merge, methods
from lab import linear_probe, results
from lab.trials import mean, scores, sd, settings, steps_to, trial, value

COLUMNS = ("technique", "family", "trained", "%", "stored B", "score", "± sd", "of full", "ms/step", "MB",
           "to 90 %", "latency", "merged")
PICTURES = "score-parameters.png", "score-steps.png"


def table(names, seeds, out, sweep=None, **choice):
    """Rows (a dict a row, keys COLUMNS) of all comparisons; runs what has not been run."""
    full = trial("full", seeds, out, **choice)
    goal = mean(scores(full))
    rows = [plain_row("majority class", full[0]["majority_score"], goal),
            plain_row("frozen base", full[0]["frozen_score"], goal)]
    if full[0]["metric"] == "accuracy":
        probes = [linear_probe.run_once(out, seed=seed, **choice) for seed in seeds]
        rows.append(plain_row("linear probe", mean(scores(probes)), goal, sd(scores(probes)),
                              probes[0]["delta_params"]))
    rows.append(row("from scratch", trial("full", seeds, out, scratch=True, **choice), full))
    for name in names:
        for values in sweep or [{}]:
            label = " ".join([name, *(f"{field}={value}" for field, value in values.items())])
            records = trial(name, seeds, out, **choice, **values)
            rows.append(row(label, records, full, latency(out, records[0])))
    return rows + [row("full fine-tuning", full, full)]


def plain_row(name, score, goal, spread=None, trained=0):
    return {"technique": name, "trained": trained, "score": score, "± sd": spread, "of full": 100 * score / goal}


def row(name, records, full, cost=None):
    """One line of the table from the records of its seeds."""
    first, goal = records[0], mean(scores(full))
    return {
        "technique": name, "family": methods()[first["method"]].family, "trained": first["trained_params"],
        "%": 100 * first["trained_params"] / first["base_params"],
        "stored B": first["stored_bytes"], "score": mean(scores(records)), "± sd": sd(scores(records)),
        "of full": 100 * mean(scores(records)) / goal, "ms/step": mean([r["ms_per_step"] for r in records]),
        "MB": first["peak_mb"], "to 90 %": steps_to(records, 0.9 * mean([r["dev_score"] for r in full])),
        "latency": cost and cost["ratio"], "merged": cost and cost["merged_ratio"],
        "command": command(first),
    }


def command(record):
    """The command that repeats a run."""
    chosen, words = record["settings"], []
    default = settings(record["method"]).key | {"steps": 300}
    for name, given in chosen.items():
        if name not in ("method", "device") and given != default[name] and not (name == "task" and chosen["data"]):
            flag = f"--{name}" if given else f"--no-{name}"
            words.append(flag if isinstance(given, bool) else f"--{name} {given}")
    return " ".join([f"python train.py --method {record['method']}", *words])


# ---- latency: forward time against the base's, side by side ----

def latency(out, record, rounds=20):
    """{"ratio", "merged_ratio"}: time of a forward pass (batch 16) over the base's, medians of paired rounds.

    merged_ratio is None where the technique cannot be merged. Measured once, then kept in results.jsonl.
    """
    key = {"measure": "latency"} | {k: v for k, v in record["settings"].items() if k != "seed"}
    known = results.find(out, key)
    if known:
        return known
    base, tokenizer, task = train.prepare(train_settings(record))
    _, ids, keep, targets = next(train.tasks.batches((task.test or task.dev)[:16], 16, tokenizer.pad))
    model = attach(train_settings(record).delta, copy.deepcopy(base))
    model.delta.finish(model)
    try:
        merged = merge(copy.deepcopy(model))
    except ValueError:
        merged = None
    batch = ids.to(record["device"]), keep.to(record["device"]), (targets != -100).to(record["device"])
    known = {"settings": key, "method": "latency", "ratio": ratio(model, base, batch, rounds),
             "merged_ratio": merged and ratio(merged, base, batch, rounds)}
    results.append(out, known)
    return known


def train_settings(record):
    return settings(**{k: v for k, v in record["settings"].items()})


@torch.no_grad()
def ratio(model, base, batch, rounds):
    """The median over rounds of model's time / base's time."""
    def seconds(which):
        begin = time.perf_counter()
        which(batch[0], batch[1], at=batch[2])
        if batch[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin
    seconds(model), seconds(base)
    found = sorted(seconds(model) / seconds(base) for _ in range(rounds))
    return found[rounds // 2]


# ---- table, file, pictures ----

def show(rows):
    widths = (24, 17, 10, 7, 11, 7, 6, 8, 8, 7, 8, 8, 7)
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
    writer = csv.DictWriter(text, [*COLUMNS, "command"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    new = not path.is_file() or path.read_text(encoding="utf-8") != text.getvalue()
    path.write_text(text.getvalue(), encoding="utf-8", newline="\n")
    return new


def pictures(rows, records, folder):
    """score-parameters.png and score-steps.png, where matplotlib is installed; returns what was written."""
    try:
        import matplotlib
    except ImportError:
        return "no pictures: pip install matplotlib"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for one in rows:
        if one["trained"]:
            axes.errorbar(one["trained"], one["score"], yerr=one["± sd"] or 0, fmt="o", capsize=3)
            axes.annotate(one["technique"], (one["trained"], one["score"]), xytext=(5, 5), textcoords="offset points")
    axes.set(xscale="log", xlabel="trained parameters", ylabel="score in %", title="Score against trained parameters")
    figure.savefig(folder / PICTURES[0], dpi=120, bbox_inches="tight")
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, found in records.items():
        steps = [step for step, _ in found[0]["curve"]]
        axes.plot(steps, [mean([r["curve"][i][1] for r in found]) for i in range(len(steps))], label=name)
    axes.set(xlabel="step", ylabel="dev score in %", title="Score against steps")
    axes.legend()
    figure.savefig(folder / PICTURES[1], dpi=120, bbox_inches="tight")
    plt.close("all")
    return "pictures: " + ", ".join(str(folder / name) for name in PICTURES)


def sweep_values(texts):
    """["lr=1e-3,1e-2"] -> [{"lr": 0.001}, {"lr": 0.01}]; several fields multiply.

    Values that hold commas themselves have semicolons between: "targets=query;query,value".
    """
    found = [{}]
    for text in texts:
        name, _, values = text.partition("=")
        if not values:
            raise ValueError(f"--sweep {text}: write field=value,value")
        found = [one | {name: value(name, v)} for one in found for v in values.split(";" if ";" in values else ",")]
    return found


def main(argv):
    parser = argparse.ArgumentParser(prog="eval.py compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="names with commas between [all]",
                        default=",".join(name for name in METHODS if name != "full"))
    parser.add_argument("--seeds", type=train.positive, default=3, help="how many seeds [3]")
    parser.add_argument("--sweep", nargs="*", default=[], metavar="FIELD=V,V",
                        help="any field of a technique or of training; 'targets=query;query,value' where "
                        "a value has commas")
    parser.add_argument("--out", default="out", help="folder of results.jsonl, the table and the pictures [out]")
    train.add_options(parser, without=("lr", "seed", "scratch"))
    args = parser.parse_args(argv)
    names = args.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"--methods {unknown[0]}: choose from {', '.join(METHODS)}")
    out, seeds = Path(args.out), range(args.seeds)
    choice = train.chosen(args)
    rows = table(names, seeds, out, sweep_values(args.sweep), **choice)
    print()
    show(rows)
    new = write_csv(rows, out / "compare.csv")
    print(f"\ntable: {out / 'compare.csv'}, with the command that repeats each row")
    if not new and (out / PICTURES[-1]).is_file():  # drawing takes longer than all the rest
        return print("pictures: as they were")
    curves = {} if args.sweep else {name: trial(name, seeds, out, **choice) for name in [*names, "full"]}
    print(pictures(rows, curves, out))
