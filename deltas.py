"""What a delta is: freeze a pretrained model, let something small in, train only that.

    theta = theta_0 + delta,    |delta| much smaller than |theta_0|

    model = attach(methods()["lora"](rank=8), model)     freeze all, then let the technique in
    trainable(model)                                     the delta: whatever requires a gradient now
    count(model)                                         parameters of base, delta and head
    save(path, model);  model = load(path, base)         the delta alone, tied to its base by a fingerprint
    model = merge(model)                                 fold it into plain weights, where that is possible
    base = detach(model)                                 or take it off again: another one may come

Whatever requires a gradient after `attach` is what is optimised, counted and saved; beside it a delta may keep
places, which are saved and not trained. No parameter is ever recognised by its name, and no technique contains
freezing code: `attach` freezes first, and modules made afterwards are born trainable.
"""

import hashlib
import json
import math
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch

from data import files
from model import Classifier, Refused, Transformer


def methods():
    """{name: dataclass} of all techniques, in the order of methods/__init__.py."""
    package = import_module("methods")  # the one door upward: a technique imports this file
    kinds = (kind for kind in vars(package).values() if isinstance(kind, type) and issubclass(kind, Delta))
    return {kind.name: kind for kind in kinds}


def setting(default, help, least=None, above=None, among=None, needs=None, instead_of=None):
    """A field of a technique or of a run: a hyper-parameter, an option and an entry of the saved file at once.

    Allowed are values from `least` on, or beyond `above`, or those in `among`; None only if it is the default.
    On the command line it `needs` another field's value, (name, value), or stands `instead_of` another.
    """
    return field(default=default, metadata={"help": help, "least": least, "above": above, "among": among,
                                            "needs": needs, "instead_of": instead_of})


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
        elif f.type is int and abs(value) >= 2**63:  # more than PyTorch takes, as a seed or anywhere
            wanted = "a whole number of at most 18 digits"
        elif rule["among"] and value not in rule["among"]:
            wanted = f"{', '.join(rule['among'][:-1])} or {rule['among'][-1]}"
        elif rule["least"] is not None and value < rule["least"]:
            wanted = f"{rule['least']} or more"
        elif rule["above"] is not None and value <= rule["above"]:
            wanted = f"a number above {rule['above']}"
        else:
            continue
        raise Refused(f"{f.name}={value!r}: choose {wanted}")


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
        """The delta to attach for a data.tasks.Task: one may start from its label words, or choose by its examples."""
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


def attach(delta, model, restorable=False, mark=None):
    """Freeze `model`, let `delta` in, and return the model to call from now on.

    The base is noted first: its size, its fingerprint (`mark`, if that is known), its names and shapes. A Classifier
    is trained with every technique, and counted apart. `restorable` costs a copy of what trains, see `detach`.
    """
    if getattr(model, "delta", None) is not None:
        raise Refused(f"this model carries a delta already ({model.delta}); detach it, or load a fresh base")
    mark, shapes = mark or fingerprint(own_parameters(model), model.config), shapes_of(model)
    with as_before_if_refused(model) as before:
        model.requires_grad_(False)
        model = delta.attach(model)
    if isinstance(model.head, Classifier):
        model.head.requires_grad_(True)
    model.delta, model.base_fingerprint, model.base_shapes = delta, mark, shapes
    model.base_size, model.before = sum(math.prod(shape) for shape in shapes.values()), before.keep(restorable)
    return model


def detach(model):
    """Take the delta off: the base as it was before `attach` or `load`, bit for bit, free for another delta.

    Slots are empty again, wrappers gone, flags as they were. Where tensors of the base itself were trained, or cast to
    another precision, it takes the copy of them that only a `restorable` attach or load has kept; else it is Refused.
    """
    before = getattr(model, "before", None)
    if before is None:
        raise Refused("nothing to detach: no delta is attached, or it has been merged already")
    head = head_parameters(model)
    lost = [p for p, _, dtype in before.parameters if (p.requires_grad or p.dtype != dtype) and id(p) not in head]
    if lost and before.values is None:
        raise Refused(f"{model.delta} cannot be detached: tensors of the base itself ({len(lost)}) were trained or "
                      "cast, and no copy was kept; attach or load it with restorable=True, or load a fresh base")
    model.delta = model.before = None
    return before.restore(next(module for module in model.modules() if isinstance(module, Transformer)))


