"""What torchrun runs in tests/test_processes.py: every process of a run executes this file.

    together.py compare FOLDER ...    train.py with the options that follow, then `trained` of every technique
    together.py kill FOLDER ...       the same command, whose last process is killed in its 17th step
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import train
from data import tasks
from data.tasks import Example, Task
from deltas import attach, kept, trainable
from harness import boundary, processes, report
from harness.settings import Settings
from methods.bitfit import BitFit
from methods.lora import LoRA
from methods.mask import Mask
from model import Transformer
from test_laws import BASES, mixed
from tiny import BERT, GPT, stirred

SIZES = {"dev": 9, "test": 14}


def task(classes):
    """Seven texts of 2 to 5 words, so that three in a step leave one over; as many targets, or one class each."""
    texts = [[(3 * i + j * j) % 17 for j in range(2 + i % 4)] for i in range(7)]
    if classes:
        made = [Example(ids, [i % classes] + [-100] * (len(ids) - 1), "", [str(i % classes)])
                for i, ids in enumerate(texts)]
        return Task("classes", made, made[:5], [], labels=[str(i) for i in range(classes)])
    made = [Example(ids, [-100] + [(5 * t + 1) % 17 for t in ids[1:]], "", ["x"]) for ids in texts]
    return Task("words", made, made[:5], [], metric="")


def models():
    """(name, tiny model with a delta, classes) of every technique; and of biases on no way to a logit, the pooler's."""
    for case in mixed():
        yield str(case), case.fresh().double(), BASES[case.base][1]
    yield "a pooler that an LM head does not read", stirred(BERT, BitFit()), 0


def trained(model, classes):
    """(curve, [(loss, {name: gradient or None}) of each step]) of a tiny model, seven texts once."""
    steps, add_up = [], processes.add_up

    def noted(loss, share, parameters):
        loss = add_up(loss, share, parameters)
        steps.append((loss.item(), {name: None if p.grad is None else p.grad.clone()
                                    for name, p in trainable(model).items()}))
        return loss
    processes.add_up = noted
    try:
        settings = Settings(model.delta, base="gpt-xs", steps=3, batch_size=3, lr=1e-2, device="cpu")
        curve, _ = train.train(model, task(classes), 0, settings, report.quiet)
    finally:
        processes.add_up = add_up
    return curve, steps


def begun(seed):
    """{name: tensor} of deltas that were drawn with a seed, a mask's places too, once all have begun together."""
    tensors = {}
    for delta in (LoRA(), Mask(by="random", k=31)):
        torch.manual_seed(0)
        base = Transformer(GPT)
        torch.manual_seed(seed)
        model = attach(delta, base)
        processes.start(model, report.quiet)
        tensors |= trainable(model) | kept(model)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def killed(step, folder, at=17):
    """An optimiser's step that ends the last process without a word."""
    count = []

    def taken(self, *given, **named):
        count.append(1)
        if len(count) == at and processes.rank() == processes.number() - 1:
            (folder / "killed").write_text(str(time.time()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given, **named)
    return taken


if __name__ == "__main__":
    boundary.begin()
    torch.set_num_threads(1)
    tasks.SIZES = SIZES
    mode, folder = sys.argv[1], Path(sys.argv[2])
    sys.argv[:] = ["train.py", *sys.argv[3:]]
    if mode == "kill":
        torch.optim.AdamW.step = killed(torch.optim.AdamW.step, folder)
    boundary.run(train.main)
    found = [trained(model, classes) for _, model, classes in models()]
    doubled = processes.shared_out(lambda part: [2 * number for number in part], list(range(7)))
    torch.save((begun(processes.rank()), found, doubled), folder / f"{processes.rank()}.pt")
