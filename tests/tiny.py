"""The tiny models of the worked examples: all sizes different and awkward, and no weight zero."""

import copy

import pytest
import torch

from deltas import attach
from model import Config, Transformer

# An eps so large that its loss is seen.
GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20, eps=1e-3)
BERT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20, n_types=2, causal=False,
              norm_first=False, activation="gelu", eps=1e-2, lm_head="mlm", pooler=True)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
both = pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])


def stirred(config, delta=None, classes=0):
    """A model in float64 whose every parameter has been moved, so that no zero can hide a mistake."""
    torch.manual_seed(0)
    model = Transformer(config)
    if classes:
        model.classify(classes)
    model = (model if delta is None else attach(delta, model)).double()
    stir(model.parameters())
    return model


def stir(parameters, size=0.3, seed=1):
    """Move every value: what is zero, or equal by its initialisation, hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p += size * torch.randn(p.shape, generator=generator).to(p.dtype)


def base_of(model):
    """The base under a technique that fills slots: a plain model with equal weights, and nothing in its slots."""
    base = Transformer(model.config).double()
    base.load_state_dict(copy.deepcopy(model.state_dict()), strict=False)
    return base


def same(found, expected, idea, atol=1e-8):
    """Assert equal shapes, types and values; a failure names the idea, and by how much it is missed."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), \
        f"{idea}: {tuple(found.shape)} in {found.dtype}, not {tuple(expected.shape)} in {expected.dtype}"
    apart = (found - expected).abs().max().item()
    assert apart <= atol, f"{idea}: off by {apart:.2g}"
