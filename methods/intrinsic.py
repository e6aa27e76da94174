"""Intrinsic dimension: train d parameters, through a random projection of all weights.

    DID    theta = theta_0 + P z                 theta_0 (D,) frozen, P (D, d) random, fixed; z (d,) trained
    SAID   theta_i = theta_0,i + s_i (P z)_i     one scale s_i for each of m layers, z (d - m,)

Family: reparameterisation. A wrapper around the whole model.
Count: d, with the scales inside the budget: m = L + 2 (the blocks, the embeddings, the rest).
z starts at zero and the scales at one, so that a new delta changes nothing. At the first step a scale has
no gradient (it multiplies P z = 0); from the second on it has.
P comes from fastfood.py, which has unit columns; here it is multiplied by √(D/d), so that it is the rows
that have unit norm. Then an optimiser's step of size lr moves every weight by about lr, whatever d and D
are, and z and the scales can share a learning rate.
One projection serves all weights put end to end: no tensor is too small for it, and a tied one moves once.
Merged, theta is written over theta_0: the graph is the base's own. Stored: d parameters; P is its seed.
Left out: the authors project each tensor apart, crop those smaller than d, and may project the head; here
a Classifier trains beside the delta, as with every technique. They count a layer per tensor; here a layer
is a layer.
References: Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes"; Aghajanyan et al.
2021, "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning".
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.func import functional_call

from deltas import Delta, Refused, matrix_entries, own_parameters, setting
from fastfood import Dense, Fastfood

PROJECTIONS = {"fastfood": Fastfood, "dense": Dense}


class Subspace(nn.Module):
    """The model at theta_0 + P z: it takes what the model takes and returns what the model returns."""

    def __init__(self, model, project, scales=0):
        super().__init__()
        self.model = model
        self.layers = layers(model)
        self.project = project
        device = model.tokens.weight.device
        self.z = nn.Parameter(torch.zeros(project.d, device=device))
        self.scales = nn.Parameter(torch.ones(scales, device=device)) if scales else None

    @property
    def config(self):
        return self.model.config

    @property
    def head(self):
        return self.model.head

    def theta(self):
        """{name: weight}. A tied weight stands here once; functional_call puts it in all its places."""
        base = own_parameters(self.model)
        updates = self.project(self.z).split([p.numel() for p in base.values()])
        if self.scales is not None:
            scales = self.scales.unbind()
            updates = [scales[layer] * update for layer, update in zip(self.layers, updates)]
        return {name: p + update.view_as(p) for (name, p), update in zip(base.items(), updates)}

    def forward(self, ids, keep=None, at=None, cache=None):
        return functional_call(self.model, self.theta(), (ids, keep, at, cache))

    def merged(self):
        new = self.theta()
        for name, p in own_parameters(self.model).items():
            p.copy_(new[name])
        self.z.zero_()  # it is in the weights now: whoever still holds this wrapper must not add it again
        return self.model


def layers(model):
    """The layer of each parameter, in order: blocks are 0..L-1, the embeddings L, all the rest L+1."""
    embeddings = nn.ModuleList([model.tokens, model.positions, model.types, model.embedding_norm])
    groups = [*model.blocks, embeddings]
    place = {id(p): i for i, group in enumerate(groups) for p in group.parameters()}
    return [place.get(id(p), len(groups)) for p in own_parameters(model).values()]


@dataclass
class Intrinsic(Delta):
    family: ClassVar[str] = "reparameterisation"
    lr: ClassVar[float] = 3e-3       # each weight moves by about this much in a step; 3e-2 is worse
    lr_real: ClassVar[float] = 1e-3  # MiniLM: best on SST-2 and seven kinds of food, from 3e-4 to 1e-2
    rates: ClassVar[tuple] = 3e-3, 1e-2
    paper: ClassVar[dict] = {"dim": 20000}  # Aghajanyan et al.: their code's setting
    dim: int = setting(200, "d, how many parameters train, scales included; about RoBERTa-large's d90 on MRPC", least=1)
    projection: str = setting("fastfood", "fastfood, O(D log d), or dense, O(D d)", among=tuple(PROJECTIONS))
    per_layer: bool = setting(False, "SAID: a trained scale for each layer, taken out of the d")
    projection_seed: int = setting(0, "draws P; another seed is another subspace")

    def attach(self, model):
        D = sum(p.numel() for p in own_parameters(model).values())
        m = len(model.blocks) + 2 if self.per_layer else 0
        if not m < self.dim <= D:
            raise Refused(f"dim={self.dim}: this model has {D} weights and {m} scales of layers; "
                             f"choose {m + 1} to {D}")
        kind, device = PROJECTIONS[self.projection], model.tokens.weight.device
        gain = (D / (self.dim - m)) ** 0.5  # unit columns to unit rows
        return Subspace(model, kind(self.dim - m, D, self.projection_seed, gain, device=device), scales=m)

    def formula(self, config):
        return self.dim

    def flops(self, config, text):
        return 2 * matrix_entries(config), 6 * matrix_entries(config)

    def merge(self, model):
        return model.merged()
