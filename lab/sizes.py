"""Real models at their real sizes, and what a delta counts on them, up to GPT-3 175B.

    counted("gpt2", methods()["lora"](rank=8))        Count(base=124439808, delta=294912, head=0)

The real code is counted, on the meta device: a tensor there has a shape and no values, so that 175 billion
parameters take no memory. T5 is not a shape of model.py; it is counted by formula.
"""

import copy
from functools import cache

import torch

from deltas import attach, count, detach
from model import Config, Refused, Transformer


def gpt(d, L, H, n_ctx=1024):
    return Config(vocab_size=50257, n_ctx=n_ctx, d_model=d, n_layer=L, n_head=H, d_ff=4 * d)


def bert(d, L, H, vocab_size, n_ctx=512, n_types=2):
    """The encoder as it is fine-tuned: with its pooler, without the head of its pretraining."""
    return Config(vocab_size=vocab_size, n_ctx=n_ctx, d_model=d, n_layer=L, n_head=H, d_ff=4 * d,
                  causal=False, norm_first=False, activation="gelu", eps=1e-12, n_types=n_types,
                  lm_head="none", pooler=True)


SIZES = {
    "gpt2": gpt(768, 12, 12),
    "gpt2-medium": gpt(1024, 24, 16),
    "gpt2-large": gpt(1280, 36, 20),
    "gpt2-xl": gpt(1600, 48, 25),
    "bert-base-cased": bert(768, 12, 12, 28996),
    "bert-base-uncased": bert(768, 12, 12, 30522),
    "bert-large-cased": bert(1024, 24, 16, 28996),
    "bert-large-uncased": bert(1024, 24, 16, 30522),
    "roberta-base": bert(768, 12, 12, 50265, n_ctx=514, n_types=1),
    "roberta-large": bert(1024, 24, 16, 50265, n_ctx=514, n_types=1),
    "gpt3-175b": gpt(12288, 96, 96, n_ctx=2048),
}
MINILM = bert(384, 6, 12, 30522)  # what runs in minutes here; too small for the tables of costs

# T5 v1.1: width, width of the gated mlp, blocks in each of the two stacks, heads of 64.
T5 = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16),
      "xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}


def size(name):
    """The Config of a model in SIZES."""
    if name not in SIZES:
        raise Refused(f"model {name!r}: choose from {', '.join(SIZES)}")
    return SIZES[name]


def t5_size(name):
    """Parameters of T5 v1.1: no biases, untied head, one table of relative positions a stack."""
    d, f, L, H = T5[name]
    inner = 64 * H
    encoder = L * (4 * d * inner + 3 * d * f + 2 * d)
    decoder = L * (8 * d * inner + 3 * d * f + 3 * d)
    return 2 * 32128 * d + encoder + decoder + 2 * (32 * H + d)


@cache
def base(config):
    """The base of this shape. Made once, then copied: initialising is slow even where nothing is drawn."""
    with torch.device("meta"):
        return Transformer(config)


def attached(config, delta):
    """A base of this shape on the meta device with `delta` attached."""
    with torch.device("meta"):
        return attach(delta, copy.deepcopy(base(config)))


def counted(name, delta):
    """The Count of what `delta` stores on the model `name`; a prefix has dropped its MLP by then."""
    with torch.device("meta"):
        model = attach(delta, base(size(name)), restorable=True)  # and off again: to copy 96 blocks takes longer
    try:
        delta.finish(model)
        return count(model)
    finally:
        detach(model)
