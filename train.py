"""Trains one technique on one task, and says what that cost and how close it comes to training everything.

    python train.py --method bitfit
    python train.py --method lora --rank 4 --task cuisine --base gpt-m
    python train.py --method adapter --base path/to/a/BERT --data path/to/train.tsv's/folder --epochs 2

What happens, in this order (function `run`):

    base and task  ->  frozen score  ->  attach, step-0 check  ->  train  ->  checks  ->  save, test score

Every run appends one line to out/results.jsonl (lab/results.py says what is in it).
"""

import argparse
import hashlib
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

START = time.time()  # before torch is imported, so that `seconds` is what a user waits

import torch

from data import tasks, world
from data.bases import SHAPES, load_base
from deltas import Delta, attach, count, fingerprint, methods, save, trainable
from lab import checks, report, results


@dataclass
class Settings:
    """Everything that decides the result of a run. `lr` and `steps` are filled in if they are None."""

    delta: Delta
    base: str = "gpt-s"
    task: str = "rating"
    data: str = None
    examples: int = None
    steps: int = None
    epochs: float = None
    batch_size: int = 32
    lr: float = None
    seed: int = 0
    dtype: str = "float32"
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    scratch: bool = False

    def __post_init__(self):
        if self.lr is None:
            self.lr = self.delta.lr if self.base in SHAPES else self.delta.lr_real
        if self.steps is None and self.epochs is None:  # now, so that a run of --steps 5 is never taken for this one
            self.steps, self.epochs = (300, None) if self.base in SHAPES else (None, 3.0)
        for name in ("examples", "steps", "epochs", "batch_size", "lr"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name}={number}: choose a number above 0")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': PyTorch finds no CUDA device here; choose cpu")
        if self.data is not None:
            self.data, self.task = str(Path(self.data).resolve()), Path(self.data).resolve().name

    @property
    def key(self):
        """The settings as plain data, technique and its fields included: equal keys, equal results."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "delta"}
        return {"method": self.delta.name, **asdict(self.delta), **plain}

    @property
    def file(self):
        """A file name that tells runs apart: method, base, task and six digits from all settings."""
        digits = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:6]
        return f"{self.delta.name}-{Path(self.base).name}-{self.task}-{digits}.pt"


# ---- one run ----

def run(settings, out, say=print):
    """Train and score once: returns the record that is appended to `out`/results.jsonl.

    `say` receives the lines for a reader; pass `quiet` for none. Reproducible: equal settings on the same
    machine give equal numbers.
    """
    begin = time.time()
    torch.manual_seed(settings.seed)
    model, tokenizer, task = prepare(settings)
    settings.steps = settings.steps or steps_for(settings, task)
    say(report.setting(settings, task))

    probe = [t.to(settings.device) for t in tasks.collate((task.test or task.dev)[:16], tokenizer.pad)]
    reported = task.test or task.dev
    frozen = test_score(model, task, reported, tokenizer, settings) if task.metric else 0.0
    before = checks.outputs(model, probe)
    model = attach(with_words(settings.delta, task), model)
    checks.start(model, before, checks.outputs(model, probe), say)
    counted = report.counts(model, model.delta, say)

    frozen_before = to_precision(model, settings.dtype)
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    memory = memory_of_a_step(model, task, tokenizer.pad, settings)
    curve, ms_per_step = train(model, task, tokenizer.pad, settings, say)
    checks.end(model, start, frozen_before, say)
    model.delta.finish(model)
    stored = count(model)
    if stored.delta != (formula := model.delta.formula(model.config)):
        raise AssertionError(f"{stored.delta} parameters are left, but the formula gives {formula}")
    score = test_score(model, task, reported, tokenizer, settings) if task.metric else max(s for _, s in curve)
    size = save(out / settings.file, model, **settings.key, score=score)
    record = {
        "method": settings.delta.name, "base": settings.base, "task": settings.task, "seed": settings.seed,
        "steps": settings.steps, "batch_size": settings.batch_size, "lr": settings.lr,
        "device": settings.device, "dtype": settings.dtype,
        "base_params": stored.base, "delta_params": stored.delta, "head_params": stored.head,
        "delta_percent": stored.percent, "trained_params": counted.delta, "stored_bytes": size,
        "metric": task.metric or "probability", "score": score, "dev_score": max(s for _, s in curve),
        "frozen_score": frozen, "majority_score": task.majority, "full_score": None, "relative": None,
        "ms_per_step": ms_per_step, "peak_mb": memory["peak"], "memory_mb": memory, "curve": curve,
        "seconds": time.time() - begin, "file": settings.file, "settings": settings.key,
    }
    if settings.delta.name == "full":
        record |= {"full_score": score, "relative": 1.0}
    return record


def prepare(settings):
    """The base on its device, with a Classifier if the task needs one; its tokenizer; the task."""
    model, tokenizer = load_base(settings.base, settings.scratch)
    task = tasks.load_task(settings.task, tokenizer, model.config, settings.data, settings.examples, settings.seed)
    if task.classes:
        model.classify(task.classes)
    return model.to(settings.device).eval(), tokenizer, task


def with_words(delta, task):
    """A delta that starts from the label words is told which tokens these are."""
    if getattr(delta, "init", None) != "labels" or delta.words:
        return delta
    if not task.words:
        raise ValueError("init=labels needs a task with label words")
    return replace(delta, words=",".join(map(str, task.words)))


def steps_for(settings, task):
    """As many as `epochs` asks for."""
    return max(1, round(settings.epochs * math.ceil(len(task.train) / settings.batch_size)))


def precision(settings):
    """bfloat16 arithmetic where it was asked for; the trained tensors are float32 all the same."""
    if settings.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(settings.device).type, dtype=torch.bfloat16)


def to_precision(model, dtype):
    """Store what is frozen in `dtype`, since it is never updated; return its fingerprint.

    The LayerNorms stay as they are: they are small, and PyTorch wants gain and bias in one precision.
    """
    still = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    for p in still.values():
        if id(p) not in norms:
            p.data = p.data.to(getattr(torch, dtype))
    return fingerprint(still)


def train(model, task, pad, settings, say):
    """The one training loop: AdamW, 6 % warm-up, linear decay, gradient norm clipped at 1.

    Dev is scored at 15 points on the way (6 for a checkpoint, where that takes long), and the delta that did
    best there is what remains: dev picks the step, test never does. Returns the curve [(step, dev score)] and
    the milliseconds of a step.
    """
    parameters = trainable(model)
    # No weight decay: it would pull a base's weights towards zero, not towards where they started.
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=0.0)
    warmup = max(1, round(0.06 * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup)))
    stream = endless(task.train, settings.batch_size, pad, settings.seed)
    progress, curve, best, spent = report.Progress(settings.steps, say), [], None, 0.0
    looks = 15 if settings.base in SHAPES else 6
    points = {round(settings.steps * i / looks) for i in range(1, looks + 1)}
    for step in range(1, settings.steps + 1):
        begin = time.perf_counter()
        batch = [t.to(settings.device) for t in next(stream)]
        with precision(settings):
            loss = tasks.loss(model, task, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        schedule.step()
        value = loss.item()
        spent += time.perf_counter() - begin
        if not math.isfinite(value):
            raise SystemExit(f"the loss is {value} at step {step}: lower --lr (it is {settings.lr})")
        if step in points:
            with precision(settings):
                curve.append((step, tasks.dev_score(model, task, task.dev, pad)))
            if best is None or curve[-1][1] > best[0]:
                best = curve[-1][1], {name: p.detach().clone() for name, p in parameters.items()}
        progress(step, value, curve, last=step in points)
    for name, p in parameters.items():
        p.data.copy_(best[1][name])
    return curve, 1000 * spent / settings.steps


def endless(examples, batch_size, pad, seed):
    """Batches, epoch after epoch, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for _, *batch in tasks.batches(examples, batch_size, pad, generator):
            yield batch


