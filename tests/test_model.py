"""The transformer by hand: slow loops beside attention, blocks and heads, and decoding word by word."""

import math
from dataclasses import replace

import pytest
import torch

from methods.full import base_size
from methods.prefix import Prefix
from methods.prompt import Prompt
from model import Attention, Classifier, Config, Slot, Transformer, visible
from tiny import BERT, GPT, IDS, base_of, both, same, stirred


def norm(x, layer, config):
    """LayerNorm, one vector at a time; both configs have an eps that is large enough to be seen."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        mean = row.sum() / len(row)
        variance = ((row - mean) ** 2).sum() / len(row)
        rows.append((row - mean) / torch.sqrt(variance + config.eps) * layer.weight + layer.bias)
    return torch.stack(rows).view(x.shape)


def linear(x, layer):
    return torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def slow_attention(attention, x, mask):
    """softmax(q k / √(D/H)) v by loops over texts, heads, queries and keys; mask (B, T, S)."""
    B, T, D = x.shape
    size = D // attention.n_head
    q, k, v = (linear(x, layer) for layer in (attention.query, attention.key, attention.value))
    y = torch.zeros_like(x)
    for b in range(B):
        for h in range(attention.n_head):
            part = slice(h * size, (h + 1) * size)
            for i in range(T):
                seen = [j for j in range(T) if mask[b, i, j]]
                weights = [torch.exp(q[b, i, part] @ k[b, j, part] / math.sqrt(size)) for j in seen]
                y[b, i, part] = sum(w * v[b, j, part] for w, j in zip(weights, seen)) / sum(weights)
    return linear(y, attention.out)


def causal_or_all(config):
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    return mask.tril() if config.causal else mask


# ---- attention and its mask ----

def test_attention_equals_a_slow_loop():
    attention, x = stirred(GPT).blocks[0].attention, torch.randn(2, 5, 12).double()
    mask = torch.rand(2, 5, 5) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    same(attention(x), slow_attention(attention, x, torch.ones_like(mask)), "softmax(q kᵀ / √(D/H)) v, all is seen")
    same(attention(x, mask[:, None]), slow_attention(attention, x, mask), "with a mask of 0 and 1 at random")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.points(3, "model")
def test_the_mask_is_what_a_loop_says(causal):
    """keep is about the last five keys; those before are a prompt, which all may see."""
    keep = torch.tensor([[True] * 5, [True, True, True, False, False], [False, False, True, True, True]])
    for queries, keys in ((5, 5), (8, 8), (1, 5), (2, 8)):
        mask = visible(keep, queries, keys, causal).expand(3, 1, queries, keys)
        for b in range(3):
            for i in range(queries):
                for j in range(keys):
                    query, of_text = keys - queries + i, j - (keys - 5)
                    allowed = (of_text < 0 or keep[b, of_text].item()) and (not causal or j <= query)
                    allowed = allowed or causal and query == j     # a pad sees itself: a row of nothing is NaN
                    assert mask[b, 0, i, j].item() == allowed, f"text {b}: query {query}, key {j} of {keys}"


# ---- blocks and heads by hand ----

@both
@pytest.mark.points(3, "model")
def test_a_block_equals_its_equation(config):
    """The two lines at the top of model.py: norms first or last, GPT's gelu or BERT's."""
    block, x, mask = stirred(config).blocks[0], torch.randn(2, 5, 12).double(), causal_or_all(config)

    def mlp(h):
        return linear((gelu_tanh if config.causal else gelu)(linear(h, block.mlp.up)), block.mlp.down)

    same(block.attention(x, mask[:, None]), slow_attention(block.attention, x, mask), "heads, and scores over √(D/H)")
    same(block.mlp(x), mlp(x), "the mlp and its activation")
    if config.norm_first:
        y = x + slow_attention(block.attention, norm(x, block.norm1, config), mask)
        y = y + mlp(norm(y, block.norm2, config))
    else:
        y = norm(x + slow_attention(block.attention, x, mask), block.norm1, config)
        y = norm(y + mlp(y), block.norm2, config)
    same(block(x, mask[:, None]), y, "norms, residual adds, eps")


@both
@pytest.mark.points(2, "model")
def test_a_slot_takes_what_its_sub_layer_gives_before_the_residual_add(config):
    """Attention's output is doubled in its slot, the mlp's tripled: x and the norms know nothing of it."""
    block, x, mask = stirred(config).blocks[0], torch.randn(2, 5, 12).double(), causal_or_all(config)[:, None]
    block.after_attention, block.after_mlp = Times(2.0), Times(3.0)
    if config.norm_first:
        y = x + 2 * block.attention(block.norm1(x), mask)
        y = y + 3 * block.mlp(block.norm2(y))
    else:
        y = block.norm1(x + 2 * block.attention(x, mask))
        y = block.norm2(y + 3 * block.mlp(y))
    same(block(x, mask), y, "the slots, then the residual add, then BERT's norm")


class Times(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


@both
@pytest.mark.points(2, "model")
def test_the_whole_model_is_embeddings_blocks_and_head(config):
    model, mask = stirred(config), causal_or_all(config)[:, None]
    x = torch.stack([torch.stack([model.tokens.weight[token] + model.positions.weight[place]
                                  for place, token in enumerate(text)]) for text in IDS.tolist()])
    if config.n_types:
        x = norm(x + model.types.weight[0], model.embedding_norm, config)
    for block in model.blocks:
        x = block(x, mask)
    if config.causal:
        expected = norm(x, model.final_norm, config) @ model.tokens.weight.T
    else:
        hidden = norm(gelu(linear(x, model.head.dense)), model.head.norm, config)
        expected = hidden @ model.tokens.weight.T + model.head.decoder.bias
    same(model(IDS), expected, "embeddings, blocks, tied head")


@both
@pytest.mark.points(1, "model")
def test_a_classifier_reads_the_pooled_state(config):
    model = stirred(config, classes=4)
    assert model.head.new_pooler is None, "a new pooler is for a BERT that has none"
    plain = base_of(model)
    plain.head = torch.nn.Identity()
    state = plain(IDS)                                                                 # (B, T, D)
    if config.pooler:
        state = torch.tanh(linear(state, model.pooler.dense))
    same(model(IDS), linear(state, model.head.out), "W pooled + b, four classes")


@pytest.mark.points(1, "model")
def test_a_bert_without_a_pooler_gets_a_new_one_inside_the_classifier():
    model = stirred(replace(BERT, pooler=False), classes=4)
    head, model.head = model.head, torch.nn.Identity()
    state = model(IDS)
    same(head(state), linear(torch.tanh(linear(state, head.new_pooler.dense)), head.out), "tanh(W x + b), then W, b")
    assert sum(p.numel() for p in head.parameters()) == 12 * 12 + 12 + 12 * 4 + 4, "D² + D and D C + C"
    assert stirred(GPT, classes=4).head.new_pooler is None, "a GPT has none"
    assert stirred(BERT, classes=4).head.new_pooler is None, "a pooler of the base's own is used"


def test_a_new_classifier_starts_small_and_forgets_the_lm_head():
    torch.manual_seed(0)
    model = Transformer(BERT).bfloat16()
    model.classify(400)
    assert isinstance(model.head, Classifier) and model.head.out.weight.dtype == torch.bfloat16, "the model's precision"
    assert abs(model.head.out.weight.float().std().item() / 0.02 - 1) < 0.1, "N(0, 0.02²)"
    assert not model.head.out.bias.any(), "biases start at zero"
    assert model.config.lm_head == "none", "the Config knows"
    assert base_size(model.config) == sum(p.numel() for p in model.parameters()) - 400 * 13, "the LM head is gone"


@both
@pytest.mark.points(1, "counts")
def test_the_lm_head_is_the_token_embedding_itself(config):
    tied, free = Transformer(config), Transformer(replace(config, tied=False))
    assert tied.head.decoder.weight is tied.tokens.weight, "tied"
    assert free.head.decoder.weight is not free.tokens.weight, "not tied"
    for model in (tied, free):
        assert base_size(model.config) == sum(p.numel() for p in model.parameters()), "a tied matrix is counted once"


def test_without_an_lm_head_the_states_come_out():
    assert Transformer(replace(GPT, lm_head="none"))(IDS).shape == (2, 5, 12)


def test_in_a_new_model_signals_keep_their_size():
    """Every matrix N(0, 1 / inputs); biases 0, norms the identity."""
    torch.manual_seed(0)
    model = Transformer(replace(BERT, d_model=48, vocab_size=300))
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.numel() > 500:
            assert abs(p.std().item() * p.shape[1] ** 0.5 - 1) < 0.15, f"{name}: N(0, 1 / inputs)"
        elif p.ndim == 1:
            assert (p == (1 if "norm" in name and "weight" in name else 0)).all(), f"{name}: bias 0, norm 1"


def test_slots_are_empty_and_nothing_but_parameters_is_stored():
    model = Transformer(BERT)
    assert sum(isinstance(module, Slot) for module in model.modules()) == 1 + 3 * 2, "the prompt's, and three a block"
    assert Slot()(7) == 7 and Slot()(7, 8, None) == (7, 8, None), "what comes in goes out"
    assert not list(model.buffers()), "no buffer: all of a base is in its parameters"
    assert {type(m).__name__ for m in model.modules() if hasattr(m, "bias")} == {"Linear", "LayerNorm"}, "for BitFit"


# ---- positions, at, errors ----

@pytest.mark.points(1, "model")
def test_a_position_is_the_number_of_real_tokens_before():
    """Two pads in front, or a pad in the middle: the text's own tokens keep 0, 1, 2."""
    model = stirred(GPT)
    alone = model(IDS[:1, :3])[0]
    for where, ids, keep in (("in front", [8, 8, 3, 1, 4], [0, 0, 1, 1, 1]),
                             ("between", [3, 8, 1, 8, 4], [1, 0, 1, 0, 1])):
        keep = torch.tensor([keep]).bool()
        same(model(torch.tensor([ids]), keep)[keep], alone, f"pads {where}")


