"""The tiny models of the worked examples: all sizes different and awkward, and no weight zero."""

import torch

from deltas import attach
from model import Config, Transformer

GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20)
BERT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20, n_types=2, causal=False,
              norm_first=False, activation="gelu", eps=1e-12, lm_head="mlm", pooler=True)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def stirred(config, delta=None):
    """A model in float64 whose every number has been moved, so that no zero can hide a mistake."""
    torch.manual_seed(0)
    model = Transformer(config)
    model = (model if delta is None else attach(delta, model)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model
