"""A transformer in plain PyTorch, GPT-style or BERT-style, with named slots for what a delta may add.

One block, read from the inside out (sub-layers: attention and mlp; norm is LayerNorm):

    GPT-2, norm_first:    x = x + attention(norm1(x))       x = x + mlp(norm2(x))
    BERT, norm last:      x = norm1(x + attention(x))       x = norm2(x + mlp(x))

Four slots stand empty in the base model, where the papers put what they add. A technique fills a slot
by assignment (`block.after_mlp = Adapter(...)`); `print(model)` shows all of them.

    prompt            after the embedding        lengthens x          prompt tuning, Lester et al. 2021
    prefix            inside every attention     lengthens k and v    prefix tuning, Li & Liang 2021
    after_attention   before the residual add    changes x            adapter, Houlsby et al. 2019
    after_mlp         before the residual add    changes x            adapter, Houlsby et al. 2019

Letters at the right edge: B batch, T text tokens, P soft tokens (of a prompt or a prefix), S keys that
can be seen (P + cached + T), D width, H heads, F width of the mlp, V vocabulary, C classes, N targets.

Left out: dropout (a run here is short, and two equal commands must print equal numbers).
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


class Refused(ValueError):
    """What this code refuses: the message names the value, its place and what would be right."""


class NotFinite(Refused):
    """Logits with NaN or infinity in them: an argmax would take the first class, and nobody would notice."""


def finite(logits):
    if not logits.isfinite().all():
        raise NotFinite("logits that are NaN or infinite")
    return logits


@dataclass(frozen=True)
class Config:
    """The shape of a model. The defaults are GPT-2's choices; BERT's stand beside them."""

    vocab_size: int
    n_ctx: int                   # longest text, in tokens
    d_model: int
    n_layer: int
    n_head: int
    d_ff: int
    causal: bool = True          # a token sees itself and what stands before it; BERT: False, it sees all
    norm_first: bool = True      # BERT: False
    activation: str = "gelu_tanh"  # BERT: "gelu", the exact one
    eps: float = 1e-5            # BERT: 1e-12
    n_types: int = 0             # token types (segments); BERT has 2 and we only ever use the first
    lm_head: str = "linear"      # "linear" (GPT), "mlm" (BERT: dense, norm, decoder) or "none"
    tied: bool = True            # the LM head's matrix is the token embedding itself
    pooler: bool = False         # BERT's tanh layer on [CLS], which a classifier reads

    def __post_init__(self):
        if self.d_model % self.n_head:
            raise Refused(f"d_model={self.d_model} is not a multiple of n_head={self.n_head}")
        if self.activation not in ACTIVATIONS:
            raise Refused(f"activation={self.activation!r}: choose from {sorted(ACTIVATIONS)}")


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu}


class Slot(nn.Module):
    """An empty slot: what comes in goes out."""

    def forward(self, *inputs):
        return inputs if len(inputs) > 1 else inputs[0]


class Attention(nn.Module):
    """softmax(q kᵀ / √(D/H)) v for H heads, in four Linear layers (a fused one would hide LoRA's place)."""

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        self.n_head = config.n_head
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(D, D)
        self.value = nn.Linear(D, D)
        self.out = nn.Linear(D, D)
        self.prefix = Slot()

    def heads(self, x):
        B, T, D = x.shape
        return x.view(B, T, self.n_head, D // self.n_head).transpose(1, 2)             # (B, H, T, D/H)

    def forward(self, x, mask=None, cache=None, here=None):
        """x (B, T, D); mask (B, 1, T, S), False where a query must not look; cache: see Transformer, here: Block."""
        q, k, v = self.heads(self.query(only(x, here))), self.heads(self.key(x)), self.heads(self.value(x))
        if cache is not None:
            if self in cache:
                k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache[self], (k, v)))
            cache[self] = k, v                                                         # (B, H, S, D/H)
        k, v, mask = self.prefix(k, v, mask)
        if fused(x):
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:  # written out: it can be stepped through, and in bfloat16 it is the faster one on a CPU
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])                    # (B, H, T, S)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            x = scores.softmax(dim=-1) @ v                                             # (B, H, T, D/H)
        return self.out(x.transpose(1, 2).flatten(2))                                  # (B, T, D)


