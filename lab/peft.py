"""LoRA in PEFT's format, out and back; `eval.py import DIR --base FOLDER -o FILE` makes a delta file of PEFT's folder.

PEFT names a matrix by its path in the class of transformers, with the head that the model has:

    ours     blocks.0.attention.query                              A (r, d_in), B (d_out, r)
    theirs   base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight, and lora_B: the same two

GPT-2 has query, key and value side by side in one c_attn. What stands beside some of them stands beside c_attn:

    A = [A_q ; A_v] (2r, d)        B = [B_q 0 ; 0 0 ; 0 B_v] (3d, 2r)        2 alpha / 2r is the same scale

and back, three LoRAs share A and have a third of B each. Both ways are exact. A name that is wrong is passed over
there, with a warning or without, and the plain base answers. Neither library is imported: files are all there is.
"""

import math
import re
import shlex
from itertools import product
from os.path import lexists
from pathlib import Path

import torch

from data import checkpoints
from data.bases import load_base
from data.files import empty, field, json_of, save_json, shown, sound
from deltas import attach, copy_into, save, trainable
from harness.settings import Parser, distinct, several
from methods.lora import PLACES, LoRA, LoRALinear
from model import Refused

SHIFT = "PEFT gives a text behind P soft tokens the positions P..P+T-1, here it has 0..T-1: the answers would differ"

# What a field of adapter_config.json may say beside nothing, and what anything else would mean.
MAY_BE = {
    "peft_type": (["LORA"], "only LoRA is read"),
    "task_type": (["SEQ_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION"], "no model here has that head"),
    "bias": (["none"], "biases of the base are trained too"),
    "init_lora_weights": ([True, "gaussian", "orthogonal", "eva"],
                          "A and B may belong to another base than the folder's, one without their start"),
    "loftq_config": ([], "A and B belong to a quantised base"),
    "use_dora": ([], "the length of each row of a weight is trained too"),
    "lora_bias": ([], "B has a bias of its own"),
    "layer_replication": ([], "layers of the base are there several times"),
    "trainable_token_indices": ([], "rows of the embedding are trained too")}
# Read below; training and bookkeeping; and which modules have a LoRA, which the tensors say themselves.
NO_MATTER = re.compile(
    r"r|lora_alpha|use_rslora|(rank|alpha)_pattern|base_model_name_or_path|revision|auto_mapping|peft_version"
    r"|inference_mode|lora_dropout|fan_in_fan_out|eva_config|runtime_config|megatron_core|qalora_group_size"
    r"|target_modules|exclude_modules|modules_to_save|layers_to_transform|layers_pattern")


def places(known):
    """{their module, without the family's prefix: [ours]} of all Linears that a LoRA may stand beside."""
    found = {}
    for key, name in known.sources.items():
        ours, leaf = key.rsplit(".", 1)
        if leaf == "weight" and ours.split(".")[-1] in PLACES:
            found.setdefault(name.removesuffix(".weight"), []).append(ours)            # c_attn: query, key, value
    return found


# ---- out ----