class Before:
    """A model before a delta came in, without a copy of it: its modules, its Config, what requires a gradient.

    It does not hold the model itself, which holds it: Python would free such a circle late.
    """

    values = None  # a value for each parameter, where they are kept

    def __init__(self, model):
        self.config, self.children = model.config, dict(model._modules)
        self.modules = [(m, dict(m._modules)) for m in model.modules() if m is not model]
        self.parameters = [(p, p.requires_grad, p.dtype) for p in model.parameters()]

    def keep(self, restorable):
        """Copy what requires a gradient by now; of what is frozen the tensor itself will do."""
        if restorable:
            self.values = [p.detach().clone() if p.requires_grad else p.data for p, *_ in self.parameters]
        return self

    def restore(self, model):
        for module, children in [(model, self.children), *self.modules]:
            module._modules.clear()
            module._modules.update(children)
        for p, flag, _ in self.parameters:
            p.requires_grad_(flag)
        for (p, *_), value in zip(self.parameters, self.values or []):
            p.grad, p.data = None, value
        model.config, model.delta, model.before = self.config, None, None
        return model


@contextmanager
def as_before_if_refused(model):
    """An exception inside leaves the model as it was."""
    before = Before(model)
    try:
        yield before
    except Exception:
        before.restore(model)
        raise


def trainable(model):
    """{name: parameter} of what requires a gradient: the delta and, where there is one, the Classifier."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def kept(model):
    """{name: (k,) int32} of what a delta keeps untrained, places in theta: its persistent buffers; a base has none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: places for name, places in model.state_dict().items() if name not in parameters}


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
    """SHA-256 over a Config and names, shapes and values (float32, int32) of {name: tensor}; "" on meta."""
    digest = hashlib.sha256(str(config).encode())
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            return ""
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for piece in tensor.detach().flatten().split(2**20):  # a float32 copy of four megabytes at a time
            exact = piece.float() if piece.is_floating_point() else piece  # above 2^24 a float32 skips integers
            digest.update(exact.cpu().numpy().data)
    return digest.hexdigest()


def save(path, model, **notes):
    """Write the delta (and a trained head) to `path` and return the file's size in bytes.

    The file holds tensors, numbers and strings only, so that reading it can run no code, and a digest of all of
    them. `notes` are plain data. An interruption leaves the old file or the new one, never half of one.
    """
    if getattr(model, "delta", None) is None or not trainable(model):
        raise Refused(f"{path}: no delta to save: this model is plain, or its delta has been merged into it")
    content = {
        "format": 2,
        "method": model.delta.name,
        "settings": asdict(model.delta),
        "base": model.base_fingerprint,
        "classes": model.head.out.out_features if isinstance(model.head, Classifier) else 0,
        "notes": notes,
        "tensors": {name: p.detach().cpu().clone() for name, p in (trainable(model) | kept(model)).items()},
    }
    content["digest"] = digest(content)
    files.save(path, content)
    return Path(path).stat().st_size


def digest(content):
    """SHA-256 over all of a delta file but the digest itself."""
    said = {name: value for name, value in content.items() if name not in ("tensors", "digest")}
    return fingerprint(content["tensors"], json.dumps(said, sort_keys=True))


def read(path):
    """The content of a delta file as a dictionary; Refused if `path` is not a whole and sound delta file."""
    content = files.tensors(path)
    if not isinstance(content, dict) or content.get("format") not in (1, 2):
        raise Refused(f"{path}: not a delta file of format 1 or 2")
    for name in ("method", "base", "classes", "settings", "notes", "tensors"):
        files.field(content, name, {"method": str, "base": str, "classes": int}.get(name, dict), path)
    method, given = content["method"], content["settings"]
    if method not in methods():
        raise Refused(f"{path}: made by the method {files.shown(method)!r}; known are {', '.join(methods())}")
    if set(given) != {f.name for f in fields(methods()[method])}:
        raise Refused(f"{path}: the settings {files.shown(given)} are not those of {method}")
    try:
        methods()[method](**given)
    except Refused as error:
        raise Refused(f"{path}: {error}") from None
    files.sound(content["tensors"], path, places=True)
    if content["format"] > 1 and content.get("digest") != digest(content):
        raise Refused(f"{path}: damaged: its digest is not that of its content")
    return content