def fused(x):
    """Is PyTorch's attention in one kernel the faster one? On a GPU."""
    return x.is_cuda


def only(x, here):
    """Of x (B, T, ...) one place a text, (B, 1, ...), at the indices `here`, (B,) rows and (B,) places; or all of x."""
    return x if here is None else x[here][:, None]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))                                  # (B, T, D)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = Attention(config)
        self.after_attention = Slot()
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.eps)
        self.mlp = MLP(config)
        self.after_mlp = Slot()
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.eps)

    def forward(self, x, mask=None, cache=None, here=None):
        """x (B, T, D) -> (B, T, D), or (B, 1, D) if the output is wanted `here` only, at one place a text."""
        if self.norm_first:
            x = only(x, here) + self.after_attention(self.attention(self.norm1(x), mask, cache, here))
            x = x + self.after_mlp(self.mlp(self.norm2(x)))
        else:
            x = self.norm1(only(x, here) + self.after_attention(self.attention(x, mask, cache, here)))
            x = self.norm2(x + self.after_mlp(self.mlp(x)))
        return x


class LMHead(nn.Module):
    """Scores for every word: GPT `x Eᵀ`; BERT `norm(gelu(W x + b)) Eᵀ + c`, E (V, D) the embedding if tied."""

    def __init__(self, config, embedding):
        super().__init__()
        D, V = config.d_model, config.vocab_size
        mlm = config.lm_head == "mlm"
        self.dense = nn.Linear(D, D) if mlm else None
        self.norm = nn.LayerNorm(D, eps=config.eps) if mlm else None
        self.activation = ACTIVATIONS[config.activation]
        self.decoder = nn.Linear(D, V, bias=mlm)
        if config.tied:
            self.decoder.weight = embedding.weight

    def forward(self, x):
        if self.dense is not None:
            x = self.norm(self.activation(self.dense(x)))
        return self.decoder(x)                                                         # (..., V)