def test_score(model, task, examples, tokenizer, settings):
    """The task's metric, in percent, on the split that is reported."""
    with precision(settings):
        return tasks.score(task, examples, tasks.predictions(model, task, examples, tokenizer))


def memory_of_a_step(model, task, pad, settings):
    """What a training step holds at its peak, in MB, by kind: weights, gradients, optimiser, activations.

    Counted, not sampled: activations are the tensors that autograd keeps for the backward pass.
    """
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    _, *batch = next(tasks.batches(task.train, settings.batch_size, pad, torch.Generator().manual_seed(0)))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision(settings):
        tasks.loss(model, task, [t.to(settings.device) for t in batch])
    trained = sum(4 * p.numel() for p in trainable(model).values())
    parts = {"weights": sum(weights.values()), "gradients": trained, "optimizer": 2 * trained,
             "activations": sum(size for place, size in kept.items() if place not in weights)}
    return {name: size / 2**20 for name, size in (parts | {"peak": sum(parts.values())}).items()}


def run_once(settings, out, full=None, say=print):
    """The record of `settings`: from results.jsonl if it is there, else run now and appended."""
    known = results.find(out, settings.key)
    if known is None:
        known = run(settings, Path(out), say)
        if full is not None:
            known = beside(known, full)
        results.append(out, known)
    return known


def beside(record, full):
    """The record with full fine-tuning's score in it, and its own as a share of that (None where that is 0)."""
    share = record["score"] / full["score"] if full["score"] else None
    return record | {"full_score": full["score"], "relative": share}


# ---- the command line ----

