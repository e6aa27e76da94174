"""What a delta is: freeze a pretrained model, let something small in, train only that.

    theta = theta_0 + delta,    |delta| much smaller than |theta_0|

    model = attach(methods()["lora"](rank=8), model)     freeze all, then let the technique in
    trainable(model)                                     the delta: whatever requires a gradient now
    count(model)                                         base, delta and head, in numbers
    save(path, model);  model = load(path, base)         the delta alone, tied to its base by a fingerprint
    model = merge(model)                                 fold it into plain weights, where that is possible

Whatever requires a gradient after `attach` is what is optimised, counted and saved. No parameter is ever
recognised by its name, and no technique contains freezing code: `attach` freezes first, and modules made
afterwards are born trainable.
"""

import hashlib
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch

from model import Classifier

METHODS = {  # file in methods/ (= --method): its dataclass, in the order in which they are best read
    "full": "Full",
    "last_layer": "LastLayer",
    "bitfit": "BitFit",
    "adapter": "Adapter",
    "prompt": "Prompt",
    "prefix": "Prefix",
    "lora": "LoRA",
    "intrinsic": "Intrinsic",
}


def methods():
    """{name: dataclass} of all techniques."""
    return {name: getattr(import_module(f"methods.{name}"), kind) for name, kind in METHODS.items()}


def setting(default, help):
    """A field of a technique: a hyper-parameter, a command-line flag and an entry of the saved file at once."""
    return field(default=default, metadata={"help": help})


@dataclass
class Delta:
    """A technique: what to attach, how many numbers that is, and how to fold it away.

    A subclass is a dataclass whose fields are its hyper-parameters.
    """

    family: ClassVar[str]            # addition, reparameterisation, specification; or baseline
    lr: ClassVar[float]              # default learning rate on the little world's bases
    lr_real: ClassVar[float]         # and on a real checkpoint
    identity: ClassVar[bool] = True  # a new delta leaves the model's function as it is, bit for bit

    @property
    def name(self):
        return type(self).__module__.split(".")[-1]

    def attach(self, model):
        """Fill slots, wrap layers or set requires_grad in a frozen model; return the model to call."""
        raise NotImplementedError

    def formula(self, config):
        """How many numbers are stored, by the closed formula of the technique's docstring."""
        raise NotImplementedError

    def training_formula(self, config):
        """How many numbers are trained; only the prefix, which drops its MLP, stores fewer."""
        return self.formula(config)

    def finish(self, model):
        """Called once after training, and on a new model before a file is loaded into it."""

    def merge(self, model):
        """Return the plain model with the delta folded in, or raise a ValueError that says why not."""
        raise NotImplementedError


@dataclass(frozen=True)
class Count:
    """Parameter counts. `delta` excludes the head; for full fine-tuning base and delta are equal."""

    base: int
    delta: int
    head: int

    @property
    def percent(self):
        return 100 * self.delta / self.base


def attach(delta, model):
    """Freeze `model`, let `delta` in, and return the model to call from now on.

    The base's size and fingerprint are noted first (`model.base_size`, `model.base_print`). A Classifier
    is trained with every technique, and counted apart.
    """
    if getattr(model, "delta", None) is not None:
        raise ValueError(f"this model carries a delta already ({model.delta}); load a fresh base")
    base = own_parameters(model)
    size, mark = sum(p.numel() for p in base.values()), fingerprint(base)
    model.requires_grad_(False)
    model = delta.attach(model)
    if isinstance(model.head, Classifier):
        model.head.requires_grad_(True)
    model.delta, model.base_size, model.base_print = delta, size, mark
    return model


def trainable(model):
    """{name: parameter} of what requires a gradient: the delta and, where there is one, the Classifier."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def head_parameters(model):
    """The ids of the parameters of a Classifier; none where the task is solved by the LM head."""
    return {id(p) for p in model.head.parameters()} if isinstance(model.head, Classifier) else set()


def own_parameters(model):
    """{name: parameter} without the Classifier: the base, as long as nothing is attached. Tied ones once."""
    head = head_parameters(model)
    return {name: p for name, p in model.named_parameters() if id(p) not in head}


def count(model):
    """The Count of a model that `attach` has returned."""
    head = head_parameters(model)
    sizes = {True: 0, False: 0}
    for p in trainable(model).values():
        sizes[id(p) in head] += p.numel()
    return Count(base=model.base_size, delta=sizes[False], head=sizes[True])


def fingerprint(tensors):
    """SHA-256 over names, shapes and float32 values of {name: tensor}; "" on the meta device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            return ""
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def save(path, model, **notes):
    """Write the delta (and a trained head) to `path` and return the file's size in bytes.

    The file holds tensors, numbers and strings only, so that reading it can run no code. It is written
    under another name first: an interruption leaves the old file or the new one, never half of one.
    """
    content = {
        "format": 1,
        "method": model.delta.name,
        "settings": asdict(model.delta),
        "base": model.base_print,
        "classes": model.head.out.out_features if isinstance(model.head, Classifier) else 0,
        "tensors": {name: p.detach().cpu().clone() for name, p in trainable(model).items()},
        "notes": notes,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    return path.stat().st_size


def read(path):
    """The content of a delta file as a dictionary. Raises ValueError if `path` is not a whole delta file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(f"{path}: not a delta file, or cut short") from error
    if not isinstance(content, dict) or content.get("format") != 1:
        raise ValueError(f"{path}: not a delta file of format 1")
    if content["method"] not in METHODS:
        raise ValueError(f"{path}: made by the method {content['method']!r}; known are {', '.join(METHODS)}")
    return content


def load(path, model):
    """Attach the delta stored at `path` to the plain base `model` and return the model to call.

    Raises ValueError for another base, a missing, surplus or misshapen tensor, an unknown method.
    """
    if getattr(model, "delta", None) is not None:
        raise ValueError(f"this model carries a delta already ({model.delta}); load {path} into a fresh base")
    content = read(path)
    kind = methods()[content["method"]]
    if set(content["settings"]) != {f.name for f in fields(kind)}:
        raise ValueError(f"{path}: the settings {content['settings']} are not those of {content['method']}")
    if content["classes"]:
        model.classify(content["classes"])
    base = fingerprint(own_parameters(model))
    if content["base"] != base:
        raise ValueError(f"{path}: trained on another base (fingerprint {content['base'][:12]}, "
                         f"this base has {base[:12]})")
    delta = kind(**content["settings"])
    model = attach(delta, model)
    delta.finish(model)
    fill(trainable(model), content["tensors"], path)
    return model


@torch.no_grad()
def fill(targets, tensors, path):
    """Copy {name: tensor} into {name: parameter}; the names and the shapes must agree exactly."""
    for what, names in (("misses", set(targets) - set(tensors)), ("has a surplus of", set(tensors) - set(targets))):
        if names:
            raise ValueError(f"{path} {what} {', '.join(sorted(names)[:3])} ({len(names)} in all)")
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            raise ValueError(f"{path}: {name} is {tuple(tensors[name].shape)}, not {tuple(target.shape)}")
        target.copy_(tensors[name])


@torch.no_grad()
def merge(model):
    """Fold the delta into plain weights and return the plain model, all frozen, in float32 or more.

    Not in bfloat16, where most of a small update is rounded away. It can be done once: afterwards
    nothing is trainable, and a second call is a ValueError. So is a technique that cannot be merged.
    """
    if not trainable(model):
        raise ValueError("nothing to merge: no delta is attached, or it has been merged already")
    delta = model.delta
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model = model.float()
    model = delta.merge(model)
    model.delta = None
    return model.requires_grad_(False)