class Pooler(nn.Module):
    """BERT's tanh(W x + b), read at [CLS]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)

    def forward(self, x):
        return torch.tanh(self.dense(x))                                               # (..., D)


class Classifier(nn.Module):
    """The head for C classes: Linear(pooled x). A BERT-like base without a pooler gets a new one in here.

    Parameters: D C + C, and D² + D more where the pooler is new (RoBERTa).
    """

    def __init__(self, config, n_classes, pooler):
        super().__init__()
        self.new_pooler = Pooler(config) if pooler is None and not config.causal else None
        self.out = nn.Linear(config.d_model, n_classes)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        return self.out(x if self.new_pooler is None else self.new_pooler(x))          # (..., C)


class Transformer(nn.Module):
    """ids (B, T) -> logits (B, T, V), or (N, V) at the N positions where `at` is True.

    After `classify(C)` the last dimension is C: the head then reads the state at [CLS] (BERT) or at the
    text's last token (GPT), which is where `at` must point.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.d_model
        self.tokens = nn.Embedding(config.vocab_size, D)
        self.in_use = range(config.vocab_size)  # ids whose rows mean something; load_base asks the tokenizer
        self.positions = nn.Embedding(config.n_ctx, D)
        self.types = nn.Embedding(config.n_types, D) if config.n_types else None
        self.prompt = Slot()
        self.embedding_norm = nn.Identity() if config.norm_first else nn.LayerNorm(D, eps=config.eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(D, eps=config.eps) if config.norm_first else nn.Identity()
        self.pooler = Pooler(config) if config.pooler else None
        self.head = LMHead(config, self.tokens) if config.lm_head != "none" else nn.Identity()
        self.apply(self.initialise)

    @staticmethod
    def initialise(module):
        """Every matrix N(0, 1 / inputs), so that what goes through keeps its size; biases 0, norms the identity.

        GPT-2 and BERT have a standard deviation of 0.02 at any width. In 96 dimensions signals then start so
        small that pretraining stands still for thousands of steps.
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def classify(self, n_classes):
        """Replace the LM head by a new Classifier, on the device and in the precision of the model."""
        self.config = replace(self.config, lm_head="none")
        old = self.tokens.weight
        self.head = Classifier(self.config, n_classes, self.pooler).to(old.device, old.dtype)

    def forward(self, ids, keep=None, at=None, cache=None):
        """ids (B, T); keep (B, T), False on pads; at (B, T), True where logits are wanted.

        With a cache (an empty dict to begin with; it collects each attention's keys and values) `ids` are
        the new tokens only, and `keep` covers the tokens of the earlier calls too.
        """
        T = ids.shape[1]
        keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
        if keep.shape[1] > self.config.n_ctx:
            raise Refused(f"a text of {keep.shape[1]} tokens; this model reads at most {self.config.n_ctx}")
        # A token's position is the number of real tokens before it: pads count for nothing, soft tokens too.
        place = (keep.cumsum(dim=1) - 1).clamp(min=0)[:, -T:]                          # (B, T)
        x = self.tokens(ids) + self.positions(place)                                   # (B, T, D)
        if self.types is not None:
            x = x + self.types.weight[0]
        if not cache:  # a prompt is read once; from then on its keys and values are in the cache
            x = self.prompt(x)                                                         # (B, P+T, D)
        x = self.embedding_norm(x)
        seen = next(iter(cache.values()))[0].shape[2] if cache else 0
        mask = visible(keep, x.shape[1], seen + x.shape[1], self.config.causal)        # (B, 1, P+T, S)
        for block in self.blocks[:-1]:
            x = block(x, mask, cache)
        if at is not None and (at.sum(dim=1) == 1).all():  # nobody reads the last block's other outputs
            here = F.pad(at, (x.shape[1] - T, 0)).nonzero(as_tuple=True)               # (B,), (B,)
            x = self.blocks[-1](x, only(mask.transpose(1, 2), here), cache, here)[:, 0]  # (B, D), and N = B
        else:
            x = self.blocks[-1](x, mask, cache)[:, -T:]                                # (B, T, D)
            x = x if at is None else x[at]                                             # (N, D)
        x = self.final_norm(x)
        if isinstance(self.head, Classifier) and self.pooler is not None:
            x = self.pooler(x)
        return self.head(x)


def visible(keep, queries, keys, causal):
    """The mask: entry (b, 0, i, j) is True where query i may look at key j.

    The queries are the last of the keys. What stands left of the text (a prompt) is seen by all of it.
    Never `is_causal=True`: PyTorch aligns that triangle top-left, wrong as soon as there are more keys.
    """
    mask = F.pad(keep, (keys - keep.shape[1], 0), value=True)[:, None, None, :]        # (B, 1, 1, S)
    if causal:
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=keep.device).tril(keys - queries)
        itself = triangle.triu(keys - queries)  # a pad left of the text sees itself: not NaN
        mask = mask & triangle | itself
    return mask.expand(-1, -1, queries, -1)                                            # (B, 1, T, S)


@torch.no_grad()
def generate(model, ids, keep=None, steps=64, stop=None):
    """Greedy decoding with a key/value cache: ids (B, T), padded on the right, -> new tokens (B, <= steps).

    Ends early when every row has produced the token `stop`. What a row holds behind its stop has no meaning.
    """
    keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep            # (B, T)
    last = keep.sum(dim=1, keepdim=True) - 1                                           # (B, 1)
    at = torch.arange(ids.shape[1], device=ids.device) == last                         # (B, T)
    cache, new, done = {}, [], torch.zeros_like(last, dtype=torch.bool)
    for _ in range(steps):
        logits = finite(model(ids, keep, at=at, cache=cache))                          # (B, V), then (B, 1, V)
        ids = logits.flatten(end_dim=-2).argmax(dim=-1, keepdim=True)                  # (B, 1)
        new.append(ids)
        done |= ids == stop if stop is not None else False
        if done.all():
            break
        at, keep = None, F.pad(keep, (0, 1), value=True)
    return torch.cat(new, dim=1)