@torch.no_grad()
def write(folder, model, base):
    """Write a model's LoRA, and its Classifier where it has one, as a PEFT folder. Returns {their module: rank}."""
    folder, known, delta = empty(folder), checkpoints.layout(base), model.delta
    head, words = checkpoints.head_tensors(model, known.family), model.config.lm_head != "none"
    prefix = checkpoints.PREFIX[known.family] if head or words else ""
    tensors, ranks = {f"base_model.model.{name}": tensor for name, tensor in head.items()}, {}
    for module, ours in places(known).items():
        beside = [model.get_submodule(path) for path in ours]
        if not (loras := [each for each in beside if isinstance(each, LoRALinear)]):
            continue
        A = torch.cat([each.A for each in loras])                                      # (n r, d_in)
        B = torch.block_diag(*(each.B if each in loras else each.weight[:, :0] for each in beside))  # (.., n r)
        for name, tensor in (("A", A), ("B", B)):
            tensors[f"base_model.model.{prefix}{module}.lora_{name}.weight"] = tensor
        ranks[prefix + module] = len(A)
    most = max(ranks.values(), key=list(ranks.values()).count)
    others = {module: rank for module, rank in ranks.items() if rank != most}

    def alpha(rank):  # a whole one without a point, as PEFT declares it
        found = rank // delta.rank * delta.alpha
        return int(found) if found == int(found) else found

    checkpoints.store(folder / "adapter_model.safetensors", tensors)
    save_json(folder / "adapter_config.json", {  # last: a folder without it is none
        "peft_type": "LORA", "task_type": "SEQ_CLS" if head else "CAUSAL_LM" if words and model.config.causal else None,
        "base_model_name_or_path": str(Path(base).resolve()), "inference_mode": True, "lora_dropout": 0.0,
        "bias": "none", "r": most, "lora_alpha": alpha(most), "fan_in_fan_out": known.family == "gpt2",
        "target_modules": list(ranks),  # whole paths: PEFT takes all modules whose path ends so
        "rank_pattern": others, "alpha_pattern": {module: alpha(rank) for module, rank in others.items()},
        "modules_to_save": sorted({"pooler" if ".pooler." in name else name.split(".")[0] for name in head}) or None})
    return ranks


# ---- back ----

def config_of(folder):
    """adapter_config.json, once every field in it is known to be honoured or harmless."""
    path = Path(folder) / "adapter_config.json"
    said = {key: value for key, value in json_of(path).items() if value is not None}
    if field(said, "peft_type", str, path) in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise Refused(f"{path}: peft_type={said['peft_type']!r}: {SHIFT}")
    for key, value in said.items():
        allowed, why = MAY_BE.get(key, ([], "this reader does not know it; if it does not change what the model "
                                        "computes, delete that line"))
        if value not in [*allowed, False, {}, [], ""] and not NO_MATTER.fullmatch(key):
            raise Refused(f"{path}: {shown(key)}={shown(repr(value))}: {why}")
    found = {"r": field(said, "r", int, path, least=1, default=8), "task_type": said.get("task_type"),
             "lora_alpha": field(said, "lora_alpha", float, path, default=8),
             "use_rslora": field(said, "use_rslora", bool, path, default=False)}
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        given = field(said, key, dict, path, default={})
        try:
            found[key] = {re.compile(rf"(.*\.)?({end})"): field(given, end, kind, path) for end in given}
        except re.error as error:
            raise Refused(f"{path}: {key}={shown(given)}: not a pattern: {error}") from None
    return found


