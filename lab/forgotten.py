"""What a delta makes the base forget: the loss on documents of pretraining that were kept aside, before and after.

    forgotten(runs, record)  ->  0.31        nats a word more than the base has, while the delta is on
"""

import math

from data import tasks
from data.bases import load_base
from lab.score import rebuild


def nats(model, tokenizer):
    """The pretraining loss of a base of the little world, with or without a delta, in nats a word."""
    task = tasks.load_task("corpus", tokenizer, model.config, examples=1)
    return -math.log(tasks.dev_score(model.eval(), task, task.dev, tokenizer.pad) / 100)


def forgotten(runs, record):
    """The rise of the pretraining loss by the delta that a run has saved, on a base of the little world."""
    before = runs.kept("nats of a base", lambda: {"nats": nats(*load_base(record["base"]))}, base=record["base"])
    run = {key: value for key, value in record["settings"].items() if key != "device"}
    after = runs.kept("nats after", lambda: {"nats": nats(*rebuild(runs.out / record["file"])[:2])}, run=run,
                      content=record["content"])
    return after["nats"] - before["nats"]
