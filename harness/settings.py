"""The settings of a run, declared once: the fields are the command line, the saved file and the results row.

    Settings(methods()["lora"](rank=4), base="gpt-m")    what was given, the rest by default
    settings.key                                         equal keys, equal results
    settings.completed(task)                             with the steps that `epochs` comes to on this task
"""

import argparse
import hashlib
import json
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from data import world
from data.bases import SHAPES
from data.files import shown
from deltas import Delta, check_fields, methods, setting
from harness import identity
from model import Refused


@dataclass
class Settings:
    """Everything that decides the result of a run. What is None is filled in, by base and technique."""

    delta: Delta
    base: str = setting("gpt-s", f"{', '.join(SHAPES)}, or a folder with a GPT-2, BERT or RoBERTa checkpoint")
    task: str = setting("rating", f"{', '.join(world.TASKS)}, or corpus to pretrain")
    data: str = setting(None, "a folder with your own train.tsv and dev.tsv (or .jsonl, or E2E's .csv)",
                        instead_of="task")
    examples: int = setting(None, "number of training examples [the task's own]", above=0)
    steps: int = setting(None, "training steps [300; for a checkpoint three epochs]", above=0)
    epochs: float = setting(None, "passes over the training examples, instead of --steps", above=0, instead_of="steps")
    batch_size: int = setting(32, "examples in a step", above=0)
    lr: float = setting(None, "learning rate [the technique's own]", above=0)
    head_lr: float = setting(1e-3, "learning rate of the new classifier that a task of a checkpoint needs", above=0)
    seed: int = setting(0, "draws the examples, their order, the little world's test and what is random in the delta")
    dtype: str = setting("float32", "bfloat16: frozen weights and arithmetic in bfloat16, the delta in float32",
                         among=("float32", "bfloat16"))
    device: str = setting(None, "cpu or cuda [cuda if there is one]", among=("cpu", "cuda"))
    scratch: bool = setting(False, "start from random weights in the base's shape")

    def __post_init__(self):
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        check_fields(self)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Refused("device='cuda': PyTorch finds no CUDA device here; choose cpu")
        if self.lr is None:
            self.lr = self.delta.lr if self.shipped else self.delta.lr_real
        if self.lr > 1e30:  # float32 ends at 3e38, and Adam's first step is ten times as long
            raise Refused(f"lr={self.lr:g}: choose 1e30 at most, where nothing converges either")
        if self.steps is None and self.epochs is None:
            self.steps, self.epochs = (300, None) if self.shipped else (None, 3.0)
        if not self.shipped and os.path.isdir(self.base):  # a name of any length
            self.base = str(Path(self.base).resolve())
        if self.data is not None:
            self.data, self.task = str(Path(self.data).resolve()), Path(self.data).resolve().name

    @property
    def shipped(self):
        """Is the base one of the little world's, and not a checkpoint?"""
        return self.base in SHAPES

    @property
    def pretraining(self):
        """Is the task the little world's corpus? (A folder called `corpus` is a folder like any other.)"""
        return self.data is None and self.task == "corpus"

    @property
    def evaluations(self):
        """How often dev is scored on the way: less often for a checkpoint, where that takes long."""
        return 15 if self.shipped else 6

    def completed(self, task):
        """A copy with a number of steps: as many as `epochs` comes to."""
        a_pass = math.ceil(len(task.train) / self.batch_size)
        return replace(self, steps=self.steps or max(1, round(self.epochs * a_pass)), epochs=None)

    def with_delta(self, delta):
        """The same setting with another technique at its own learning rate."""
        return replace(self, delta=delta, lr=None)

    @property
    def plain(self):
        """The settings as plain data, technique and its fields included; of folders the names."""
        mine = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "delta"}
        names = {name: Path(mine[name]).name for name in ("base", "data") if mine[name] is not None}
        return {"method": self.delta.name, **asdict(self.delta), **mine, **names}

    @property
    def key(self):
        """`plain`, and as `content` the digests of the base, the data and the code: equal keys, equal results."""
        return self.plain | {"content": identity.content(self.base, self.data, type(self.delta))}

    @property
    def where(self):
        """The folders that `plain` only names."""
        return {"base": self.base, "data": self.data}

    @property
    def file(self):
        """A file name that tells runs apart: method, base, task and twelve digits from the key."""
        digits = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.delta.name}-{Path(self.base).name}-{self.task}-{digits}.pt"

    def precision(self):
        """The context of forward passes: bfloat16 arithmetic where it was chosen; what trains stays float32."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)


def settings_of(method, **choice):
    """Settings from one flat choice of a technique's fields and a run's: settings_of("lora", rank=4, steps=50)."""
    kind = methods()[method]
    own = {f.name: choice.pop(f.name) for f in fields(kind) if f.name in choice}
    unknown = set(choice) - {f.name for f in fields(Settings)}
    if unknown:
        raise Refused(f"{method} has no {sorted(unknown)[0]!r}, and neither has training")
    return Settings(kind(**own), **choice)


def settings_from(record):
    """The Settings that a record was made with."""
    return settings_of(**record["settings"] | record["where"])


# ---- the command line ----

class Parser(argparse.ArgumentParser):
    """What is typed wrongly is refused as anything else is: in one line."""

    def __init__(self, prog, description, **more):
        super().__init__(prog=prog, description=description, **more,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args=None, namespace=None):
        """What was typed. An empty text is no value of anything, and what is there twice would be lost once."""
        found, seen = super().parse_args(args, namespace), set()
        for word in sys.argv[1:] if args is None else args:
            action = self._option_string_actions.get(word.split("=")[0])
            if action in seen:
                self.error(f"{word}: this option is there twice")
            seen |= {action} - {None}
        for name, one in vars(found).items():
            if "" in (one if isinstance(one, list) else [one]):
                self.error(f"{name} '': an empty text is no value")
        return found

    def error(self, message):
        raise Refused(f"{shown(message, 500)} ({self.prog} --help shows what can be typed)")


def add_options(parser, kind, without=()):
    """Give a parser an option for each `setting` of `kind`, Settings or a technique; None unless it was named."""
    for f in fields(kind):
        if f.metadata and f.name not in without:
            shown = "" if f.default is None else f" [{f.default}]"
            how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
                "type": reader(f), "choices": f.metadata["among"], "metavar": "DIR" if f.name == "data" else None}
            parser.add_argument(*spellings(f.name), default=None, help=f.metadata["help"] + shown, **how)


def spellings(name):
    """--batch_size and --batch-size."""
    return dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])


def chosen(args, kind):
    """{field of `kind`: value} of the options that were named; refuses one that another makes void."""
    found = {f.name: getattr(args, f.name, None) for f in fields(kind)}
    found = {name: value for name, value in found.items() if value is not None}
    for f in fields(kind):
        if f.name in found and f.metadata:
            if (other := f.metadata["instead_of"]) in found:
                raise Refused(f"--{f.name} {found[f.name]} and --{other} {found[other]}: name one of them")
            name, wanted = f.metadata["needs"] or (None, None)
            if name and found.get(name, default_of(kind, name)) != wanted:
                raise Refused(f"--{f.name} {found[f.name]}: it is only read with {name}={wanted}")
    return found


def default_of(kind, name):
    return next(f.default for f in fields(kind) if f.name == name)


def reader(f):
    """How the command line reads a field: counts from 1 on are checked there, the rest where it is constructed."""
    return positive if f.type is int and f.metadata["above"] == 0 else f.type


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


def distinct(option, values, known=None):
    """The values of an option that lists them, if none is empty, unknown or there twice; Refused if one is."""
    for number, value in enumerate(values):
        if value in values[:number] or value == "":
            raise Refused(f"{option} {shown(','.join(map(str, values)))}: "
                          f"{f'{shown(value)} is there twice' if value != '' else 'an empty entry'}")
        if known is not None and value not in known:
            raise Refused(f"{option} {shown(value)}: choose from {', '.join(known)}")
    return values


def value(name, text):
    """A field of a technique or of a run, read from text: value("rank", "8") -> 8."""
    kinds = {f.name: f.type for kind in (Settings, *methods().values()) for f in fields(kind) if f.metadata}
    if name not in kinds:
        raise Refused(f"{name!r} is no field: choose from {', '.join(sorted(kinds))}")
    try:
        return {"true": True, "false": False}[text.lower()] if kinds[name] is bool else kinds[name](text)
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kinds[name]]
        raise Refused(f"{name}={text}: {name} is {wanted}") from None


def arguments(argv=None):
    """What was typed after train.py; a technique's fields become options once --method is known."""
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(f"  {name:<12}{first_line(kind)}" for name, kind in methods().items())
    parser = Parser(
        "train.py", add_help=False,
        description="Freeze a pretrained transformer, train a small delta, compare with training everything.",
        epilog=f"the techniques (--method NAME --help shows the options of one):\n{listing}\n\n"
               "examples:\n  python train.py --method bitfit\n  python train.py --method lora --rank 4 --explain")
    parser.add_argument("--method", choices=methods(), metavar="NAME", required=not {"-h", "--help"} & set(argv),
                        help=", ".join(methods()))
    add_options(parser, Settings)
    parser.add_argument("--out", default="out", metavar="DIR", help="folder for results.jsonl and the deltas [out]")
    parser.add_argument(*spellings("no_baseline"), action="store_true", help="leave out full fine-tuning")
    parser.add_argument("--explain", action="store_true", help="print where the delta sits, and exit")
    parser.add_argument("--fresh", action="store_true", help="begin anew where a run of these settings was stopped")
    known, _ = parser.parse_known_args(argv)
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    if known.method:
        kind = methods()[known.method]
        parser.description, parser.epilog = sys.modules[kind.__module__].__doc__, None
        add_options(parser.add_argument_group(f"options of {known.method}"), kind)
    return parser.parse_args(argv)


def first_line(kind):
    return sys.modules[kind.__module__].__doc__.splitlines()[0].split(": ", 1)[-1]


def settings_typed(args):
    """The Settings of a command line that `arguments` has read."""
    kind = methods()[args.method]
    return Settings(kind(**chosen(args, kind)), **chosen(args, Settings))
