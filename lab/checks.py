"""The self-check of every run: what must be true of any delta, whatever the technique."""

import torch

from deltas import fingerprint, trainable
from model import Block


@torch.no_grad()
def outputs(model, batch):
    ids, keep, targets = batch
    return model(ids, keep, at=targets != -100)


def start(model, before, after, say):
    """A new delta leaves the function as it is, bit for bit; prompt and prefix cannot, and are exempt."""
    apart = (before - after).abs().max().item()
    if model.delta.identity and apart > 0:
        raise AssertionError(f"a new {model.delta.name} moves the logits by up to {apart:g}; it must not")
    why = "identical bit for bit" if apart == 0 else f"moved by up to {apart:.2g}: soft tokens are seen at once"
    say(f"check      step 0: the frozen base's logits are {why}")


def end(model, first, frozen_before, say):
    """Frozen tensors are bit-identical, and every delta tensor has moved."""
    still = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if fingerprint(still) != frozen_before:
        raise AssertionError("a frozen tensor has changed")
    kept = f"{sum(p.numel() for p in still.values()):,} numbers are bit-identical" if still else "nothing is frozen"
    say(f"check      frozen: {kept}")
    mine = trainable(model)
    unmoved = [name for name in mine if torch.equal(mine[name], first[name])]
    say(f"check      delta: {len(mine) - len(unmoved)} of {len(mine)} tensors have moved"
        + "".join(f"\n           {name} has not: {why_not(mine[name])}" for name in unmoved))
    keys = {id(p) for block in blocks_of(model) for p in block.attention.key.parameters() if p.ndim == 1}
    if settled := [name for name, p in mine.items() if id(p) in keys]:
        say(f"           ({len(settled)} of them are key biases, moved by rounding noise alone: they add the\n"
            "           same number to every score of a query, and softmax does not see it)")


def why_not(parameter):
    if parameter.grad is None:
        return "it is not on the way from the text to this task's logits"
    if not parameter.grad.any():
        return "its gradient is zero"
    return "no step on the way did better on dev than where it started"


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, Block)]
