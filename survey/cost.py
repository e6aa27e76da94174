"""C1 to C5: what full fine-tuning costs, whether a few parameters can replace it, and the three families."""

import copy
import math
import tempfile
from pathlib import Path

import torch

import train
from data.bases import SHAPES
from deltas import attach, merge, methods, save, trainable
from harness.checks import memory_of_a_step
from harness.settings import settings_of
from lab.sizes import size
from lab.timing import side_by_side
from methods.full import base_size
from model import Refused
from survey.ledger import COUNTS, DEFINES, FAILS, HOLDS, OPEN, claim, together
from survey.shared import REAL, TECHNIQUES, closeness, fields, on_real, step_of
from survey.tiny import tiny, with_delta


@claim("A+E", minutes=1)
def c1_cost_grows_with_size(bench):
    """As pretrained models grow, adapting one to a task costs ever more: memory and time multiply, and so does storage.

    Origin: undisputed; the survey's motive.
    Measured: memory of a training step, the stored file and the time of a step of full fine-tuning on three bases of
    the little world, the steps timed in turns; the slope of each against the number of parameters D, both as logarithms
    (1: proportional).
    Rule: holds if each is larger with every size, and the file in proportion, its slope within 5 % of 1.
    """
    bases = "gpt-xs", "gpt-s", "gpt-m"

    def measure():
        files, memory = zip(*(file_and_memory(base) for base in bases))
        ms, ratios = side_by_side({base: step_of(methods()["full"](), SHAPES[base]) for base in bases})
        return {"files": files, "memory": memory, "ms": list(ms.values()), "ratios": list(ratios.values())}
    found = bench.timed("costs of full fine-tuning", measure)
    sizes = [base_size(SHAPES[base]) for base in bases]
    slopes = {what: slope(sizes, found[what]) for what in ("files", "memory", "ratios")}
    bench.note(f"D: {listed(sizes)}. File, bytes: {listed(found['files'])}, slope {slopes['files']:.2f}; memory of "
               f"a step, MB: {listed(found['memory'])}, slope {slopes['memory']:.2f}; time of a step, ms: "
               f"{listed(found['ms'])}, slope {slopes['ratios']:.2f}. Memory grows more slowly than D because a "
               "small model's step is mostly activations.")
    return growing([found[what] for what in slopes], slopes["files"])


def file_and_memory(base):
    """(bytes of the saved file, MB of a training step) of full fine-tuning; nothing is trained for that."""
    settings = settings_of("full", base=base, scratch=True)
    model, tokenizer, task = train.prepare(settings)
    model = attach(settings.delta, model)
    with tempfile.TemporaryDirectory() as folder:
        size = save(Path(folder) / "full.pt", model)
    return size, memory_of_a_step(model, task, tokenizer.pad, settings)["peak"]


def listed(values):
    return ", ".join(f"{value:,.0f}" for value in values)


def slope(sizes, values):
    """From the smallest to the largest, both as logarithms."""
    return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])


def growing(costs, storage):
    """Every cost is larger with every size, and storage, whose slope this is, in proportion."""
    larger = all(a < b for values in costs for a, b in zip(values, values[1:]))
    return HOLDS if larger and abs(storage - 1) < 0.05 else FAILS


@claim("A")
def c2_ten_billion_do_not_fit(bench):
    """Training a model of more than ten billion parameters on one consumer card, or any single card, is hardly
    possible.

    Origin: true for full fine-tuning with Adam; LoRA and quantised weights have softened it since.
    Measured: bytes by the plain formula: weight + gradient + two moments = 4 + 4 + 4 + 4 a parameter in float32; a
    delta before fp16 weights: 2 a parameter, and 4 + 4 + 8 a trained one. Before activations.
    Rule: holds if full fine-tuning's are more than 80 GB.
    """
    D = 10 * 10**9
    full, frozen = 16 * D, 2 * D
    delta = frozen + (4 + 4 + 8) * D // 1000
    bench.note(f"Full: {D:,} x 16 bytes = {full / 1e9:.0f} GB; cards have 24 (consumer) and 80 GB.")
    bench.note(f"A delta of a thousandth: {D:,} x 2 + {D // 1000:,} x 16 bytes = {delta / 1e9:.2f} GB before "
               "activations, for which a card of 24 GB leaves some room: this claim delta tuning has overtaken.")
    return COUNTS if full > 80e9 else FAILS


