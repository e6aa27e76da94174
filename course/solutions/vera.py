"""VeRA: LoRA whose A and B are random, frozen and shared by all layers; two vectors a matrix train.

    h = W_0 x + b * (B (d * (A x)))        A (r, d_in), B (d_out, r) drawn once; d (r,), b (d_out,) trained

Family: reparameterisation. A wrapper around each query and each value.
Count: r + d_out a matrix, 2 L (r + d) in all. A and B are drawn again from their seed, and never stored.
b starts at zero, so a new VeRA changes nothing; d starts at 0.1. Merged, the graph is the base's own.
Left out: other matrices than query and value, which would need an A and a B of other shapes.
Reference: Kopiczko, Blankevoort & Asano 2024, "VeRA: Vector-based Random Matrix Adaptation", equation 2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from deltas import Delta, matrix_entries, setting


class Vectors(nn.Module):
    def __init__(self, linear, A, B):
        super().__init__()
        self.linear = linear
        self.register_buffer("A", A, persistent=False)  # a persistent one would be stored
        self.register_buffer("B", B, persistent=False)
        self.d = nn.Parameter(torch.full_like(A[:, 0], 0.1))
        self.b = nn.Parameter(torch.zeros_like(B[:, 0]))

    def left(self):
        return self.b[:, None] * self.B * self.d                                       # (d_out, r)

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.A), self.left())

    def merged(self):
        self.linear.weight += self.left() @ self.A
        return self.linear


@dataclass
class VeRA(Delta):
    family: ClassVar[str] = "reparameterisation"
    lr: ClassVar[float] = 0.1        # gpt-xs, rating, seed 0: 73.3; at 0.03 67.0, at 0.01 63.3
    lr_real: ClassVar[float] = 1e-2  # some ten times LoRA's, as in the paper
    paper: ClassVar[dict] = {"rank": 1024}  # RoBERTa-base
    rank: int = setting(64, "r, rows of A; large, since it costs a parameter a row and not a row", least=1)
    projection_seed: int = setting(0, "draws A and B")

    def attach(self, model):
        width, device = model.config.d_model, model.tokens.weight.device
        chance = torch.Generator().manual_seed(self.projection_seed)
        A = (torch.randn(self.rank, width, generator=chance) / width**0.5).to(device)
        B = (torch.randn(width, self.rank, generator=chance) / self.rank**0.5).to(device)
        for block in model.blocks:
            for name in ("query", "value"):
                setattr(block.attention, name, Vectors(getattr(block.attention, name), A, B))
        return model

    def formula(self, config):
        return 2 * config.n_layer * (self.rank + config.d_model)

    def flops(self, config, text):
        added = 4 * config.n_layer * config.d_model * self.rank  # two thin products beside each of 2 L matrices
        return 2 * matrix_entries(config), 4 * (matrix_entries(config) + added)

    def merge(self, model):
        for block in model.blocks:
            for name in ("query", "value"):
                setattr(block.attention, name, getattr(block.attention, name).merged())
        return model
