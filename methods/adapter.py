"""Adapter: a small bottleneck with a skip, behind attention and behind the mlp of every block.

    A(h) = h + W_up gelu(W_down h + b_down) + b_up        W_down (m, d), W_up (d, m)

Family: addition. Two slots a block, on the sub-layer's output and before the residual add:

    GPT-2: u = x + A(attention(norm1 x)), y = u + A(mlp(norm2 u))     BERT: u = norm1(x + A(attention x)), ...

Count: 2 L (2 m d + m + d), plus 2 d (2 L + 1) for the norms, which the paper trains too.
W_up starts at zero, so a new adapter changes nothing. W_down must not: were both zero, every gradient but
that of b_up would pass through a zero, for ever. (The paper is near zero on both sides: init_std=0.01.)
Rate: on bert-s / cuisine 3e-2 is 3.7 points short of 1e-2 (one seed), elsewhere at most 2.6 (lab/rates.txt).
Left out: the parallel form and the one with a single adapter a block, both from later papers.
Reference: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1 and figure 2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from deltas import Delta, Refused, matrix_entries, setting


class Bottleneck(nn.Module):
    def __init__(self, d, m, init_std, device):
        super().__init__()
        self.down = nn.Linear(d, m, device=device)
        self.up = nn.Linear(m, d, device=device)
        std = init_std or 0.01
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(linear.bias)
        if init_std == 0:
            nn.init.zeros_(self.up.weight)

    def forward(self, h):
        return h + self.up(F.gelu(self.down(h)))                                       # (B, T, D)


@dataclass
class Adapter(Delta):
    family: ClassVar[str] = "addition"
    lr: ClassVar[float] = 3e-2       # new matrices start small and have far to go; 1e-2 loses 17 points on one task
    lr_real: ClassVar[float] = 2e-3  # paper: 3e-5, 3e-4, 3e-3. MiniLM: for m = 8; m = 48 takes 1e-3
    rates: ClassVar[tuple] = 3e-2, 1e-2, 3e-3
    paper: ClassVar[dict] = {"bottleneck": 64}  # the fixed size of its table 1
    bottleneck: int = setting(8, "m, the width in the middle; the smallest of the paper's 8, 64, 256", least=1)
    norms: bool = setting(True, "train the LayerNorms too, as the paper and its code do")
    init_std: float = setting(0.0, "spread of W_down and W_up, the paper's: 0.01; 0: W_up is zero", least=0)

    @property
    def identity(self):
        return self.init_std == 0    # the paper's start is near the base model, not on it

    def attach(self, model):
        for block in model.blocks:
            for place in ("after_attention", "after_mlp"):
                setattr(block, place, Bottleneck(model.config.d_model, self.bottleneck, self.init_std,
                                                 model.tokens.weight.device))
        if self.norms:
            for norm in self.layer_norms(model):
                norm.requires_grad_(True)
        return model

    def layer_norms(self, model):
        """Two in every block and the one around the blocks; an MLM head stays as it is, its norm too."""
        for block in model.blocks:
            yield from (block.norm1, block.norm2)
        yield model.final_norm if model.config.norm_first else model.embedding_norm

    def formula(self, config):
        d, m, L = config.d_model, self.bottleneck, config.n_layer
        return 2 * L * (2 * m * d + m + d) + (2 * d * (2 * L + 1) if self.norms else 0)

    def flops(self, config, text):
        n, added = matrix_entries(config), 4 * config.n_layer * config.d_model * self.bottleneck
        return 2 * (n + added), 4 * n + 6 * added

    def merge(self, model):
        raise Refused("an adapter cannot be merged: no matrix equals a non-linear layer in series")
