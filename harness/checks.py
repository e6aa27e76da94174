"""What a run checks: before it (folder, size), on the way (finite), after it (what holds for any delta); memory."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from os.path import isdir, isfile, lexists
from pathlib import Path

import torch

from data import tasks
from data.files import shown
from deltas import fingerprint, trainable
from harness import processes
from model import Block, NotFinite, Refused, Transformer, finite


class Diverged(Refused):
    """The loss is no longer finite: the learning rate is too high."""


@contextmanager
def blame(what):
    """Say what is to blame for logits that are not finite inside."""
    try:
        yield
    except NotFinite as error:
        raise Refused(f"{what} {error}") from None


@contextmanager
def diverging(step, settings):
    """In training it is the learning rate."""
    try:
        yield
    except NotFinite as error:
        raise Diverged(f"{error} at step {step}: lower --lr (it is {settings.lr})") from None


def sensible(delta, model):
    """Refuse a delta of a hundred times the base's parameters, before memory is taken for it."""
    size, base = delta.training_formula(model.config), sum(p.numel() for p in model.parameters())
    if size > 100 * base:
        raise Refused(f"{delta}: {size:,} parameters, more than a hundred times as many as the base has ({base:,}); "
                      "choose a smaller size")


def writable_file(option, path):
    """Refuse the name of a file to be written at the end, if that can be seen at the start."""
    if lexists(path) and not isfile(path):
        raise Refused(f"{option} {shown(path, 300)}: {'a folder' if isdir(path) else 'no regular file'} stands there")
    writable(Path(path).parent, 0, f"{option} {shown(path, 300)}")
    if len(os.fsencode(Path(path).name)) > 255:
        raise Refused(f"{option} {shown(path, 300)}: a name is 255 bytes at most")


def writable(out, needed, option=None):
    """Refuse a folder that cannot take `needed` bytes, before anything is trained for it; `option` named it."""
    out, option = Path(out), option or f"--out {shown(str(out), 300)}"
    if lexists(out) and not isdir(out):
        raise Refused(f"{option}: a file stands there, not a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise Refused(f"{option}: nothing can be written there ({error.strerror})") from None
    if (free := shutil.disk_usage(out).free) < needed:
        raise Refused(f"{option}: {free:,} bytes are free, and {needed:,} will be written")


class Check:
    """Watches a run from before the delta is attached (then it is made) until training is over."""

    def __init__(self, model, task, pad, say):
        device = next(model.parameters()).device
        self.batch = [t.to(device) for t in tasks.collate((task.test or task.dev)[:16], pad)]
        self.say, self.logits = say, self.outputs(model)

    @torch.no_grad()
    def outputs(self, model):
        ids, keep, targets = self.batch
        return finite(model(ids, keep, at=targets != -100))

    def start(self, model):
        """A new delta leaves the function as it is, bit for bit; prompt and prefix cannot, and are exempt."""
        apart = (self.logits - self.outputs(model)).abs().max().item()
        if model.delta.identity and apart > 0:
            raise AssertionError(f"a new {model.delta.name} moves the logits by up to {apart:g}; it must not")
        why = "identical bit for bit" if apart == 0 else f"moved by up to {apart:.2g}: soft tokens are seen at once"
        self.say(f"check      step 0: the frozen base's logits are {why}")

    def before_training(self, model, out):
        """Note what is frozen, and where the delta starts; the folder must have room for delta and state."""
        if processes.first():
            writable(out, 5 * sum(p.nbytes for p in trainable(model).values()))
        self.frozen = fingerprint(frozen(model))
        self.first = {name: fingerprint({name: p}) for name, p in trainable(model).items()}

    def end(self, model):
        """Frozen tensors are bit-identical, and every delta tensor has moved, or it is said why not."""
        still = frozen(model)
        if fingerprint(still) != self.frozen:
            raise AssertionError("a frozen tensor has changed")
        size = sum(p.numel() for p in still.values())
        self.say(f"check      frozen: {f'{size:,} parameters are bit-identical' if still else 'nothing is frozen'}")
        mine = trainable(model)
        unmoved = [name for name in mine if fingerprint({name: mine[name]}) == self.first[name]]
        self.say(f"check      delta: {len(mine) - len(unmoved)} of {len(mine)} tensors have moved"
                 + "".join(f"\n           {name} has not: {why_not(mine[name])}" for name in unmoved))
        if settled := key_biases(model):
            self.say(f"           ({len(settled)} of them are key biases, moved by rounding noise alone: they add the\n"
                     "           same number to every score of a query, and softmax does not see it)")


def frozen(model):
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def why_not(parameter):
    if parameter.grad is None:
        return "it is not on the way from the text to this task's logits"
    if not parameter.grad.any():
        return "its gradient is zero"
    return "no step on the way did better on dev than where it started"


def key_biases(model):
    """The trained biases of attention's keys."""
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    biases = [getattr(block.attention.key, "bias", None) for block in blocks]
    return [p for p in biases if p is not None and p.requires_grad]


def memory_of_a_step(model, task, pad, settings):
    """What a training step holds in a process at its peak, in MB: weights, gradients, optimiser, activations.

    Counted, not sampled. Weights: parameters, a projection's signs, permutation and Gaussians, a mask's places.
    Activations: the tensors that autograd keeps for the backward pass. A wrapper around the whole model makes theta
    anew, which is among these, and in the backward pass the gradient of all of it. What an operation needs for a
    moment is left out: some per cent of the peak; of Fastfood's 5 MB on a CPU, up to 84 MB on a GPU.
    """
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it, and neither would be freed

    held = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    weights = {storage.data_ptr(): storage.nbytes() for storage in held}
    _, *batch = next(tasks.batches(task.train, settings.batch_size, pad, torch.Generator().manual_seed(0)))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), settings.precision():
        tasks.loss(model, task, [t.to(settings.device) for t in processes.part(batch)[0]])
    trained = sum(4 * p.numel() for p in trainable(model).values())
    theta = 0 if isinstance(model, Transformer) else 4 * model.base_size
    parts = {"weights": sum(weights.values()), "gradients": trained + theta, "optimizer": 2 * trained,
             "activations": sum(size for place, size in kept.items() if place not in weights)}
    return {name: size / 2**20 for name, size in (parts | {"peak": sum(parts.values())}).items()}
