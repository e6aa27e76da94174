"""Exact work on a tiny model, in float64: all sizes different, so that no two can be confused."""

import torch

from deltas import attach, methods, trainable
from model import Config, Transformer

TINY = Config(vocab_size=17, n_ctx=12, d_model=12, n_layer=2, n_head=3, d_ff=20)


def tiny():
    """A small random GPT, the same each time, and a text (2, 5) for it."""
    torch.manual_seed(0)
    model = Transformer(TINY).double()
    with torch.no_grad():  # so large that every part of it matters, biases too
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, torch.randint(TINY.vocab_size, (2, 5))


def with_delta(method, model, **fields):
    """`model` with a new delta, all of it in float64."""
    return attach(methods()[method](**fields), model).double()


def gradients(model, ids):
    """{name: largest absolute gradient} of what is trainable, for next-word prediction on the text itself."""
    next_word_loss(model, ids).backward()
    return {key: 0.0 if p.grad is None else p.grad.abs().max().item() for key, p in trainable(model).items()}


def next_word_loss(model, ids):
    return torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