def choices():
    """{option: (help, how argparse reads it)} of what decides a run's result; the names are Settings' fields."""
    return {
        "base": (f"{', '.join(SHAPES)}, or a folder with a GPT-2, BERT or RoBERTa checkpoint [gpt-s]", {}),
        "task": (f"{', '.join(world.TASKS)}, or corpus to pretrain [rating]", {}),
        "data": ("a folder with your own train.tsv and dev.tsv (or .jsonl, or E2E's .csv)", {"metavar": "DIR"}),
        "examples": ("number of training examples [the task's own]", {"type": positive}),
        "steps": ("training steps [300; for a checkpoint three epochs]", {"type": positive}),
        "epochs": ("passes over the training examples, instead of --steps", {"type": float}),
        "batch_size": ("examples in a step [32]", {"type": positive}),
        "lr": ("learning rate [the technique's own]", {"type": float}),
        "seed": ("draws the examples, their order and what is random in the delta [0]", {"type": int}),
        "dtype": ("bfloat16: frozen weights and arithmetic in bfloat16, the delta in float32 [float32]",
                  {"choices": ("float32", "bfloat16")}),
        "device": ("cpu or cuda [cuda if there is one]", {"choices": ("cpu", "cuda")}),
        "scratch": ("start from random weights in the base's shape", {"action": "store_true", "default": None}),
    }


def add_options(parser, without=()):
    """Give a parser the options of `choices`; each is None unless it was named."""
    for name, (help, kw) in choices().items():
        if name not in without:
            parser.add_argument(*spellings(name), help=help, **kw)


def spellings(name):
    """--batch_size and --batch-size."""
    return dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])


def chosen(args):
    """{field of Settings: value} of the options that were named."""
    found = {name: getattr(args, name, None) for name in choices()}
    return {name: value for name, value in found.items() if value is not None}


def positive(text):
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def several(kind):
    """How argparse reads values with commas between, each by `kind`, which raises ValueError for a wrong one."""
    def read(text):
        return [kind(part) for part in text.split(",")]
    read.__name__ = f"list of {kind.__name__}"
    return read


def arguments(argv=None):
    """Parse the command line; a technique's fields become options once --method is known."""
    kinds = methods()
    listing = "\n".join(f"  {name:<12}{first_line(kind)}" for name, kind in kinds.items())
    parser = argparse.ArgumentParser(
        prog="train.py", formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
        description="Freeze a pretrained transformer, train a small delta, compare with training everything.",
        epilog=f"the techniques (--method NAME --help shows the options of one):\n{listing}\n\n"
               "examples:\n  python train.py --method bitfit\n  python train.py --method lora --rank 4 --explain")
    parser.add_argument("--method", choices=kinds, metavar="NAME", required="-h" not in (argv or sys.argv)
                        and "--help" not in (argv or sys.argv), help=", ".join(kinds))
    add_options(parser)
    parser.add_argument("--out", default="out", metavar="DIR", help="folder for results.jsonl and the deltas [out]")
    parser.add_argument(*spellings("no_baseline"), action="store_true", help="leave out full fine-tuning")
    parser.add_argument("--explain", action="store_true", help="print where the delta sits, and exit")
    known, _ = parser.parse_known_args(argv)
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    if known.method:
        kind = kinds[known.method]
        parser.description = sys.modules[kind.__module__].__doc__
        parser.epilog = None
        group = parser.add_argument_group(f"options of {known.method}")
        for f in fields(kind):
            kw = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            group.add_argument(*spellings(f.name), default=f.default,
                               help=f"{f.metadata['help']} [{f.default}]", **kw)
    return parser, parser.parse_args(argv), kinds


def first_line(kind):
    return sys.modules[kind.__module__].__doc__.splitlines()[0].split(": ", 1)[-1]


def settings_from(args, kind):
    delta = kind(**{f.name: getattr(args, f.name) for f in fields(kind)})
    return Settings(delta, **chosen(args))


def main():
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file can be followed
    parser, args, kinds = arguments()
    try:
        settings = settings_from(args, kinds[args.method])
        if args.explain:
            model, _, task = prepare(settings)
            return report.explain(attach(with_words(settings.delta, task), model))
        full = None
        if not args.no_baseline and args.method != "full" and settings.task != "corpus":
            full = baseline(settings, args.out)
        record = run(settings, Path(args.out))
        if full is not None:
            record = beside(record, full)
        results.append(args.out, record)
        report.comparison(record, full, print)
        print(f"\n{time.time() - START:.1f} s in all. Score the saved delta again, and see examples:\n"
              f"python eval.py score {Path(args.out) / record['file']}")
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; finished runs are in results.jsonl")


def baseline(settings, out):
    """Full fine-tuning of the same base on the same data with the same seed."""
    same = {f.name: getattr(settings, f.name) for f in fields(Settings) if f.name not in ("delta", "lr")}
    wanted = Settings(methods()["full"](), **same)
    known = results.find(out, wanted.key)
    if known is None:
        print("-- full fine-tuning, to compare with --")
        known = run_once(wanted, out)
        print(f"-- {settings.delta.name} --")
    else:
        print("full fine-tuning of this setting is in results.jsonl already")
    return known


if __name__ == "__main__":
    main()