@both
@pytest.mark.points(1, "model")
def test_logits_are_computed_only_where_they_are_wanted(config):
    model, seen = stirred(config), []
    at = torch.tensor([[True, False, False, True, False], [False, False, True, False, False]])
    expected = model(IDS)[at]
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    same(model(IDS, at=at), expected, "the same logits, row by row")
    assert seen == [(3, 12)], "the head saw three states of ten"


@both
@pytest.mark.parametrize("delta", [None, Prompt(length=3), Prefix(length=4)], ids=str)
def test_where_each_text_has_one_answer_the_last_block_works_at_that_place_only(config, delta):
    """Texts of 4 and 2 tokens, each read at its last; both blocks are counted: 5 tokens a text, then one."""
    model, seen = stirred(config, delta), []
    keep = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    at = torch.tensor([[False, False, False, True, False], [False, True, False, False, False]])
    expected = model(IDS, keep)[at]
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    same(model(IDS, keep, at=at), expected, "the logits of the whole block")
    soft = 3 if isinstance(delta, Prompt) else 0
    assert seen == [5 + soft, 1], "tokens in the first and in the last block"


def test_what_makes_no_sense_is_refused():
    assert Transformer(GPT)(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 17), "16 tokens fit"
    for call, message in ((lambda: Transformer(GPT)(torch.zeros(1, 17, dtype=torch.long)), "17 tokens; .* at most 16"),
                          (lambda: Config(17, 16, 12, 2, 5, 20), "d_model=12 is not a multiple of n_head=5"),
                          (lambda: replace(GPT, activation="swish"), "activation='swish'")):
        with pytest.raises(ValueError, match=message):
            call()


# ---- the cache ----

@pytest.mark.points(3, "generate")
def test_with_a_cache_the_new_tokens_logits_are_those_of_the_whole_text():
    model, cache, keep = stirred(GPT), {}, torch.ones(2, 5, dtype=torch.bool)
    whole = model(IDS)
    same(model(IDS[:, :2], keep[:, :2], cache=cache), whole[:, :2], "the first two tokens fill the cache")
    same(model(IDS[:, 2:3], keep[:, :3], cache=cache), whole[:, 2:3], "one more token sees them")
    same(model(IDS[:, 3:], keep, cache=cache), whole[:, 3:], "and of the last two each sees all before it")
    assert len(cache) == 2 and all(isinstance(owner, Attention) for owner in cache), "an entry for every attention"
    assert cache[model.blocks[0].attention][0].shape == (2, 3, 5, 4), "(B, H, S, D/H)"
