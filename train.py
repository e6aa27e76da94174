"""Trains one technique on one task, and says what that cost and how close it comes to training everything.

    python train.py --method bitfit
    python train.py --method lora --rank 4 --task cuisine --base gpt-m
    python train.py --method adapter --base path/to/a/BERT --data path/to/train.tsv's/folder --epochs 2
    torchrun --nproc_per_node=2 train.py --method lora       the same in two processes, see harness/processes.py

What happens, in this order (function `run`):

    base and task  ->  frozen score  ->  attach, step-0 check  ->  train  ->  checks  ->  save, test score

The technique trains first and full fine-tuning after it, to compare with. Every run appends one line to
out/results.jsonl (harness/results.py says what is in it).
"""

from harness import boundary

if __name__ == "__main__":
    boundary.begin()  # before torch is imported

import time
from pathlib import Path

import torch

from data import tasks
from data.bases import load_base
from deltas import attach, head_parameters, methods, save, trainable
from harness import checks, processes, report, results, state
from harness.checks import Diverged
from harness.settings import Settings, arguments, settings_typed


def run(settings: Settings, out, say=print, fresh=False):
    """Train and score once: returns the record for `out`/results.jsonl (harness/results.py has its fields).

    `say` receives the lines for a reader; pass `report.quiet` for none. Reproducible: equal settings on the
    same machine give equal numbers, also where the run was stopped and goes on from its state, unless `fresh`.
    Raises Diverged, and Refused for settings that base or task cannot honour.
    """
    begin, given, content, file = time.time(), settings, settings.key["content"], settings.file
    torch.manual_seed(settings.seed)
    model, tokenizer, task = prepare(settings)
    settings = settings.completed(task)
    say(report.setting(settings, task))

    with checks.blame(f"base {settings.base}: before anything is attached it gives"):
        frozen = score(model, task, tokenizer, settings) if task.metric else 0.0
        check = checks.Check(model, task, tokenizer.pad, say)
    model = attach(settings.delta.for_task(task), model)
    with checks.blame(f"{settings.delta}: with these settings a new delta gives"):
        check.start(model)
    counted = report.counts(model, say)
    processes.start(model, say)

    to_precision(model, settings.dtype)
    check.before_training(model, out)
    with state.ended_by(Diverged, kept_at := state.of(Path(out) / file)):
        curve, ms_per_step = train(model, task, tokenizer.pad, settings, say, kept_at, fresh)
    check.end(model)
    memory = checks.memory_of_a_step(model, task, tokenizer.pad, settings)

    model.delta.finish(model)
    stored = report.stored(model)
    dev = max(s for _, s in curve)
    with checks.diverging(settings.steps, settings):
        found = score(model, task, tokenizer, settings) if task.metric else dev
    say(report.scored(task, found))
    notes = {**given.plain, "labels": task.labels, "label_words": task.words, "score": found}
    file, size = report.saved(lambda: save(Path(out) / file, model, **notes), file, say)
    full = {"full_score": found, "relative": 1.0} if given.delta.name == "full" else {}
    return {
        "method": given.delta.name, "base": given.plain["base"], "task": given.task, "seed": given.seed,
        "steps": settings.steps, "batch_size": given.batch_size, "lr": given.lr,
        "device": given.device, "dtype": given.dtype, "processes": processes.number(),
        "base_params": stored.base, "delta_params": stored.delta, "head_params": stored.head,
        "delta_percent": stored.percent, "trained_params": counted.delta, "stored_bytes": size,
        "metric": task.metric or "probability", "score": found, "dev_score": dev,
        "frozen_score": frozen, "majority_score": task.majority, "full_score": None, "relative": None,
        "ms_per_step": ms_per_step, "machine": report.machine(), "peak_mb": memory["peak"], "memory_mb": memory,
        "curve": curve, "seconds": time.time() - begin, "file": file, "settings": given.plain,
        "content": content, "where": given.where,
    } | full


def prepare(settings):
    """The base on its device, with a Classifier if the task needs one; its tokenizer; the task."""
    model, tokenizer = load_base(settings.base, settings.scratch)
    checks.sensible(settings.delta, model)
    task = tasks.load_task(settings.task, tokenizer, model.config, settings.data, settings.examples, settings.seed)
    if task.classes:
        model.classify(task.classes)
    return model.to(settings.device).eval(), tokenizer, task


