"""Last-layer tuning: train the top k blocks, keep everything below as it is.

    h_(L-k) = frozen blocks (x),    y = trained blocks (h_(L-k))

Family: specification. Nothing is attached; k blocks are chosen.
Count: k blk, blk = 12 d² + 13 d for f = 4 d (see full.py). The final norm and a tied LM head stay frozen:
training the head would change the input embedding too.
Below the chosen blocks nothing requires a gradient, so PyTorch records no graph there: the backward pass
ends where training ends, and the activations of the frozen blocks are never kept.
Rate: 1e-2 holds for six of eight pairs of base and task in lab/rates.txt. On `cuisine`, whose answer the frozen base
does not give, gpt-s and gpt-m reach 9 to 23 points more at 3e-2 and above, where bert-s is left with 22 of 90.
Left out: the activations of the frozen blocks could be computed once for all epochs and for all tasks.
Reference: FT-top2 in Li & Liang 2021; Lee, Tang & Lin 2019 (a quarter of the layers gives 90 %).
"""

from dataclasses import dataclass
from typing import ClassVar

from deltas import Delta, Refused, matrix_entries, setting
from methods.full import block_size


@dataclass
class LastLayer(Delta):
    family: ClassVar[str] = "specification"
    lr: ClassVar[float] = 1e-2       # one block has to do the work of all: ten times full fine-tuning's
    lr_real: ClassVar[float] = 1e-3
    rates: ClassVar[tuple] = 1e-2, 3e-3
    paper: ClassVar[dict] = {"k": 2}  # Li & Liang: FT-top2
    k: int = setting(1, "how many blocks to train, from the top; Li & Liang train 2 of 24", least=1)

    def attach(self, model):
        if self.k > len(model.blocks):
            raise Refused(f"k={self.k}: this model has {len(model.blocks)} blocks, choose 1 to that many")
        model.blocks[-self.k:].requires_grad_(True)
        return model

    def formula(self, config):
        return self.k * block_size(config)

    def flops(self, config, text):
        n = matrix_entries(config)
        return 2 * n, 2 * n + 4 * n * self.k // config.n_layer
