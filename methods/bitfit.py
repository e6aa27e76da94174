"""BitFit: train the bias vectors and nothing else.

    y = W x + b            W frozen, b trained
    y = g norm(x) + b      g frozen, b trained

Family: specification. Nothing is attached; the biases are chosen.
Count: L (7 d + f), plus d for the norm around the blocks (final or embedding norm), plus d for a pooler,
plus 2 d + V for an MLM head. With only="query_up", the paper's smaller choice (the query's and the first
mlp bias, its Table 3): L (d + f).
One of them is dead: a constant added to all keys adds the same number q.b to every score of a row, and
softmax does not see it. The key bias has a zero gradient, up to rounding, unless a prefix is there too.
Left out: nothing.
Reference: Ben Zaken, Ravfogel & Goldberg 2022, "BitFit".
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltas import Delta, setting


@dataclass
class BitFit(Delta):
    family: ClassVar[str] = "specification"
    lr: ClassVar[float] = 3e-2       # a bias can only shift: it takes thirty times full fine-tuning's
    lr_real: ClassVar[float] = 3e-3  # the authors' code has 1e-3 at batch 8 and 16 epochs
    rates: ClassVar[tuple] = 3e-2, 1e-2, 6e-2
    only: str = setting("all", "all, or query_up: the query's and the first mlp bias, half of them",
                        among=("all", "query_up"))

    def attach(self, model):
        owners = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm)))
        if self.only == "query_up":
            owners = (m for block in model.blocks for m in (block.attention.query, block.mlp.up))
        for module in owners:
            if module.bias is not None:
                module.bias.requires_grad_(True)
        return model

    def formula(self, config):
        d, f = config.d_model, config.d_ff
        if self.only == "query_up":
            return config.n_layer * (d + f)
        head = 2 * d + config.vocab_size if config.lm_head == "mlm" else 0
        return config.n_layer * (7 * d + f) + d + (d if config.pooler else 0) + head
