"""`eval.py export FILE -o DIR`: a delta as a folder that PEFT reads, or with --merge the whole model for transformers.

    without --merge    LoRA: adapter_config.json and adapter_model.safetensors (lab/peft.py), for the same base
    with --merge       any technique that merges: config.json, model.safetensors, the tokenizer's files

The last lines printed are the Python that loads the folder. What the other side cannot compute is refused.
"""

from os.path import isdir

import torch

from data import checkpoints
from data.bases import SHAPES, load_base
from data.files import field, shown
from deltas import load, merge, methods, read
from harness.settings import Parser
from lab import peft
from lab.score import folders
from methods.adapter import Adapter
from methods.lora import LoRA
from methods.prefix import Prefix
from methods.prompt import Prompt
from model import Refused

CANNOT = {Prompt: peft.SHIFT, Prefix: peft.SHIFT, Adapter: "PEFT has no format for adapters, and no matrix equals one"}


def opened(path, base, whole):
    """(model with its delta, the base's folder, labels of a classifier, {label: token} of a cloze) of a delta file.

    Refuses a base that is no folder, and what has no place in PEFT's format unless the `whole` model is wanted.
    """
    content = read(path)
    kind, notes = methods()[content["method"]], content["notes"]
    base = folders(path, content)["base"] if base is None else base
    scratch = field(notes, "scratch", bool, path, default=False)
    if base in SHAPES:
        raise Refused(f"{path}: its base {base} is this repository's own, and transformers has no such model")
    if not isdir(base):
        raise Refused(f"{path}: its base, {shown(base, 300)}, is not here; --base DIR says where it is now")
    if not whole and kind is not LoRA:
        why = CANNOT.get(kind, f"PEFT has no format for {kind.name}; --merge writes the whole model")
        raise Refused(f"{path}: {why}")
    if not whole and scratch:
        raise Refused(f"{path}: its base is random weights, which are in no folder; --merge writes the whole model")
    torch.manual_seed(field(notes, "seed", int, path, default=0))  # so that these are the run's random weights
    model, labels, words = load(path, load_base(base, scratch)[0]), notes.get("labels") or [], notes.get("label_words")
    if words:
        return model, base, [], dict(zip(labels, words))
    classes = content["classes"]
    return model, base, labels if len(labels) == classes else [str(n) for n in range(classes)], {}


def lines(model, base, labels, words, folder, adapter):
    """The lines of Python that load what was written into `folder`: an adapter beside its base, or a whole model."""
    known = checkpoints.layout(base)
    name, source = checkpoints.class_of(model, known.family), str(base if adapter else folder)
    more = checkpoints.head_settings(known, labels) if adapter else {}  # a whole model's config.json has them
    given = ", ".join([repr(source), *(f"{key}={value!r}" for key, value in more.items())])
    found = [f"from transformers import AutoTokenizer, {name}", f"model = {name}.from_pretrained({given})",
             f"tokenizer = AutoTokenizer.from_pretrained({source!r})"]
    if adapter:
        found += ["from peft import PeftModel", f"model = PeftModel.from_pretrained(model, {str(folder)!r})"]
    return found + ([f"words = {words!r}  # of all tokens, these compete"] if words else [])


def main(argv):
    parser = Parser("eval.py export", __doc__)
    parser.add_argument("file", metavar="FILE", help="a delta that train.py has saved")
    parser.add_argument("-o", dest="out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--merge", action="store_true", help="the whole model, with the delta folded into its weights")
    parser.add_argument("--base", help="the checkpoint's folder, if it has moved", metavar="DIR")
    args = parser.parse_args(argv)
    model, base, labels, words = opened(args.file, args.base, args.merge)
    try:
        if args.merge:
            model = merge(model)
            checkpoints.write(args.out, model, base, labels)
            done = f"the whole model, {sum(p.numel() for p in model.parameters()):,} parameters"
        else:
            ranks = peft.write(args.out, model, base)
            done = f"LoRA of rank {max(ranks.values())} on {len(ranks)} matrices"
    except Refused as error:
        raise Refused(f"{args.file}: {error}") from None
    print(f"wrote      {args.out}: {done}\nto load it:\n")
    print("\n".join(lines(model, base, labels, words, args.out, adapter=not args.merge)))
