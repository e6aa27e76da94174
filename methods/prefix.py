"""Prefix tuning: P free keys and values in every attention layer, in front of the text's own.

    softmax(q [K_P ; K]ᵀ / √d_h) [V_P ; V]        K_P, V_P (P, d) trained in each of L layers

    layer 2    K_P V_P | k1 v1  k2 v2  k3 v3      rows of its own in every layer; a prompt has P words in layer 0,
    layer 1    K_P V_P | k1 v1  k2 v2  k3 v3      and what stands left of the bar above them is computed
    text                   x1     x2     x3       (T, d): as long as before

Family: addition. The slot `prefix` of every attention; the text looks at P rows that belong to no word and
that look at nothing. For one query this mixes two attentions,

    (1 - w) attention(q, K, V) + w attention(q, K_P, V_P),   w: the prefix's share of the sum of exp(scores),

so zero keys and values are not neutral (w > 0), and no finite prefix is: it cannot start as the base model.
The paper found the rows hard to train directly, and makes all of them by one MLP until training ends (mlp):

    [K_P, V_P] of layer l = W_l tanh(W' P' + b') + b_l        P' (P, d), W' (h, d), W_l (2 d, h)

What we found: the rows need no MLP where they start small. PyTorch's first weights make the MLP's rows small, about
0.3, where words' keys and values are about 1. Random rows of a quarter of the words' size learn as well as the MLP
or better on the little bases (cuisine, gpt-xs, five seeds: 97.1 ± 2.0); rows of real words have 92.0 there, and 63.8
on rating, where random ones have 66.9. On MiniLM the MLP has 82.0 on SST-2 and 92.0 on seven kinds of food, random
rows 81.4 and 90.7, words' rows 82.0 and 89.0 (dev, one seed).
An MLP that is fitted to the rows of real words fails there. P rows of that size fill P directions of W_l (its
largest singular value is 10 to 16, with PyTorch's weights 1 to 2), and a step of W' and P' along these moves all
rows of all layers: in MiniLM by 23 % of their size at lr 1e-3, where the step of W_l moves them by 6 % and plain
rows at 0.1 move by 11 %. The rows become alike before they have learned anything.

Count: 2 L P d are stored. Trained with the MLP: P d + d h + h + 2 L d (h + 1).
Left out: P' of another width than d (the authors' code has d as well, their text 512); a start of the MLP from real
words, to whose rows the paper fits it in 500 steps of Adam.
Reference: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", section 4.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from deltas import Delta, Refused, matrix_entries, setting
from methods.prompt import starting_words


def in_front(rows, k, v, mask):
    """Put rows (P, 2 D), a key and a value side by side in each, before the text's k and v (B, H, S, D/H)."""
    (B, H, _, d_h), P = k.shape, len(rows)
    first_k, first_v = rows.to(k.dtype).view(P, 2, H, d_h).permute(1, 2, 0, 3)         # (H, P, D/H) each
    k = torch.cat([first_k.expand(B, -1, -1, -1), k], dim=2)                           # (B, H, P+S, D/H)
    v = torch.cat([first_v.expand(B, -1, -1, -1), v], dim=2)
    return k, v, None if mask is None else F.pad(mask, (P, 0), value=True)


