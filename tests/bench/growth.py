"""How it grows: step time and peak memory of every technique, from the smallest base to GPT-2's size.

    python tests/bench/growth.py --minilm FOLDER         all bases: a table, its slopes, out/growth.png
    python tests/bench/growth.py --bases gpt-xs,gpt-s --rounds 5

One batch for all: 8 texts of 64 random tokens, two classes, float32. MiniLM is a checkpoint's folder; models of
BERT-base's and GPT-2's size have random weights. The techniques take turns, and a median of the rounds counts.
Memory is counted as train.py counts it: weights, gradients, optimiser, activations (intrinsic's theta is one). A
process holds more: temporaries, a projection, what malloc keeps. A base once measured is kept in out/results.jsonl.

What to expect, from the FLOPs and bytes of lab/costs.py. Time: a matrix entry costs 2 FLOPs a token forward, 2 for
the gradient of its input, and 2 for its own if it is trained. A step of full fine-tuning is 6 n, one of a delta 4 n:
2/3, and no less while the gradient passes all blocks. Memory: full fine-tuning holds 16 bytes a parameter (weight,
gradient, two moments), a delta 4 and 12 more for its few own: 1/4, and on top of it activations, which stay.
The slope is b in c D^b, by least squares of the logarithms: near 1; below it in time, where small bases wait for
Python more than for arithmetic, and where embeddings add to D and not to the work.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from harness import boundary

if __name__ == "__main__":
    boundary.begin()  # before torch is imported

import copy
import json

import numpy
import torch

from data import tasks
from data.bases import SHAPES, load_base
from data.tasks import Example, Task
from deltas import attach, count, methods, trainable
from harness import checks, identity, report
from harness.settings import Parser, Settings, distinct, positive
from lab import pictures
from lab.runs import Runs
from lab.sizes import SIZES, size
from lab.timing import side_by_side
from model import Refused, Transformer

TEXTS, TOKENS = 8, 64
BASES = "gpt-xs", "gpt-s", "gpt-m", "gpt-l", "MiniLM", "bert-base-uncased", "gpt2"
METHODS = ["full", *(name for name in methods() if name != "full")]  # the baseline first: ratios are over it


def base(name):
    """The model `name`, or of a folder, with a Classifier: random weights where only its size is known."""
    model = Transformer(size(name)) if name in SIZES else load_base(name)[0]
    model.classify(2)
    return model.eval()


def batch_for(config):
    """A Task of one batch: a text's class is read at its last token (GPT) or its first."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (TEXTS, TOKENS), generator=generator).tolist()  # words that every base has
    at = TOKENS - 1 if config.causal else 0
    return Task("random", [Example(row, tasks.only(i % 2, at, TOKENS), "", ["x"]) for i, row in enumerate(ids)], [], [])


def twin(model):
    """A copy with parameters of its own in the same memory; at a learning rate of 0 all techniques can share it."""
    return copy.deepcopy(model, {id(p): torch.nn.Parameter(p.data) for p in model.parameters()})


