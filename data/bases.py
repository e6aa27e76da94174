"""Pretrained bases: those of the little world, which are shipped, and real checkpoints from a folder.

    load_base("gpt-s")                   -> (model, tokenizer)
    load_base("path/to/a/checkpoint")    -> the same for GPT-2, BERT or RoBERTa in Hugging Face's format

The little world's bases were made by `train.py --method full --task corpus --scratch` from random weights; the
exact commands stand in data/README.md. `python -m data.bases keep FILE` turns what such a run saved into a
shipped base: it prints the capability probe, and writes float16 only if the base passes.
"""

import sys
from pathlib import Path

import torch

from data import tokenizers
from model import Config, Transformer

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
    Raises ValueError for what is neither, or for a checkpoint that model.py cannot compute.
    """
    if name in SHAPES:
        model, tokenizer = Transformer(SHAPES[name]), tokenizers.world(wraps=not SHAPES[name].causal)
        if not scratch:
            path = WEIGHTS / f"{name}.pt"
            if not path.is_file():
                raise ValueError(f"base {name!r} has no weights at {path}; data/README.md says how they are made")
            fill(model, torch.load(path, weights_only=True))  # float16 in the file
        return model, tokenizer
    if not Path(name).is_dir():
        raise ValueError(f"base {name!r}: choose from {', '.join(SHAPES)}, or give a checkpoint's folder")
    from data import checkpoints  # needs safetensors, which the little world does not
    config, tensors = checkpoints.read(name)
    model = Transformer(config)
    if not scratch:
        model.load_state_dict(tensors)
    return model, checkpoints.tokenizer(name)


@torch.no_grad()
def fill(model, tensors):
    """Copy {name: tensor} into all parameters of a model; a tied one has one name."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def keep(path):
    """Write the shipped weights of a base from what training saved at `path`, if they pass the probe."""
    from data import probe
    run = torch.load(path, weights_only=True)
    name = run["notes"]["base"]
    model, tokenizer = load_base(name, scratch=True)
    halves = {key: tensor.half() for key, tensor in run["tensors"].items()}
    fill(model, halves)
    if not probe.report(model, tokenizer):
        raise SystemExit(f"{name} does not pass; nothing was written")
    WEIGHTS.mkdir(exist_ok=True)
    torch.save(halves, WEIGHTS / f"{name}.pt")
    print(f"wrote {WEIGHTS / name}.pt, {(WEIGHTS / f'{name}.pt').stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "keep":
        raise SystemExit("usage: python -m data.bases keep out/full-gpt-s-corpus-....pt")
    keep(sys.argv[2])
