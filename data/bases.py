"""Pretrained bases: those of the little world, which are shipped, and real checkpoints from a folder.

    load_base("gpt-s")                   -> (model, tokenizer)
    load_base("path/to/a/checkpoint")    -> the same for GPT-2, BERT or RoBERTa in Hugging Face's format

The little world's bases were made by `train.py --method full --task corpus --scratch` from random weights; the
exact commands stand in data/README.md. `python -m data.bases keep FILE` turns what such a run saved into a
shipped base: it prints the capability probe, and writes float16 only if the base passes.
"""

import hashlib
import os
import sys
from pathlib import Path

import torch

from data import tokenizers
from data.files import field, pointer, replace, save, shown, sound, tensors, text
from model import Config, Refused, Transformer

WEIGHTS = Path(__file__).parent / "weights"


def gpt(d_model, n_layer, n_head):
    return Config(1024, 96, d_model, n_layer, n_head, 4 * d_model)


def bert(d_model, n_layer, n_head):
    return Config(1024, 96, d_model, n_layer, n_head, 4 * d_model, causal=False, norm_first=False,
                  activation="gelu", eps=1e-12, lm_head="mlm")


SHAPES = {
    "gpt-xs": gpt(48, 2, 4),
    "gpt-s": gpt(96, 4, 4),
    "gpt-m": gpt(160, 5, 5),
    "gpt-l": gpt(192, 5, 6),
    "bert-xs": bert(64, 2, 4),
    "bert-s": bert(96, 4, 4),
}


def load_base(name, scratch=False):
    """(model, tokenizer) of a shipped base or of a checkpoint's folder, in float32 on the CPU.

    With `scratch` the model has the shape of the base and new random weights.
    Refuses what is neither, shipped weights that are not those of weights/SHA256, and a checkpoint that model.py
    cannot compute.
    """
    if name in SHAPES:
        model, tokenizer = Transformer(SHAPES[name]), tokenizers.world(wraps=not SHAPES[name].causal)
        if not scratch:
            fill(model, shipped(name))  # float16 in the file
        model.in_use = tokenizer.in_use
        return model, tokenizer
    if not os.path.isdir(name):
        raise Refused(f"base {shown(repr(name))}: choose from {', '.join(SHAPES)}, or give a checkpoint's folder")
    from data import checkpoints  # needs safetensors, which the little world does not
    config, state = checkpoints.read(name)
    if scratch:
        model = Transformer(config)
    else:
        model = checkpoints.unfilled(config)
        model.load_state_dict(state, assign=True)
        if config.tied and config.lm_head != "none":
            model.head.decoder.weight = model.tokens.weight  # one parameter again, and not two of one memory
    tokenizer = checkpoints.tokenizer(name)
    if config.lm_head == "mlm" and tokenizer.mask is None:
        raise Refused(f"{name}: the model fills in masked words, but its tokenizer has no mask token")
    model.in_use = tokenizer.in_use
    return model, tokenizer


def shipped(name):
    """{name: tensor} of a shipped base, whose bytes must have the digest that stands in weights/SHA256."""
    path, wanted = WEIGHTS / f"{name}.pt", digests()
    if not path.exists():
        raise Refused(f"base {name!r} has no weights at {path}; data/README.md says how they are made")
    if not pointer(path) and digest(path) != wanted.get(path.name):
        raise Refused(f"{path}: SHA-256 {digest(path)[:12]}... is not the one in {WEIGHTS / 'SHA256'}, "
                      f"{wanted.get(path.name, 'none')[:12]}...: damaged, or not written by python -m data.bases keep")
    return sound(tensors(path), path)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests():
    """{file: SHA-256} of the shipped weights; `sha256sum -c SHA256` checks them as well."""
    lines = text(WEIGHTS / "SHA256").splitlines() if (WEIGHTS / "SHA256").exists() else []
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


@torch.no_grad()
def fill(model, tensors):
    """Copy {name: tensor} into all parameters of a model; a tied one has one name."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def keep(path):
    """Write the shipped weights of a base from what training saved at `path`, if they pass the probe."""
    from data import probe
    run = tensors(path)
    name = field(field(run, "notes", dict, path), "base", str, path)
    model, tokenizer = load_base(name, scratch=True)
    halves = {key: tensor.half() for key, tensor in field(run, "tensors", dict, path).items()}
    fill(model, sound(halves, path))
    if not probe.report(model, tokenizer):
        raise SystemExit(f"{name} does not pass; nothing was written")
    path = WEIGHTS / f"{name}.pt"
    save(path, halves)
    lines = [f"{value}  {file}\n" for file, value in sorted((digests() | {path.name: digest(path)}).items())]
    replace(WEIGHTS / "SHA256", lambda part: part.write_text("".join(lines), encoding="utf-8"))
    print(f"wrote {path}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "keep":
        raise SystemExit("usage: python -m data.bases keep out/full-gpt-s-corpus-....pt")
    keep(sys.argv[2])
