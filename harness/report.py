"""What a reader sees of a run: the setting, the counts, the progress, the comparison; and `--explain`."""

import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path

import torch

from data.files import shown
from deltas import count, kept
from harness import boundary, processes


def quiet(*_, **__):
    """A `say` that says nothing."""


class Progress:
    """A line that updates in place in a terminal; elsewhere a plain line at each dev score."""

    def __init__(self, steps, say):
        self.steps, self.say, self.begin = steps, say, time.time()
        self.live = sys.stdout.isatty() and say is print

    def __call__(self, step, loss, curve, last):
        left = (time.time() - self.begin) / step * (self.steps - step)
        dev = f"dev {curve[-1][1]:5.1f}" if curve else ""
        line = f"step {step:>6}/{self.steps}  loss {loss:.3f}  {dev}  {left:4.0f} s left"
        if self.live:
            print(f"\r{line:<70}", end="\n" if step == self.steps else "", flush=True)
        elif last:
            self.say(line)


def setting(settings, task):
    source = "random weights in the shape of " if settings.scratch else ""
    lines = [f"base       {source}{shown(settings.base, 500)} on {settings.device}, {settings.dtype}",
             f"task       {shown(settings.task)}: {shown(task.about or f'from {settings.data}', 500)}",
             f"           {len(task.train):,} train, {len(task.dev):,} dev, {len(task.test):,} test"
             + (f"; labels {', '.join(map(shown, task.labels))}" if 0 < len(task.labels) <= 10 else "")]
    if task.cut:
        lines.append(f"           {task.cut} texts were cut to what the model reads")
    lines.append(f"method     {settings.delta}, {settings.steps} steps of {settings.batch_size} at lr {settings.lr:g}")
    return "\n".join(lines)


def counts(model, say):
    """Print and return the counts in training, the closed formula beside the measured number."""
    counted, formula = count(model), model.delta.training_formula(model.config)
    if counted.delta != formula:
        raise AssertionError(f"{counted.delta} parameters require a gradient, but the formula gives {formula}")
    kept = model.delta.formula(model.config)
    say(f"count      base {counted.base:,}   delta {counted.delta:,} ({counted.percent:.2f} %)   head {counted.head:,}"
        f"   formula {formula:,}: agrees")
    if kept != formula:
        say(f"           of the delta {kept:,} ({100 * kept / counted.base:.2f} %) are kept after training")
    return counted


def stored(model):
    """The counts after training, which the formula must give."""
    counted, formula = count(model), model.delta.formula(model.config)
    if counted.delta != formula:
        raise AssertionError(f"{counted.delta} parameters are left, but the formula gives {formula}")
    return counted


def scored(task, score):
    """The score in words; it is said before anything is written."""
    split = "test" if task.test else "dev"
    return f"score      {score:.2f} % {task.metric or 'probability'} on {len(task.reported):,} of {split}"


def saved(save, file, say):
    """(file, bytes) of a delta that save() has written, or (None, None): what was trained is recorded all the same."""
    try:
        return file, save() if processes.first() else None
    except OSError as error:
        say(f"stored     not at all: {file}: {error.strerror}")
        return None, None


def machine():
    """Where a timing was taken, in one line: the processor, what speeds bfloat16 up on it, cores, threads, PyTorch."""
    info = Path("/proc/cpuinfo")
    told = info.read_text(encoding="utf-8") if info.exists() else ""
    name = re.search(r"model name\s*: (.*)", told)
    flags = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx2": "AVX2"}
    has = next((word for flag, word in flags.items() if re.search(rf"\b{flag}\b", told)), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    processor = name[1] if name else platform.processor() or platform.machine()
    return ", ".join(filter(None, [
        gpu, processor, has or torch.backends.cpu.get_cpu_capability(), f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]))


def share(record, full):
    """What a record gets once full fine-tuning's is known: its score, and the own one as a share of it."""
    return {"full_score": full["score"], "relative": record["score"] / full["score"] if full["score"] else None}


def comparison(record, full, say):
    parts = record["memory_mb"]
    say(f"stored     {record['stored_bytes'] or 0:,} bytes   "
        f"memory {parts['peak']:.1f} MB = weights {parts['weights']:.1f} + gradients {parts['gradients']:.1f} "
        f"+ optimiser {parts['optimizer']:.1f} + activations {parts['activations']:.1f}")
    if record["metric"] == "probability":
        return
    say(f"\n{record['metric'] + ' in %':<24}{'score':>8}{'trained':>12}{'ms/step':>9}{'memory':>11}{'stored':>14}")
    say(f"{'majority class':<24}{record['majority_score']:8.1f}")
    say(f"{'frozen base':<24}{record['frozen_score']:8.1f}{0:12,}")
    for row in [record] + ([full] if full and record["method"] != "full" else []):
        name = "full fine-tuning" if row["method"] == "full" else row["method"]
        say(f"{name:<24}{row['score']:8.1f}{row['trained_params'] + row['head_params']:12,}{row['ms_per_step']:9.1f}"
            f"{row['peak_mb']:8.1f} MB{row['stored_bytes'] or 0:14,}")
    say(f"ms/step on {record['machine']}")
    if full and record["method"] != "full" and record["relative"] is not None:
        say(f"\n{record['method']} reaches {100 * record['relative']:.1f} % of full fine-tuning with "
            f"{record['delta_percent']:.2f} % of its parameters.")


def ending(record, out):
    """The last lines of a command; raises OSError if the delta could not be saved."""
    print(f"\n{time.time() - boundary.BEGIN:.1f} s in all.", end=" ")
    if record["file"] is None:
        raise OSError(f"{out}: the delta could not be saved; the record of its run is in results.jsonl")
    print("Score the saved delta again, and see examples:\n"
          f"python eval.py score {shlex.quote(str(out / record['file']))}")


def explain(model):
    """Where the delta sits: every tensor with its shape, trained, frozen or kept; equal blocks are folded."""
    print(f"{'tensor':<52}{'shape':>16}  \n{'-' * 78}")
    inner = next(m for m in model.modules() if hasattr(m, "blocks"))
    inside = {id(p): f"blocks[{i}]" for i, block in enumerate(inner.blocks) for p in block.parameters()}
    groups = {}
    for name, p in model.named_parameters():
        place = inside.get(id(p), "")
        number = place[7:-1]
        line = f"{name.replace(f'blocks.{number}.', 'blocks.*.', 1) if place else name:<52}" \
               f"{str(tuple(p.shape)):>16}  {'TRAINED' if p.requires_grad else 'frozen'}"
        groups.setdefault(line, []).append(number)
    for line, numbers in groups.items():
        print(line + (f"   blocks {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else
                      f"   block {numbers[0]}" if numbers[0] else ""))
    for name, places in kept(model).items():
        print(f"{name:<52}{str(tuple(places.shape)):>16}  kept, not trained")
    counted = count(model)
    print(f"{'-' * 78}\nbase {counted.base:,}   delta {counted.delta:,} ({counted.percent:.2f} %)   "
          f"head {counted.head:,}")
