"""Full fine-tuning: the baseline that every delta is measured against.

    theta = theta_0 + delta,    |delta| = |theta_0| = D

Family: baseline. Every base parameter gets a gradient, two Adam moments and a copy per task on disk.
Count: D = L blk + (V + n_ctx + types) d + the norms around the blocks + the head's own, where
blk = 4 (d² + d) + 2 d f + f + d + 4 d, which is 12 d² + 13 d for f = 4 d.
Left out: nothing. Weight decay would pull towards 0, not towards theta_0, so there is none.
"""

from dataclasses import dataclass
from typing import ClassVar

from deltas import Delta, matrix_entries


@dataclass
class Full(Delta):
    family: ClassVar[str] = "baseline"
    lr: ClassVar[float] = 1e-3       # small bases need more than the 1e-5 to 5e-5 of BERT; at 3e-3 it forgets
    lr_real: ClassVar[float] = 5e-5  # the upper end of BERT's and GPT-2's usual range
    rates: ClassVar[tuple] = 1e-3, 3e-4, 3e-3

    def attach(self, model):
        return model.requires_grad_(True)

    def formula(self, config):
        return base_size(config)

    def flops(self, config, text):
        return 2 * matrix_entries(config), 6 * matrix_entries(config)


def block_size(config):
    """Parameters of one block: four D x D projections, the two of the mlp, all biases, two norms."""
    d, f = config.d_model, config.d_ff
    return 4 * (d * d + d) + (2 * d * f + f + d) + 4 * d


def base_size(config):
    """Parameters of the whole base, a tied head counted once, a Classifier not at all."""
    d, V = config.d_model, config.vocab_size
    embedding = (V + config.n_ctx + config.n_types) * d
    norm = 2 * d                       # the final norm (GPT) or the embedding norm (BERT)
    pooler = d * d + d if config.pooler else 0
    head = {"none": 0, "linear": 0, "mlm": d * d + d + 2 * d + V}[config.lm_head]
    untied = V * d if config.lm_head != "none" and not config.tied else 0
    return config.n_layer * block_size(config) + embedding + norm + pooler + head + untied