def stepper(model, task, settings):
    """A step of train.py's loop, all but its schedule."""
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    batch = [t.to(settings.device) for t in tasks.collate(task.train, 0)]

    def step():
        loss = tasks.loss(model, task, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()
    return step


def measured(name, rounds):
    """{D, of: {technique: ms, its ratio to full's, flops a token, mb, and held: mb without activations}}."""
    plain, steps, found = base(name), {}, {}
    task = batch_for(plain.config)
    for method in METHODS:
        settings = Settings(methods()[method](), batch_size=TEXTS)
        plain.to(settings.device)
        model = attach(settings.delta.for_task(task), twin(plain))
        memory = checks.memory_of_a_step(model, task, 0, settings)
        found[method] = {"mb": memory["peak"], "held": memory["peak"] - memory["activations"],
                         "flops": settings.delta.flops(plain.config, TOKENS)[1]}
        steps[method] = stepper(model, task, settings)
    steps["."] = lambda: print(".", end="", flush=True)  # every round, so that one sees it move
    ms, ratio = side_by_side(steps, rounds)
    print()
    return {"D": count(model).base, "of": {m: found[m] | {"ms": ms[m], "ratio": ratio[m]} for m in METHODS}}


def slope(found, method, what):
    """b in c D^b, over all bases."""
    points = [(one["D"], one["of"][method][what]) for one in found.values()]
    return numpy.polyfit(*numpy.log(points).T, 1)[0]


def table(found):
    """Two lines a base, and the slopes; then what each technique takes of full fine-tuning's, on the largest base."""
    def line(name, D, unit, cells, form):
        print(f"{name:<18}{D:>12} {unit:<3}" + "".join(f"{format(cell, form):>12}" for cell in cells))
    line("", "D", "", METHODS, "")
    for name, one in found.items():
        line(name, f"{one['D']:,}", "ms", [one["of"][m]["ms"] for m in METHODS], ",.1f")
        line("", "", "MB", [one["of"][m]["mb"] for m in METHODS], ",.1f")
    if len(found) > 1:
        line("slope", "", "ms", [slope(found, m, "ms") for m in METHODS], ".2f")
        line("", "", "MB", [slope(found, m, "mb") for m in METHODS], ".2f")
    name = max(found, key=lambda name: found[name]["D"])
    of = found[name]["of"]
    print(f"\n{name}, of full fine-tuning's")
    for label, what in (("time", "ratio"), ("  FLOPs", "flops"), ("memory", "mb"), ("  but activations", "held")):
        line(label, "", "", [of[m][what] / of["full"][what] for m in METHODS], ".2f")


def draw(found, path):
    try:
        figure, plots = pictures.figure(2)
    except Refused as error:
        return f"no picture: {error}"
    for plot, what, unit in zip(plots, ("ms", "mb"), ("ms a step", "MB at a step's peak")):
        for m in METHODS:
            plot.loglog([one["D"] for one in found.values()], [one["of"][m][what] for one in found.values()],
                        marker="o", label=f"{m}, slope {slope(found, m, what):.2f}")
        plot.set(xlabel="D, parameters of the base", ylabel=unit)
        plot.legend()
    pictures.save(figure, path)
    return f"picture: {path}"


def main():
    parser = Parser("growth.py", __doc__)
    parser.add_argument("--bases", default=",".join(BASES), help=f"with commas between [{','.join(BASES)}]")
    parser.add_argument("--minilm", metavar="FOLDER", help="MiniLM's checkpoint; without it MiniLM is left out")
    parser.add_argument("--rounds", type=positive, default=12, help="turns, after one to warm up [12]")
    parser.add_argument("--json", action="store_true", help="one line a base and technique instead of the table")
    parser.add_argument("--out", default="out", metavar="DIR", help="folder for results.jsonl and growth.png [out]")
    args = parser.parse_args()
    runs, found = Runs(args.out), {}
    print(report.machine())
    for name in distinct("--bases", args.bases.split(","), [*SHAPES, *BASES[-3:]]):
        if name == "MiniLM" and args.minilm is None:
            print("MiniLM is left out: --minilm FOLDER says where it is")
            continue
        folder, content = args.minilm if name == "MiniLM" else name, {}
        for kind in methods().values():
            content |= identity.content(folder, None, kind)
        found[name] = runs.kept("growth", lambda: measured(folder, args.rounds), base=name, rounds=args.rounds,
                                machine=report.machine(), content=content)
    if args.json:
        return [print(json.dumps({"base": name, "D": one["D"], "technique": method} | values))
                for name, one in found.items() for method, values in one["of"].items()]
    if found:
        table(found)
    if len(found) > 1:
        print(draw(found, Path(args.out) / "growth.png"))


if __name__ == "__main__":
    boundary.run(main)