class KeysValues(nn.Module):
    """One layer's prefix as it is stored: the rows themselves."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Parameter(rows)                                                # (P, 2 D)

    def forward(self, k, v, mask):
        return in_front(self.table, k, v, mask)


class Trunk(nn.Module):
    """The part of the MLP that all layers share: tanh(W' P' + b'). Cheap next to the W_l, so never cached."""

    def __init__(self, length, width, hidden, device):
        super().__init__()
        self.words = nn.Parameter(torch.randn(length, width, device=device))           # (P, d)
        self.dense = nn.Linear(width, hidden, device=device)

    def forward(self):
        return torch.tanh(self.dense(self.words))                                      # (P, h)


class MadeByMLP(nn.Module):
    """One layer's prefix in training: its own part W_l of the MLP's last matrix, behind the shared trunk."""

    def __init__(self, trunk, width):
        super().__init__()
        self.trunk = trunk
        self.out = nn.Linear(trunk.dense.out_features, width, device=trunk.words.device)

    def rows(self):
        return self.out(self.trunk())                                                  # (P, 2 D)

    def forward(self, k, v, mask):
        return in_front(self.rows(), k, v, mask)


@dataclass
class Prefix(Delta):
    family: ClassVar[str] = "addition"
    identity: ClassVar[bool] = False
    lr: ClassVar[float] = 0.1
    lr_real: ClassVar[float] = 0.1   # at most 1.3 short on MiniLM; P-tuning v2: 5e-3 to 1e-2, up to a hundred epochs
    rates: ClassVar[tuple] = 3e-2, 1e-1, 3e-1
    paper: ClassVar[dict] = {"length": 10, "mlp": True}  # table-to-text
    length: int = setting(8, "P, rows a layer; the paper: 5 or 10 for table-to-text, 200 for summaries", least=1)
    mlp: bool = setting(False, "train through the paper's MLP, by default at lr 1e-3, and drop it at the end")
    hidden: int = setting(512, "h, the MLP's hidden width; the paper's for summaries: 800", least=1,
                          needs=("mlp", True))
    init: str = setting("random", "start from small random rows (random), or real words' keys and values (words)",
                        among=("random", "words"), needs=("mlp", False))
    words: str = setting("", "those words' token ids, with commas between; the rest is drawn",
                         needs=("init", "words"))

    def __post_init__(self):
        super().__post_init__()
        if self.mlp:  # the paper: 5e-5 to 8e-5, over tens of thousands of steps
            self.lr = self.lr_real = 1e-3

    def attach(self, model):
        if self.mlp:
            trunk = Trunk(self.length, model.config.d_model, self.hidden, model.tokens.weight.device)
            prefixes = [MadeByMLP(trunk, 2 * model.config.d_model) for _ in model.blocks]
        else:
            rows = activations(model, starting_words(self.words, self.length, model))
            if self.init == "random":
                rows = [torch.randn_like(layer) * small(layer) for layer in rows]
            prefixes = [KeysValues(layer) for layer in rows]
        for block, prefix in zip(model.blocks, prefixes):
            block.attention.prefix = prefix
        return model

    def formula(self, config):
        return 2 * config.n_layer * self.length * config.d_model

    def training_formula(self, config):
        if not self.mlp:
            return self.formula(config)
        d, h = config.d_model, self.hidden
        return self.length * d + d * h + h + 2 * config.n_layer * d * (h + 1)

    def flops(self, config, text):
        n, added = matrix_entries(config), self.formula(config)  # each row: one product with q, one with w
        return 2 * (n + added), 4 * n + 6 * added

    def finish(self, model):
        """Drop the MLP: from here on the rows that it makes are the prefix. A second call changes nothing."""
        for block in model.blocks:
            if isinstance(block.attention.prefix, MadeByMLP):
                block.attention.prefix = KeysValues(block.attention.prefix.rows().detach().clone())

    def merge(self, model):
        raise Refused("a prefix cannot be merged: it is P more keys to look at, not a change of a weight")


@torch.no_grad()
def activations(model, ids):
    """The keys and values of a text `ids` (P,) in every layer of the plain model: L tensors (P, 2 D)."""
    if ids.is_meta:  # shapes are counted there, there is nothing to read
        return [ids.new_empty(len(ids), 2 * model.config.d_model, dtype=torch.float32) for _ in model.blocks]
    caches = []
    for piece in ids.split(model.config.n_ctx):
        caches.append({})
        model(piece[None], cache=caches[-1])
    layers = [[torch.cat(cache[block.attention], dim=1)[0] for cache in caches] for block in model.blocks]
    return [torch.cat(pieces, dim=1).transpose(0, 1).flatten(1).float() for pieces in layers]


def small(rows):
    """A quarter of the spread of the keys, and of the values, (2 D,): they differ much in a trained model."""
    return torch.cat([half.std().expand_as(half[0]) / 4 for half in rows.chunk(2, dim=1)])
