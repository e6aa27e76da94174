"""What the claims share: runs that are made once, the tasks they are made on, notes about them, and timings."""

from os.path import isdir
from pathlib import Path

import torch

from data.bases import SHAPES
from deltas import attach, methods, trainable
from harness import results
from lab.runs import NotRun, Runs, check, dev, mean, scores
from lab.timing import side_by_side
from model import Transformer
from survey.ledger import above, pm, share
from train import Diverged

SMALL = "gpt-xs"  # for sweeps: 300 steps in four seconds of a core
TASKS = "rating", "sentiment", "cuisine"
TECHNIQUES = [name for name in methods() if name not in ("full", "intrinsic")]
REAL_FIELDS = {"adapter": {"bottleneck": 48}}  # an eighth of MiniLM's width
MISSING = NotRun, Diverged


class Bench(Runs):
    """The runs of the claims, and the notes of the entry under way.

    `real` is (a checkpoint's folder, a data folder). Once they are given, results.jsonl remembers them.
    """

    def __init__(self, out="out", seeds=3, real=None, say=print):
        super().__init__(out, seeds, say)
        self.notes = []
        self.real = self.remembered()  # {"base": folder, "data": folder}
        if real:
            found = dict(zip(("base", "data"), (str(Path(folder).resolve()) for folder in real)))
            check(self, [one for name in ("full", *TECHNIQUES)
                         for one in self.plan(name, (0,), **on_checkpoint(name, found))])
            if self.real != found:
                results.append(out, {"method": "measure", "settings": {"measure": "real checkpoint"}, "where": found})
            self.real = found

    def remembered(self):
        """The real checkpoint and its data that results.jsonl names, if these folders are still there."""
        named = [r.get("where") for r in results.read(self.out) if r.get("settings") == {"measure": "real checkpoint"}]
        if not named:
            return None
        where = named[-1] if isinstance(named[-1], dict) else {}
        if lost := [name for name in ("base", "data") if not isdir(str(where.get(name)))]:
            self.say(f"results.jsonl names {where.get(lost[0])} as the real {lost[0]}, which is not there: "
                     "--real-base and --real-data say where it is")
            return None
        return {name: where[name] for name in ("base", "data")}

    def note(self, text):
        """Add a sentence with numbers to the entry under way."""
        self.notes.append(text)

    def extra(self, part, *given):
        """Call `part(*given)`, whose notes the verdict does not depend on; a note says so if a run is missing."""
        try:
            part(*given)
        except MISSING as missing:
            self.note(f"Not run: {missing}.")

    def on_real(self, *names):
        """{technique: records} on the real checkpoint, two epochs at the techniques' own learning rates.

        All seeds; if nothing may be run, those that are kept.
        """
        found = {name: [] for name in names}
        for seed in self.seeds:
            try:
                runs = {name: self.trial(name, (seed,), **on_checkpoint(name, self.real)) for name in names}
            except NotRun:
                if seed == self.seeds[0]:
                    raise
                break
            for name, records in runs.items():
                found[name] += records
        return found


def on_checkpoint(name, where):
    """What a technique's runs on the real checkpoint are made with."""
    return {"epochs": 2.0} | where | REAL_FIELDS.get(name, {})


# ---- runs on several tasks ----

def field(bench, task, *names):
    """{technique: records}, each at the rate that dev prefers: `rating` on gpt-s, the others on gpt-xs."""
    base = "gpt-s" if task == "rating" else SMALL
    return {name: bench.tuned(name, task=task, base=base) for name in names}


def by_task(bench, measure, tasks=TASKS):
    """{task: measure(task)}, as far as the tasks have been run; notes say which have not been."""
    found = {}
    for task in tasks:
        try:
            found[task] = measure(task)
        except MISSING as missing:
            if not found:
                raise
            bench.note(f"Not run: {missing}.")
    if len(found) < len(tasks):
        bench.note(f"Judged so far on {' and '.join(found)} alone.")
    return found


def fields(bench, *names):
    """{task: field} of TASKS."""
    return by_task(bench, lambda task: field(bench, task, *names))


def winner(found):
    """The technique with the highest dev score, full fine-tuning aside."""
    return max((name for name in found if name != "full"), key=lambda name: dev(found[name]))


def closeness(bench, label, found):
    """Notes the best technique's score in percent of full fine-tuning's; the verdict on 95 %."""
    best = winner(found)
    ratios = share(found[best], found["full"])
    bench.note(f"{label}: {best}{' is best,' if len(found) > 2 else ''} {pm(ratios)} % of full "
               f"({each(found, lambda records: f'{mean(scores(records)):.1f}')}).")
    return above(ratios, 95)


def on_real(bench, claim, *names):
    """Notes how close the best of `names` comes on a real checkpoint; [its verdict], [] for a single seed."""
    if not bench.real:
        bench.note(f"Real checkpoint: python eval.py claims {claim} --real-base MINILM --real-data SST2.")
        return []
    try:
        found = bench.on_real(*names, "full")
    except MISSING as missing:
        bench.note(f"Not run: {missing}.")
        return []
    first, seeds = found["full"][0], len(found["full"])
    label = f"A checkpoint of {first['base_params'] / 1e6:.1f} million parameters on {first['task']}"
    verdict = closeness(bench, label + (", one seed" if seeds == 1 else ""), found)
    return [verdict] if seeds > 1 else []


# ---- notes ----

def each(found, show):
    """{"a": 1, "b": 2} as "a 1, b 2", values as `show` has them."""
    return ", ".join(f"{key} {show(value)}" for key, value in found.items())


def score(records):
    return pm(scores(records))


# ---- what is timed ----

def step_of(method, base="gpt-s", batch_size=32, length=32):
    """A function that takes one training step: forward, backward and AdamW; weights and tokens are random."""
    model = attach(methods()[method](), Transformer(SHAPES[base]))
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(SHAPES[base].vocab_size, (batch_size, length))
    at = torch.arange(length).expand(batch_size, -1) == length - 1

    def step():
        loss = model(ids, at=at).logsumexp(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def forward_of(model, batch_size, length):
    """A function that reads random tokens with `model`, without gradients."""
    ids = torch.randint(model.config.vocab_size, (batch_size, length))

    @torch.no_grad()
    def forward():
        model(ids)
    return forward


def speedups(bench, method, base="gpt-s"):
    """Full fine-tuning's time of a step over the method's, at four batch shapes; noted."""
    shapes = [(texts, length) for texts in (8, 32) for length in (16, 64)]

    def measure():
        pairs = [side_by_side({name: step_of(name, base, *shape) for name in (method, "full")}, rounds=9)
                 for shape in shapes]
        return {"ratios": [ratios["full"] for _, ratios in pairs]}
    ratios = bench.kept(f"steps, full over {method}", measure, base=base)["ratios"]
    named = {f"{texts} texts of {length}:": ratio for (texts, length), ratio in zip(shapes, ratios)}
    bench.note(f"{base}, {each(named, '{:.2f}'.format)}.")
    return ratios
