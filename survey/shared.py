"""What the claims share: runs that are made once, the tasks they are made on, notes about them, and timings."""

import functools

import torch

from deltas import attach, methods, trainable
from harness import report
from lab.runs import Runs, dev, mean, scores
from lab.timing import side_by_side
from model import Config, Transformer
from survey.ledger import above, pm, share
from train import Diverged

SMALL = "gpt-xs"  # for sweeps: 300 steps in four seconds of a core
# {task: base}. Left out is what measures no adaptation: the frozen base has 99 % of `sentiment`, nobody learns `claim`.
TASKS = {"rating": "gpt-s", "cuisine": SMALL}
REAL = "lora", "adapter", "bitfit"           # these on a real checkpoint
TECHNIQUES = [name for name in methods() if name not in ("full", "intrinsic")]
WIDE = Config(1024, 128, 768, 4, 12, 3072)  # for timings: BERT-base's width, four of its twelve blocks
BATCHES = (4, 16), (4, 64), (16, 64)        # texts, tokens in each


class NotRun(Exception):
    """A result is needed that survey/runs.jsonl does not hold."""


MISSING = NotRun, Diverged


class Bench(Runs):
    """The runs of the claims, and the notes of the entry under way. `real`: {"base", "data"}, two folders, or None."""

    def __init__(self, out="out", seeds=3, real=None, say=print):
        super().__init__(out, seeds, say)
        self.notes, self.real = [], real

    def note(self, text):
        """Add a sentence with numbers to the entry under way."""
        self.notes.append(text)

    def extra(self, part, *given):
        """Call `part(*given)`, whose notes the verdict does not depend on; a note says so if a run is missing."""
        try:
            part(*given)
        except MISSING as missing:
            self.note(f"Not run: {missing}.")

    def timed(self, name, measure, **settings):
        """`kept` of a timing, with a note that says on which machine it was taken."""
        @functools.wraps(measure)
        def here():
            return measure() | {"machine": report.machine()}
        found = self.kept(name, here, **settings)
        self.note(f"Timed on {found['machine']}.")
        return found

    def about(self, record, name, measure, **settings):
        """`kept` of what is measured on the delta that a run has saved."""
        run = {key: value for key, value in record["settings"].items() if key != "device"}
        return self.kept(name, measure, run=run, content=record["content"], **settings)


def on_checkpoint(name, where):
    """The choice of a technique's runs on the real checkpoint: two epochs, an adapter of an eighth of its width.

    So wide an adapter has its own rate: at the default for 8 it comes to nothing on MiniLM.
    """
    return {"epochs": 2.0} | where | ({"bottleneck": 48, "lr": 1e-3} if name == "adapter" else {})


# ---- runs on several tasks ----

def field(bench, task, *names):
    """{technique: records}, each at the rate that dev prefers."""
    return {name: bench.tuned(name, task=task, base=TASKS[task]) for name in names}


def fields(bench, *names):
    """{task: field} of TASKS."""
    return {task: field(bench, task, *names) for task in TASKS}


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
    """Notes how close the best of `names` comes on a real checkpoint; [its verdict]."""
    if not bench.real:
        bench.note(f"Real checkpoint: python eval.py claims --rerun {claim} --real-base MINILM --real-data SST2.")
        return []
    try:
        found = {name: bench.trial(name, **on_checkpoint(name, bench.real)) for name in (*names, "full")}
    except MISSING as missing:
        bench.note(f"Not run: {missing}.")
        return []
    first = found["full"][0]
    label = f"A checkpoint of {first['base_params'] / 1e6:.1f} million parameters on {first['task']}"
    return [closeness(bench, label, found)]


# ---- notes ----

def each(found, show):
    """{"a": 1, "b": 2} as "a 1, b 2", values as `show` has them."""
    return ", ".join(f"{key} {show(value)}" for key, value in found.items())


def score(records):
    return pm(scores(records))


# ---- what is timed ----

def step_of(delta, config, batch_size=32, length=32):
    """A function that takes a training step as train.py does: random weights, random texts with one target each."""
    model = attach(delta, Transformer(config))
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (batch_size, length))
    at = torch.arange(length).expand(batch_size, -1) == length - 1

    def step():
        loss = model(ids, at=at).logsumexp(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return step


def forward_of(model, batch_size, length):
    """A function that reads random tokens with `model`, without gradients."""
    ids = torch.randint(model.config.vocab_size, (batch_size, length))

    @torch.no_grad()
    def forward():
        model(ids)
    return forward


def speedups(bench, name):
    """Full fine-tuning's time of a step over that of `name`, LoRA or an adapter, for each of BATCHES; noted."""
    def measure():
        deltas = {"full": methods()["full"](), "lora": methods()["lora"](rank=8),
                  "adapter": methods()["adapter"](bottleneck=48)}
        pairs = [side_by_side({key: step_of(delta, WIDE, *shape) for key, delta in deltas.items()}, rounds=7)
                 for shape in BATCHES]
        return {key: [1 / ratios[key] for _, ratios in pairs] for key in deltas}
    faster = bench.timed("steps at width 768, full over each", measure)[name]
    named = {f"{texts} texts of {length}": ratio for (texts, length), ratio in zip(BATCHES, faster)}
    bench.note(f"Steps a second over full fine-tuning's, width 768: {each(named, '{:.2f}'.format)}.")
    return faster
