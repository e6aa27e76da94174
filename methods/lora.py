"""LoRA: the update of a weight matrix as a product of two thin ones.

    h = W_0 x + (alpha / r) B A x        W_0 (d_out, d_in) frozen, A (r, d_in), B (d_out, r)

         x ---+--- W_0 ----------------- + --- h
              |                          |         one such pair beside each chosen matrix:
              +--- A --- (r) --- B ------+         query key value out of attention, up down of the mlp

Family: reparameterisation. A wrapper around each chosen Linear; query and value unless told otherwise.
Count: r (d_in + d_out) a matrix; query and value: 4 L d r.
B starts at zero, so a new LoRA changes nothing; A must not, or no gradient would ever arrive. At the first
step A's gradient is zero (it passes through B), from the second on both move.
Merged, W = W_0 + (alpha / r) B A, the graph is the base's own: no cost at inference.
Left out: dropout on the update's input.
Reference: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from deltas import Delta, Refused, matrix_entries, setting

PLACES = {"query": "attention", "key": "attention", "value": "attention", "out": "attention",
          "up": "mlp", "down": "mlp"}


class LoRALinear(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.linear = linear
        self.A = nn.Parameter(torch.empty(rank, d_in, device=linear.weight.device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=linear.weight.device))
        self.scale = alpha / rank
        # The paper draws A from a Gaussian; this is the spread its code has, U(±1/√d_in) there.
        nn.init.normal_(self.A, std=(3 * d_in) ** -0.5)

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.A), self.scale * self.B)     # W_0 x + (alpha / r) B A x

    def merged(self):
        self.linear.weight += self.scale * (self.B @ self.A)
        return self.linear


@dataclass
class LoRA(Delta):
    family: ClassVar[str] = "reparameterisation"
    lr: ClassVar[float] = 1e-2       # ten times full fine-tuning's; 3e-2 is unstable
    lr_real: ClassVar[float] = 3e-3  # the paper: 4e-4 to 5e-4 for RoBERTa-base; 1e-3 was too slow for MiniLM
    rates: ClassVar[tuple] = 1e-2, 3e-3
    paper: ClassVar[dict] = {"rank": 4}  # GPT-2, and the 35 MB of GPT-3
    rank: int = setting(8, "r, the update's rank; the paper's choice for RoBERTa", least=1)
    alpha: float = setting(16.0, "the update is scaled by alpha / rank; 16 as in the authors' scripts")
    targets: str = setting("query,value", "which of query,key,value,out,up,down; the paper's: query,value")

    def __post_init__(self):
        super().__post_init__()
        unknown = [name for name in self.targets.split(",") if name not in PLACES]
        if unknown:
            raise Refused(f"targets: {unknown[0]!r} is none of {', '.join(PLACES)}")
        if len(set(self.targets.split(","))) < len(self.targets.split(",")):
            raise Refused(f"targets={self.targets!r} names a projection twice")

    def attach(self, model):
        for layer, name in self.places(model):
            setattr(layer, name, LoRALinear(getattr(layer, name), self.rank, self.alpha))
        return model

    def places(self, model):
        """(module that owns the Linear, the Linear's name) of every chosen projection."""
        for block in model.blocks:
            for name in self.targets.split(","):
                yield getattr(block, PLACES[name]), name

    def formula(self, config):
        d, f = config.d_model, config.d_ff
        sizes = {"query": 2 * d, "key": 2 * d, "value": 2 * d, "out": 2 * d, "up": d + f, "down": d + f}
        return config.n_layer * self.rank * sum(sizes[name] for name in self.targets.split(","))

    def flops(self, config, text):
        return 2 * matrix_entries(config), 4 * matrix_entries(config) + 6 * self.formula(config)

    def merge(self, model):
        for layer, name in self.places(model):
            setattr(layer, name, getattr(layer, name).merged())
        return model