def of_module(said, module):
    """(rank, alpha) of a module, by the first pattern that its path ends with. rsLoRA's alpha / √r is √r alpha / r."""
    rank, alpha = (next((value for end, value in said[patterns].items() if end.fullmatch(module)), said[usual])
                   for patterns, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
    return rank, float(alpha) * (math.sqrt(rank) if said["use_rslora"] else 1)


@torch.no_grad()
def read(folder, base, labels=None):
    """(model of the folder `base` with PEFT's LoRA attached, its labels; [] without a classifier).

    It goes by the tensors, each used exactly once. Labels are sorted here, and the classifier's rows with them.
    """
    file, said, known = Path(folder) / "adapter_model.safetensors", config_of(folder), checkpoints.layout(base)
    left = {each.name: each.floating() for each in checkpoints.held(file)}
    tensors, kinds, model = {}, {}, load_base(base)[0]

    def taken(name):
        if (full := f"base_model.model.{name}") not in left:
            hint = ", which modules_to_save=['classifier', 'pooler'] saves: this base has none" * (".pooler." in name)
            raise Refused(f"{file}: misses {full}{hint}")
        return sound({name: left.pop(full).read()}, file)[name]

    for bare, ours in places(known).items():
        full = checkpoints.PREFIX[known.family] + bare
        module = full if f"base_model.model.{full}.lora_A.weight" in left else bare  # a model without a head
        if f"base_model.model.{module}.lora_A.weight" in left:
            A, B = (taken(f"{module}.lora_{name}.weight") for name in "AB")
            kinds[module] = rank, _ = of_module(said, module)
            if A.dim() != 2 or B.dim() != 2 or {len(A), B.shape[1]} != {rank}:
                raise Refused(f"{file}: lora_A and lora_B of {module} are {tuple(A.shape)} and {tuple(B.shape)}; "
                              f"adapter_config.json says rank {rank}")
            for path, part in zip(ours, B.tensor_split(len(ours))):
                tensors |= {f"{path}.A": A, f"{path}.B": part}
    if not kinds:
        raise Refused(f"{file}: no LoRA on a matrix of this base: {shown(', '.join(sorted(left)[:3]), 300)}")
    if rows := classes(left, known, said, file):
        model.classify(rows)
        for key in model.head.state_dict():
            ours, leaf = f"head.{key}".rsplit(".", 1)
            theirs = f"{checkpoints.CLASSIFIER[known.family][ours]}.{leaf}"
            tensors[f"head.{key}"] = torch.zeros(rows) if theirs == "score.bias" else taken(theirs)
    if left:
        names = shown(", ".join(sorted(left)[:3]), 300)
        raise Refused(f"{file}: {len(left)} tensors have no place in a LoRA on this base: {names}")
    delta = lora_of(kinds, tensors, known, file)
    labels = [str(n) for n in range(rows)] if labels is None else labels
    if len(labels) != rows:
        raise Refused(f"--labels {shown(','.join(labels))}: {len(labels)} names for the {rows} classes of {file}")
    model = attach(delta, model)
    copy_into(trainable(model), tensors, file)
    for p in model.head.out.parameters() if rows else ():
        p.copy_(p[sorted(range(rows), key=labels.__getitem__)])
    return model, sorted(labels)


def classes(left, known, said, file):
    """How many classes the file's classifier has; 0 where it has none."""
    out = checkpoints.CLASSIFIER[known.family]["head.out"]
    stored = left.get(f"base_model.model.{out}.weight")
    if (stored is None) == (said["task_type"] == "SEQ_CLS") or stored is not None and stored.like.dim() != 2:
        raise Refused(f"{file}: task_type={said['task_type']!r}, and {out}.weight is "
                      f"{'missing' if stored is None else tuple(stored.like.shape)}; SEQ_CLS has a classifier")
    return 0 if stored is None else len(stored.like)


def lora_of(kinds, tensors, known, file):
    """The one LoRA that stands at all these places: its rank, its alpha and its targets are those of every layer."""
    one, *others = kinds.items()
    if other := next((each for each in others if each[1] != one[1]), None):
        (a, (rank, alpha)), (b, (rank_b, alpha_b)) = one, other
        raise Refused(f"{file}: rank and alpha are {rank} and {alpha:g} at {a}, {rank_b} and {alpha_b:g} at {b}; "
                      "a LoRA here has the same everywhere")
    targets = [name for name in PLACES if any(path.endswith(f".{name}.A") for path in tensors)]
    for n, name in product(range(known.config.n_layer), targets):
        if f"blocks.{n}.{PLACES[name]}.{name}.A" not in tensors:
            raise Refused(f"{file}: layer {n} has no LoRA at {name}, and another layer has; here all layers are alike")
    return LoRA(*one[1], ",".join(targets))


def main(argv):
    parser = Parser("eval.py import", __doc__)
    parser.add_argument("folder", metavar="DIR", help="with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--base", required=True, metavar="FOLDER", help="the checkpoint that it was trained on")
    parser.add_argument("-o", dest="out", required=True, metavar="FILE", help="a new delta file")
    parser.add_argument("--labels", type=several(str), help="names of the classes, in their order there [0,1,...]")
    args = parser.parse_args(argv)
    if lexists(args.out):
        raise Refused(f"-o {shown(args.out, 300)}: is there already")
    model, labels = read(args.folder, args.base, distinct("--labels", args.labels) if args.labels else None)
    notes = {"base": Path(args.base).resolve().name, "data": "unknown"} | ({"labels": labels} if labels else {})
    print(f"wrote      {args.out}, {save(args.out, model, **notes):,} bytes: {model.delta}\nto score it:\n")
    print(shlex.join(["python", "eval.py", "score", args.out, "--base", args.base, "--data", "DIR"]))
