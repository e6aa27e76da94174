"""(IA)³: learned scales, from 1 on, of keys, values and the mlp's inner state.

    k = l_k * (W_k x)        v = l_v * (W_v x)        mlp = W_down (l_ff * gelu(W_up x))

Family: reparameterisation. A scale of an output is a scale of the matrix's rows, one of an input of its columns.
Count: L (2 d + f).
What is scaled here is the weight alone: its bias is not, where the paper's T5 has none.
Left out: mixing tasks in a batch, each with its own scales.
Reference: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning".
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from deltas import Delta, setting


class Scaled(nn.Module):
    """A frozen Linear whose weight is scaled row by row (axis 1 is kept whole) or column by column (axis 0)."""

    def __init__(self, linear, axis):
        super().__init__()
        self.linear, self.l = linear, nn.Parameter(torch.ones_like(linear.weight.narrow(axis, 0, 1)))

    def forward(self, x):
        return F.linear(x, self.linear.weight * self.l, self.linear.bias)


@dataclass
class IA3(Delta):
    family: ClassVar[str] = "reparameterisation"
    lr: ClassVar[float] = 1e-2
    lr_real: ClassVar[float] = 3e-3  # the paper's, with Adafactor
    mlp: bool = setting(True, "scale the inner state of the mlp too")

    def places(self, model):
        places = [(b.attention, name, 1) for b in model.blocks for name in ("key", "value")]
        return places + [(b.mlp, "down", 0) for b in model.blocks if self.mlp]

    def attach(self, model):
        for owner, name, axis in self.places(model):
            setattr(owner, name, Scaled(getattr(owner, name), axis))
        return model

    def formula(self, config):
        return config.n_layer * (2 * config.d_model + config.d_ff * self.mlp)

    def merge(self, model):
        for owner, name, _ in self.places(model):
            getattr(owner, name).linear.weight *= getattr(owner, name).l
            setattr(owner, name, getattr(owner, name).linear)
        return model
