"""What the claims stand on: runs and timings that are done once, and exact work on a tiny model."""

import json
import math
import time
from pathlib import Path

import torch

from data.bases import SHAPES
from deltas import attach, methods, trainable
from lab import results, trials
from lab.ledger import pm
from lab.trials import scores
from model import Config, Transformer

TINY = Config(vocab_size=17, n_ctx=12, d_model=12, n_layer=2, n_head=3, d_ff=20)
REAL = {"epochs": 2.0, "steps": None}            # on a real checkpoint, at the techniques' own learning rates
REAL_FIELDS = {"adapter": {"bottleneck": 48}}    # an eighth of MiniLM's width
RATES = {  # learning rates that dev chooses from, on the little world's bases; the first wins a draw
    "full": (3e-4, 1e-4, 1e-3), "last_layer": (3e-3, 1e-3), "bitfit": (3e-2, 1e-2, 6e-2),
    "adapter": (1e-2, 3e-3), "prompt": (3e-2, 1e-1, 3e-1), "prefix": (3e-3, 1e-2, 3e-2),
    "lora": (1e-2, 3e-3)}
SMALL = "gpt-xs"  # for sweeps: 300 steps in four seconds of a core


class NotRun(Exception):
    """A number is wanted that results.jsonl does not hold, and nothing may be run now."""


class Bench:
    """Records of runs and measurements: read from `out`/results.jsonl, or made now if `run` allows it.

    `always` overrules the settings of every run. `real` is (a checkpoint's folder, a data folder), remembered
    in results.jsonl once it has been named.
    """

    def __init__(self, out="out", seeds=3, run=False, real=None, say=print, **always):
        self.out, self.seeds, self.always = Path(out), tuple(range(seeds)), always
        self.may_run, self.until, self.say = run, math.inf, say
        self.notes, self.known = [], {name(r["settings"]): r for r in results.read(out)}
        if real:
            key = {"measure": "real checkpoint", "base": str(real[0]), "data": str(real[1])}
            results.append(out, {"method": "measure", "settings": key})
            self.known[name(key)] = {"settings": key}
        keys = [r["settings"] for r in self.known.values()]
        self.real = next((k for k in reversed(keys) if k.get("measure") == "real checkpoint"), None)

    @property
    def running(self):
        """May something new be started? Not after `until`, a time in seconds."""
        return self.may_run and time.time() < self.until

    def note(self, text):
        """Add a sentence with numbers to the entry under way."""
        self.notes.append(text)

    def trial(self, method, seeds=None, **choice):
        """One record a seed: on gpt-s and `rating`, in 300 steps, unless told otherwise."""
        choice = {"base": "gpt-s", "task": "rating", "steps": 300} | choice | self.always
        found = []
        for seed in self.seeds if seeds is None else seeds:
            key = name(trials.settings(method, seed=seed, **choice).key)
            if key not in self.known:
                self.known[key] = self.run_one(method, seed, choice)
            found.append(self.known[key])
        return found

    def run_one(self, method, seed, choice):
        known = results.find(self.out, trials.settings(method, seed=seed, **choice).key)
        if known is None and not self.running:
            task = Path(choice["data"]).name if "data" in choice else choice["task"]
            raise NotRun(f"{method} on {Path(choice['base']).name}, {task}, seed {seed}")
        return known or trials.trial(method, (seed,), self.out, self.say, **choice)[0]

    def tuned(self, method, rates=None, seeds=None, **choice):
        """All seeds at the learning rate of `rates` that dev likes best with the first seed."""
        seeds = self.seeds if seeds is None else seeds
        first = {lr: self.trial(method, seeds[:1], lr=lr, **choice)[0] for lr in rates or RATES[method]}
        best = max(first, key=lambda lr: first[lr]["dev_score"])
        return self.trial(method, seeds, lr=best, **choice)

    def extra(self, part):
        """Call `part()`, whose notes the verdict does not depend on; if it misses a run, only say so."""
        try:
            part()
        except NotRun as missing:
            self.note(f"Not run: {missing}.")

    def on_real(self, *names):
        """{technique: records} on the real checkpoint; if nothing may be run, of the seeds that have been."""
        choice, found = REAL | {"base": self.real["base"], "data": self.real["data"]}, {m: [] for m in names}
        for seed in self.seeds:
            try:
                runs = {m: self.trial(m, (seed,), **choice, **REAL_FIELDS.get(m, {})) for m in names}
            except NotRun:
                if seed == self.seeds[0]:
                    raise
                break
            for method, records in runs.items():
                found[method] += records
        return found

    def kept(self, measure, function, **settings):
        """The dictionary that `function()` returns, measured once and kept under this name and settings."""
        key = {"measure": measure} | settings
        if name(key) not in self.known:
            if not self.running:
                raise NotRun(measure)
            self.say(f"measuring   {measure} {' '.join(f'{k}={v}' for k, v in settings.items())}")
            self.known[name(key)] = {"method": "measure", "settings": key} | function()
            results.append(self.out, self.known[name(key)])
        return self.known[name(key)]


def each(found, show):
    """{"a": 1, "b": 2} as "a 1, b 2", values as `show` has them."""
    return ", ".join(f"{key} {show(value)}" for key, value in found.items())


def score(records):
    return pm(scores(records))


def name(key):
    return json.dumps(key, sort_keys=True)


# ---- exact work on a tiny model ----

def tiny(seed=0, config=TINY, dtype=torch.float64):
    """A small random GPT in float64, and a text (2, 5) for it."""
    torch.manual_seed(seed)
    model = Transformer(config).to(dtype)
    with torch.no_grad():  # so large that every part of it matters, biases too
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, torch.randint(config.vocab_size, (2, 5))


def with_delta(method, model, **fields):
    """`model` with a new delta, all of it in float64."""
    return attach(methods()[method](**fields), model).double()


def gradients(model, ids):
    """{name: largest absolute gradient} of what is trainable, for next-word prediction on the text itself."""
    logits = model(ids[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {key: 0.0 if p.grad is None else p.grad.abs().max().item() for key, p in trainable(model).items()}


# ---- time, always side by side ----

def side_by_side(functions, rounds=15):
    """{name: milliseconds} of functions that take turns: processor time of one thread, the fastest round.

    The clock on the wall, and any but the fastest round, would measure what else the machine is doing.
    """
    spent, threads = {key: [] for key in functions}, torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(rounds):
        for key, function in functions.items():
            begin = time.process_time()
            function()
            spent[key].append(1000 * (time.process_time() - begin))
    torch.set_num_threads(threads)
    return {key: min(times) for key, times in spent.items()}


def step_of(method, base="gpt-s", batch_size=32, length=32, **fields):
    """A function that takes one training step: forward, backward and AdamW; weights and tokens are random."""
    model = attach(methods()[method](**fields), Transformer(SHAPES[base]))
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
    ids = torch.randint(model.config.vocab_size, (batch_size, length))

    @torch.no_grad()
    def forward():
        model(ids)
    return forward