def to_precision(model, dtype):
    """Store what is frozen in `dtype`, since it is never updated.

    The LayerNorms stay as they are: they are small, and PyTorch needs gain and bias in one precision.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    for p in model.parameters():
        if not p.requires_grad and id(p) not in norms:
            p.data = p.data.to(getattr(torch, dtype))


def train(model, task, pad, settings, say, kept_at=None, fresh=True):
    """The one training loop: AdamW, 6 % warm-up, linear decay, gradient norm clipped at 1.

    Dev is scored a few times on the way, and the delta that did best there is what remains: dev picks the
    step, test never does. Returns the curve [(step, dev score)] and the milliseconds of a step. A long run
    keeps its state in the file `kept_at` (harness/state.py) and goes on from there, unless `fresh`.
    """
    parameters = trainable(model)
    head = head_parameters(model)  # a new classifier knows nothing yet: its rate does not depend on the technique
    groups = [{"params": [p for p in parameters.values() if id(p) not in head], "lr": settings.lr},
              {"params": [p for p in parameters.values() if id(p) in head], "lr": settings.head_lr}]
    # No weight decay: it would pull a base's weights towards zero, not towards where they started.
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    warmup = max(1, round(0.06 * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup)))
    stream = endless(task.train, settings.batch_size, pad, settings.seed)
    evaluated = {round(settings.steps * i / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    progress, kept = report.Progress(settings.steps, say), state.State(kept_at, parameters, optimizer, schedule, say)
    done, curve, best, spent = kept.restore(fresh)
    for _ in range(done):
        next(stream)
    for step in range(done + 1, settings.steps + 1):
        begin = time.perf_counter()
        batch, share = processes.part(next(stream))  # all of it, unless several processes divide it
        batch = [t.to(settings.device) for t in batch]
        with settings.precision(), checks.diverging(step, settings):
            loss = tasks.loss(model, task, batch)
        optimizer.zero_grad()
        loss.backward()
        loss = processes.add_up(loss, share, parameters.values())
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        schedule.step()
        value = loss.item()
        spent += time.perf_counter() - begin
        if step in evaluated:
            with settings.precision(), checks.diverging(step, settings):
                curve.append((step, tasks.dev_score(model, task, processes.mine(task.dev), pad, processes.total)))
            if best is None or curve[-1][1] > best[0]:
                last = step == settings.steps  # then it is where it should be, and no copy is needed
                best = curve[-1][1], {} if last else {name: p.detach().clone() for name, p in parameters.items()}
            kept.save(step, curve, best, spent)
        progress(step, value, curve, last=step in evaluated)
    for name, p in best[1].items():
        parameters[name].data.copy_(p)
    return curve, 1000 * spent / settings.steps


def endless(examples, batch_size, pad, seed):
    """Batches, epoch after epoch, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for _, *batch in tasks.batches(examples, batch_size, pad, generator):
            yield batch


def score(model, task, tokenizer, settings):
    """The task's metric, in percent, on the split that is reported: test, or dev where there is no test."""
    with settings.precision():
        predicted = processes.shared_out(
            lambda part: tasks.predictions(model, task, part, tokenizer), task.reported)
    return tasks.score(task, task.reported, predicted)


def run_once(settings, out, say=print, before=lambda: None):
    """The kept record of `settings`, or before() is called, and it is run and kept.

    Raises Diverged, now and whenever the kept record says so.
    """
    def measure():
        before()
        try:
            return run(settings, out, say)
        except Diverged as error:
            return {"method": settings.delta.name, "seed": settings.seed, "diverged": str(error)}
    record = results.once(out, settings.key, measure)
    if "diverged" in record:
        raise Diverged(record["diverged"])
    return record


def main():
    args = arguments()
    settings, out, full = settings_typed(args), Path(args.out), None
    processes.begin(settings.device)
    if args.explain:
        model, _, task = prepare(settings)
        return report.explain(attach(settings.delta.for_task(task), model))
    record = run(settings, out, fresh=args.fresh)
    results.append(out, record)
    if not (args.no_baseline or args.method == "full" or settings.pretraining):
        print(f"\n-- full fine-tuning, to compare with, unless {out}/results.jsonl has it already --")
        full = run_once(settings.with_delta(methods()["full"]()), out)
        record |= report.share(record, full)
        results.append(out, record)
    report.comparison(record, full, print)
    report.ending(record, out)


if __name__ == "__main__":
    boundary.run(main)