@claim("A")
def c3_a_copy_per_task(bench):
    """A full copy of the weights for every task is alarming: GPT-3 needs 350 or 700 GB a task, depending on precision.

    Origin: exact, counting in powers of ten.
    Measured: the closed formula of full fine-tuning's count at GPT-3's shape, times 2 and times 4 bytes.
    Rule: holds if they round to the printed figures.
    """
    D = base_size(size("gpt3-175b"))
    half, single = 2 * D, 4 * D
    bench.note(f"D = 96 x (12 x 12,288² + 13 x 12,288) + (50,257 + 2,048) x 12,288 + 2 x 12,288 = {D:,}; "
               f"x 2 bytes = {half / 1e9:.1f} GB; x 4 bytes = {single / 1e9:.1f} GB.")
    return COUNTS if round(half / 1e9, -1) == 350 and round(single / 1e9, -2) == 700 else FAILS


@claim("E", minutes=10)
def c4_few_parameters_are_enough(bench):
    """Training a few parameters and freezing the rest comes close to full fine-tuning, and sometimes reaches it.

    Origin: Houlsby et al., Hu et al., Ben Zaken et al.; in the survey's own runs slightly below on average.
    Measured: the delta that dev prefers against full fine-tuning, each with its learning rate tuned on dev, on `rating`
    (gpt-s) and `cuisine` (gpt-xs): test score in percent of full fine-tuning's, paired by seed; on a real checkpoint,
    where there is one, LoRA, adapter and BitFit.
    Rule: holds if the interval lies above 95 % on every task.
    Changed: `sentiment` was a third task, with 100.2 ± 0.2 %; the frozen base alone has 99.3 % of it.
    """
    verdicts = [closeness(bench, task, found) for task, found in fields(bench, *TECHNIQUES, "full").items()]
    return together(*verdicts, *on_real(bench, "C4", *REAL))


@claim("D/U")
def c5_three_families(bench):
    """The techniques fall into three classes: those that add, those that select, and those that reparameterise.

    Origin: the survey's own division.
    Measured: for every technique, a tiny model's delta is moved and merged. It adds if it cannot be merged; it selects
    if as many of the base's weights have changed as it trains parameters; if more or fewer have, they are made from
    these parameters: it reparameterises.
    Rule: a definition, if that is the family which each technique names as its own.
    Changed: what selects was what trains the base's own tensors; `mask` selects single weights.
    Tests: tests/test_laws.py::test_every_technique_has_a_family_and_learning_rates_of_its_own
    """
    found = {method: family(method) for method in methods() if method != "full"}
    for kind in ("addition", "specification", "reparameterisation"):
        bench.note(f"{kind}: {', '.join(m for m, f in found.items() if f == kind)}.")
    right = all(methods()[method].family == kind for method, kind in found.items())
    return DEFINES if right else OPEN


@torch.no_grad()
def family(method):
    """The class of a technique, from what its merged delta has changed, not from its label."""
    base, _ = tiny()
    model = with_delta(method, copy.deepcopy(base), **{"k": 9, "by": "random"} if method == "mask" else {})
    mine = list(trainable(model).values())
    for p in mine:
        p += torch.rand_like(p)
    try:
        merged = merge(model)
    except Refused:
        return "addition"
    changed = sum((old != new).sum().item() for old, new in zip(base.parameters(), merged.parameters()))
    return "specification" if changed == sum(p.numel() for p in mine) else "reparameterisation"
