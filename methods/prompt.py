"""Prompt tuning: a few free vectors in front of the text, where its word embeddings stand.

    [P ; E(text)]        P (P, d) trained, everything else frozen

    layer 2    h   h   h  | h1  h2  h3     computed, as all of the text
    layer 1    h   h   h  | h1  h2  h3
    layer 0    p1  p2  p3 | x1  x2  x3     (P + T, d): the only place where there is something to train

Family: addition. The one slot `prompt`, behind the embedding; every layer then reads P + T tokens.
Count: P d.
It cannot start as the base model: from the first step on, the text looks at P words that were not there.
In a causal model these words never see the text, so all that reaches it is their keys and values in every
layer: a prompt is a prefix (prefix.py) whose rows are not free but computed from P d parameters.
No length serves every task: on gpt-xs / cuisine 20 words reach 85 where 8 reach 52 to 91, on gpt-s / rating 8 are at 64
and 20 between 42 and 65, which is not learning: the frozen base has 60 (rate 0.03).
Left out: the paper gives soft tokens the first positions, here they have none and the text keeps its own;
it draws words from the 5,000 most frequent, here from all that stand in texts; it averages a label of several
tokens.
Reference: Lester, Al-Rfou & Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning".
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from deltas import Delta, Refused, matrix_entries, setting


class SoftPrompt(nn.Module):
    def __init__(self, vectors):
        super().__init__()
        self.vectors = nn.Parameter(vectors)                                           # (P, D)

    def forward(self, x):
        prompt = self.vectors.to(x.dtype).expand(len(x), -1, -1)                       # (B, P, D)
        return torch.cat([prompt, x], dim=1)                                           # (B, P+T, D)


@dataclass
class Prompt(Delta):
    family: ClassVar[str] = "addition"
    identity: ClassVar[bool] = False
    lr: ClassVar[float] = 0.03       # the paper: 0.3, with Adafactor; here no rate is best everywhere
    lr_real: ClassVar[float] = 0.1   # MiniLM: at most 2.8 points short on SST-2 and seven kinds of food; 0.03: 4.0
    rates: ClassVar[tuple] = 3e-2, 1e-1, 3e-1
    paper: ClassVar[dict] = {"length": 100}
    length: int = setting(20, "P, how many soft words; 8 are too few for cuisine; the paper: 100", least=1)
    init: str = setting("vocab", "start from any words (vocab), from the label words (labels), or random",
                        among=("vocab", "labels", "random"))
    words: str = setting("", "the label words' token ids, with commas between, for init=labels",
                         needs=("init", "labels"))

    def for_task(self, task):
        """With init=labels and no words of the user's own, the words are the task's label words."""
        if self.init != "labels" or self.words:
            return self
        if not task.words:
            raise Refused("init=labels needs a task with label words")
        return replace(self, words=",".join(map(str, task.words)))

    def attach(self, model):
        if self.init == "labels" and not self.words:
            raise Refused("init='labels' needs words, the token ids of the label words, such as '12,7'")
        table = model.tokens.weight.detach().float()                                   # (V, D)
        words = starting_words(self.words if self.init == "labels" else "", self.length, model)
        vectors = F.embedding(words, table)                                            # (P, D)
        if self.init == "random":
            vectors = torch.randn_like(vectors) * table.std()
        model.prompt = SoftPrompt(vectors)
        return model

    def formula(self, config):
        return self.length * config.d_model

    def flops(self, config, text):
        longer = 1 + self.length / text  # soft tokens pass through every layer
        return 2 * matrix_entries(config) * longer, 4 * matrix_entries(config) * longer

    def merge(self, model):
        raise Refused("a prompt cannot be merged: it is P more words to read, not a change of a weight")


def starting_words(words, length, model):
    """Token ids to start from, (length,): those in `words` ("12,7"), then ids drawn from those in use.

    No word twice before all have been drawn: two equal rows get equal gradients, and would remain one row.
    """
    ids = [int(word) if word.strip().isdecimal() else -1 for word in words.split(",")] if words else []
    if any(not 0 <= word < model.config.vocab_size for word in ids):
        raise Refused(f"words={words!r}: token ids with commas between; the vocabulary has 0 to "
                      f"{model.config.vocab_size - 1}")
    if len(ids) > length:
        raise Refused(f"words={words!r}: {len(ids)} words, and length={length} has no place for all of them")
    order = torch.randperm(len(model.in_use), device="cpu").tolist()  # there, a seed draws the same for every device
    ids += [word for word in (model.in_use[i] for i in order) if word not in ids]
    return torch.tensor((ids * -(-length // len(ids)))[:length], device=model.tokens.weight.device)
