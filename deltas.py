"""What a delta is: freeze a pretrained model, let something small in, train only that.

    theta = theta_0 + delta,    |delta| much smaller than |theta_0|

    model = attach(methods()["lora"](rank=8), model)     freeze all, then let the technique in
    trainable(model)                                     the delta: whatever requires a gradient now
    count(model)                                         parameters of base, delta and head
    save(path, model);  model = load(path, base)         the delta alone, tied to its base by a fingerprint
    model = merge(model)                                 fold it into plain weights, where that is possible

Whatever requires a gradient after `attach` is what is optimised, counted and saved. No parameter is ever
recognised by its name, and no technique contains freezing code: `attach` freezes first, and modules made
afterwards are born trainable.
"""

import hashlib
import math
import os
import pickle
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch

from model import Classifier


def methods():
    """{name: dataclass} of all techniques, in the order of methods/__init__.py."""
    package = import_module("methods")  # the one door upward: a technique imports this file
    kinds = (kind for kind in vars(package).values() if isinstance(kind, type) and issubclass(kind, Delta))
    return {kind.name: kind for kind in kinds}


def setting(default, help, least=None, above=None, among=None):
    """A field of a technique or of a run: a hyper-parameter, an option and an entry of the saved file at once.

    Allowed are values from `least` on, or beyond `above`, or those in `among`; None only if it is the default.
    """
    return field(default=default, metadata={"help": help, "least": least, "above": above, "among": among})


def check_fields(made):
    """Raise ValueError for the first field of a dataclass whose value its declaration does not allow."""
    for f in fields(made):
        value, rule = getattr(made, f.name), f.metadata
        if not rule or value is None and f.default is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if f.type is float and not (number and math.isfinite(value)):
            wanted = "a finite number"
        elif f.type is not float and type(value) is not f.type:
            wanted = {int: "a whole number", bool: "true or false", str: "a text"}[f.type]
        elif rule["among"] and value not in rule["among"]:
            wanted = f"{', '.join(rule['among'][:-1])} or {rule['among'][-1]}"
        elif rule["least"] is not None and value < rule["least"]:
            wanted = f"{rule['least']} or more"
        elif rule["above"] is not None and value <= rule["above"]:
            wanted = f"a number above {rule['above']}"
        else:
            continue
        raise ValueError(f"{f.name}={value!r}: choose {wanted}")


@dataclass
class Delta:
    """A technique: what to attach, how many parameters that is, and how to fold it away.

    A subclass is a dataclass whose fields, each a `setting`, are its hyper-parameters.
    """

    name: ClassVar[str]              # the name of its file, and the command line's --method
    family: ClassVar[str]            # addition, reparameterisation, specification; or baseline
    lr: ClassVar[float]              # default learning rate on the little world's bases
    lr_real: ClassVar[float]         # and on a real checkpoint
    rates: ClassVar[tuple] = ()      # the grid of learning rates, where a comparison tunes them on dev
    paper: ClassVar[dict] = {}       # the paper's setting, where the default is another one
    identity: ClassVar[bool] = True  # a new delta leaves the model's function as it is, bit for bit

    def __init_subclass__(cls):
        cls.name = cls.__module__.split(".")[-1]

    def __post_init__(self):
        check_fields(self)

    def for_task(self, task):
        """The delta to attach for a data.tasks.Task; a technique that starts from label words finds them there."""
        return self

    def attach(self, model):
        """Fill slots, wrap layers or set requires_grad in a frozen model; return the model to call."""
        raise NotImplementedError

    def formula(self, config):
        """How many parameters are stored, by the closed formula of the technique's docstring."""
        raise NotImplementedError

    def training_formula(self, config):
        """How many are trained; only the prefix, which drops its MLP, stores fewer."""
        return self.formula(config)

    def flops(self, config, text):
        """FLOPs a token, (forward, training), in texts of `text` tokens; forward merged where that is possible.

        A matrix entry costs 2 forward and 2 for the gradient of its input; a trained one 2 more for its own.
        """
        return 2 * matrix_entries(config), 4 * matrix_entries(config)

    def finish(self, model):
        """Called once after training, and on a new model before a file is loaded into it."""

    def merge(self, model):
        """Return the plain model with the delta folded in, or raise a ValueError that says why not."""
        return model


def matrix_entries(config):
    """n = L (4 d² + 2 d f): the entries of the matrices of all blocks, which nearly all FLOPs go through."""
    return config.n_layer * (4 * config.d_model**2 + 2 * config.d_model * config.d_ff)


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

    The base is noted first: its size, its fingerprint, its names and shapes. A Classifier is trained with
    every technique, and counted apart.
    """
    if getattr(model, "delta", None) is not None:
        raise ValueError(f"this model carries a delta already ({model.delta}); load a fresh base")
    mark, shapes = fingerprint(own_parameters(model), model.config), shapes_of(model)
    model.requires_grad_(False)
    model = delta.attach(model)
    if isinstance(model.head, Classifier):
        model.head.requires_grad_(True)
    model.delta, model.base_fingerprint, model.base_shapes = delta, mark, shapes
    model.base_size = sum(math.prod(shape) for shape in shapes.values())
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


def shapes_of(model):
    return {name: tuple(p.shape) for name, p in own_parameters(model).items()}


def count(model):
    """The Count of a model that `attach` has returned."""
    head = head_parameters(model)
    sizes = {True: 0, False: 0}
    for p in trainable(model).values():
        sizes[id(p) in head] += p.numel()
    return Count(base=model.base_size, delta=sizes[False], head=sizes[True])


def fingerprint(tensors, config=""):
    """SHA-256 over a Config and names, shapes and float32 values of {name: tensor}; "" on the meta device."""
    digest = hashlib.sha256(str(config).encode())
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
        "format": 2,
        "method": model.delta.name,
        "settings": asdict(model.delta),
        "base": model.base_fingerprint,
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
    if not isinstance(content, dict) or content.get("format") not in (1, 2):
        raise ValueError(f"{path}: not a delta file of format 1 or 2")
    if content["method"] not in methods():
        raise ValueError(f"{path}: made by the method {content['method']!r}; known are {', '.join(methods())}")
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
    if content["format"] == 1:
        warnings.warn(f"{path}: an older file, which proves its base's parameters but not its Config", stacklevel=2)
    base = fingerprint(own_parameters(model), model.config if content["format"] > 1 else "")
    if content["base"] != base:
        raise ValueError(f"{path}: trained on another base (fingerprint {content['base'][:12]}, "
                         f"this base has {base[:12]})")
    delta = kind(**content["settings"])
    model = attach(delta, model)
    delta.finish(model)
    copy_into(trainable(model), content["tensors"], path)
    return model


@torch.no_grad()
def copy_into(targets, tensors, path):
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

    Not in bfloat16, where most of a small update is rounded away. It can be done once: afterwards nothing is
    trainable, and a second call is a ValueError. So is a technique that cannot be merged, or whose merged
    model has other parameters than the base had.
    """
    if not trainable(model):
        raise ValueError("nothing to merge: no delta is attached, or it has been merged already")
    delta, shapes = model.delta, model.base_shapes
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model = model.float()
    model = delta.merge(model)
    if strange := sorted(shapes_of(model).items() ^ shapes.items()):
        raise ValueError(f"{delta.name} cannot be merged: {strange[0][0]} is left, which is not the base's own")
    model.delta = None
    return model.requires_grad_(False)