def load(path, model, restorable=False, known=()):
    """Attach the delta stored at `path` to the plain base `model` and return the model to call.

    Raises Refused for another base, a missing, surplus or misshapen tensor, an unknown method; then the model is
    what it was before. Where deltas take turns on one base, `restorable` lets `detach` give it back, and a fingerprint
    that is `known` to be this base's need not be taken again, which takes longer than all the rest.
    """
    if getattr(model, "delta", None) is not None:
        raise Refused(f"this model carries a delta already ({model.delta}); detach it, or load {path} into a fresh "
                      "base")
    content = read(path)
    if content["format"] == 1:
        warnings.warn(f"{path}: an older file, which proves its base's parameters but not its Config", stacklevel=2)
    delta = methods()[content["method"]](**content["settings"])
    classes, size = content["classes"], sum(t.numel() for t in content["tensors"].values() if t.is_floating_point())
    with as_before_if_refused(model) as before:
        if classes and 0 < classes * model.config.d_model <= size:
            model.classify(classes)
        base = content["base"]
        if base not in known:
            base = fingerprint(own_parameters(model), model.config if content["format"] > 1 else "")
        if content["base"] != base:
            raise Refused(f"{path}: trained on another base (fingerprint {content['base'][:12]}, "
                          f"this base has {base[:12]})")
        wanted = delta.formula(model.config) + sum(p.numel() for p in model.head.parameters() if classes)
        if size != wanted:  # before anything of that size is allocated
            raise Refused(f"{path}: holds {size:,} values, where {delta} on this base has {wanted:,}")
        new = attach(delta, model, mark=base if content["format"] > 1 else None)
        new.before = before.keep(restorable)
        delta.finish(new)
        copy_into(trainable(new) | kept(new), content["tensors"], path)
        for name, places in kept(new).items():
            if places[0] < 0 or places[-1] >= new.base_size or (places.diff() <= 0).any():
                raise Refused(f"{path}: {name} are not places from 0 to {new.base_size - 1}, each once and in order")
    return new


@torch.no_grad()
def copy_into(targets, tensors, path):
    """Copy {name: tensor} into {name: tensor}; the names and the shapes must agree exactly."""
    for what, names in (("misses", set(targets) - set(tensors)), ("has a surplus of", set(tensors) - set(targets))):
        if names:
            raise Refused(f"{path} {what} {', '.join(map(files.shown, sorted(names)[:3]))} ({len(names)} in all)")
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            raise Refused(f"{path}: {name} is {tuple(tensors[name].shape)}, not {tuple(target.shape)}")
        if target.is_floating_point() != tensors[name].is_floating_point():
            raise Refused(f"{path}: {name} is {tensors[name].dtype}, not {target.dtype}")
    for name, target in targets.items():
        target.copy_(tensors[name])


@torch.no_grad()
def merge(model):
    """Fold the delta into plain weights and return the plain model, all frozen, in float32 or more.

    Not in bfloat16, where most of a small update is rounded away. It can be done once: afterwards nothing is
    trainable, and a second call is a ValueError. So is a technique that cannot be merged, or whose merged
    model has other parameters than the base had.
    """
    if not trainable(model):
        raise Refused("nothing to merge: no delta is attached, or it has been merged already")
    delta, shapes = model.delta, model.base_shapes
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model = model.float()
    model = delta.merge(model)
    if strange := sorted(shapes_of(model).items() ^ shapes.items()):
        raise Refused(f"{delta.name} cannot be merged: {strange[0][0]} is left, which is not the base's own")
    model.delta = model.before = None
    return model.requires_grad_(False)
