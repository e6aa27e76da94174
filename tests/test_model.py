"""The transformer by hand: slow loops beside attention, blocks and heads, and decoding word by word."""

import math

import pytest
import torch
import torch.nn.functional as F

from methods.full import base_size
from model import Attention, Classifier, Config, Slot, Transformer, generate, visible

GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20, eps=1e-3)
BERT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20, n_types=2, causal=False,
              norm_first=False, activation="gelu", eps=1e-2, lm_head="mlm", pooler=True)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
both = pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])


def stirred(config, classes=0):
    """A model in float64 whose every number has been moved, so that no zero can hide a mistake."""
    torch.manual_seed(0)
    model = Transformer(config)
    if classes:
        model.classify(classes)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


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


# ---- attention and its mask ----

@both
def test_attention_equals_a_slow_loop(config):
    attention = stirred(config).blocks[0].attention
    x = torch.randn(2, 5, 12).double()
    mask = torch.rand(2, 5, 5) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    same(attention(x, mask[:, None]), slow_attention(attention, x, mask))
    same(attention(x), slow_attention(attention, x, torch.ones_like(mask)))            # no mask: all is seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries, keys", [(5, 5), (8, 8), (1, 5), (2, 8)])
def test_the_mask_is_what_a_loop_says(causal, queries, keys):
    """keep is about the last five keys; those before are a prompt, which all may see."""
    keep = torch.tensor([[True] * 5, [True, True, True, False, False], [False, False, True, True, True]])
    mask = visible(keep, queries, keys, causal).expand(3, 1, queries, keys)
    for b in range(3):
        for i in range(queries):
            for j in range(keys):
                query, of_text = keys - queries + i, j - (keys - 5)
                allowed = (of_text < 0 or keep[b, of_text].item()) and (not causal or j <= query)
                if not causal or query != j:           # a causal pad may see itself: a row of nothing is NaN
                    assert mask[b, 0, i, j].item() == allowed
                else:
                    assert mask[b, 0, i, j].item()


# ---- blocks and heads by hand ----

@both
def test_the_whole_model_equals_its_equations(config):
    """Embeddings, two blocks and the head, as the two lines at the top of model.py have them."""
    model = stirred(config)
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask = mask.tril() if config.causal else mask
    x = torch.stack([torch.stack([model.tokens.weight[token] + model.positions.weight[place]
                                  for place, token in enumerate(text)]) for text in IDS.tolist()])
    if config.n_types:
        x = norm(x + model.types.weight[0], model.embedding_norm, config)
    act = gelu_tanh if config.causal else gelu
    for block in model.blocks:
        def mlp(h):
            return linear(act(linear(h, block.mlp.up)), block.mlp.down)
        if config.norm_first:
            x = x + slow_attention(block.attention, norm(x, block.norm1, config), mask)
            x = x + mlp(norm(x, block.norm2, config))
        else:
            x = norm(x + slow_attention(block.attention, x, mask), block.norm1, config)
            x = norm(x + mlp(x), block.norm2, config)
    if config.causal:
        expected = norm(x, model.final_norm, config) @ model.tokens.weight.T
    else:
        hidden = norm(gelu(linear(x, model.head.dense)), model.head.norm, config)
        expected = hidden @ model.tokens.weight.T + model.head.decoder.bias
    same(model(IDS), expected)


@both
def test_a_classifier_reads_the_pooled_state(config):
    plain, model = stirred(config), stirred(config, classes=4)
    model.load_state_dict({k: v for k, v in plain.state_dict().items() if not k.startswith("head.")}, strict=False)
    plain.head = torch.nn.Identity()
    state = plain(IDS)                                                                 # (B, T, D)
    if config.pooler:
        state = torch.tanh(linear(state, model.pooler.dense))
    same(model(IDS), linear(state, model.head.out))
    assert model(IDS).shape == (2, 5, 4)


def test_a_bert_without_a_pooler_gets_a_new_one_inside_the_classifier():
    config = Config(17, 16, 12, 2, 3, 20, causal=False, norm_first=False, lm_head="none")
    model = stirred(config, classes=4)
    head, model.head = model.head, torch.nn.Identity()
    state = model(IDS)
    same(head(state), linear(torch.tanh(linear(state, head.new_pooler.dense)), head.out))
    assert sum(p.numel() for p in head.parameters()) == 12 * 12 + 12 + 12 * 4 + 4
    assert stirred(GPT, classes=4).head.new_pooler is None
    assert stirred(BERT, classes=4).head.new_pooler is None                            # it has one of its own


def test_a_new_classifier_starts_small_and_forgets_the_lm_head():
    torch.manual_seed(0)
    model = Transformer(BERT).bfloat16()
    model.classify(400)
    assert isinstance(model.head, Classifier) and model.head.out.weight.dtype == torch.bfloat16
    assert abs(model.head.out.weight.float().std().item() / 0.02 - 1) < 0.1
    assert not model.head.out.bias.any()
    assert model.config.lm_head == "none"
    assert base_size(model.config) == sum(p.numel() for p in model.parameters()) - 400 * 13


@both
def test_the_lm_head_is_the_token_embedding_itself(config):
    model = Transformer(config)
    assert model.head.decoder.weight is model.tokens.weight
    assert not any(name.startswith("head.decoder.weight") for name, _ in model.named_parameters())
    free = Transformer(Config(**{**vars(config), "tied": False}))
    assert free.head.decoder.weight is not free.tokens.weight
    assert base_size(free.config) - base_size(config) == 17 * 12


def test_without_an_lm_head_the_states_come_out():
    assert Transformer(Config(17, 16, 12, 2, 3, 20, lm_head="none"))(IDS).shape == (2, 5, 12)


@both
def test_in_a_new_model_signals_keep_their_size(config):
    """Every matrix N(0, 1 / inputs); biases 0, norms the identity."""
    torch.manual_seed(0)
    model = Transformer(Config(**{**vars(config), "d_model": 48, "vocab_size": 300}))
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.numel() > 500:
            assert abs(p.std().item() * p.shape[1] ** 0.5 - 1) < 0.15, name
        elif p.ndim == 1:
            assert (p == (1 if "norm" in name and "weight" in name else 0)).all(), name


def test_slots_are_empty_and_nothing_but_parameters_is_stored():
    model = Transformer(BERT)
    assert sum(isinstance(module, Slot) for module in model.modules()) == 1 + 3 * 2
    assert Slot()(7) == 7 and Slot()(7, 8, None) == (7, 8, None)
    assert not list(model.buffers())
    assert {type(m).__name__ for n, m in model.named_modules() if hasattr(m, "bias")} == {"Linear", "LayerNorm"}


# ---- positions, pads, at ----

@both
def test_a_position_is_the_number_of_real_tokens_before(config):
    """Two pads in front, or a pad in the middle: the text's own tokens keep 0, 1, 2."""
    model = stirred(config)
    alone = model(IDS[:1, :3])
    for ids, keep in (([8, 8, 3, 1, 4], [0, 0, 1, 1, 1]), ([3, 8, 1, 8, 4], [1, 0, 1, 0, 1])):
        keep = torch.tensor([keep]).bool()
        same(model(torch.tensor([ids]), keep)[keep], alone[0])


@both
def test_logits_are_computed_only_where_they_are_asked_for(config):
    model = stirred(config)
    at = torch.tensor([[True, False, False, True, False], [False, False, True, False, False]])
    expected = model(IDS)[at]
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    same(model(IDS, at=at), expected)
    assert seen == [(3, 12)]


def test_a_text_that_is_too_long_is_refused():
    assert Transformer(GPT)(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 17)
    with pytest.raises(ValueError, match="17 tokens; this model reads at most 16"):
        Transformer(GPT)(torch.zeros(1, 17, dtype=torch.long))


def test_shapes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="d_model=12 is not a multiple of n_head=5"):
        Config(17, 16, 12, 2, 5, 20)
    with pytest.raises(ValueError, match="activation='swish'"):
        Config(17, 16, 12, 2, 3, 20, activation="swish")


# ---- decoding ----

def test_with_a_cache_the_new_tokens_logits_are_those_of_the_whole_text():
    model, cache = stirred(GPT), {}
    whole = model(IDS)
    keep = torch.ones(2, 5, dtype=torch.bool)
    same(model(IDS[:, :3], keep[:, :3], cache=cache), whole[:, :3])
    same(model(IDS[:, 3:4], keep[:, :4], cache=cache), whole[:, 3:4])
    same(model(IDS[:, 4:], keep, cache=cache), whole[:, 4:])
    assert len(cache) == 2 and all(isinstance(owner, Attention) for owner in cache)
    assert cache[model.blocks[0].attention][0].shape == (2, 3, 5, 4)                   # (B, H, S, D/H)


def test_decoding_equals_reading_the_whole_text_again_for_each_word():
    """Three texts of 5, 3 and 1 tokens, side by side with pads."""
    model = stirred(GPT)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 8, 8], [7, 8, 8, 8, 8]])
    keep = torch.tensor([[True] * n + [False] * (5 - n) for n in (5, 3, 1)])
    new = generate(model, ids, keep, steps=6)
    assert new.shape == (3, 6) and len(set(new.flatten().tolist())) > 2
    for row, length in enumerate((5, 3, 1)):
        text = ids[row:row + 1, :length]
        for step in range(6):
            word = model(text)[:, -1].argmax(dim=-1, keepdim=True)
            assert word.item() == new[row, step]
            text = torch.cat([text, word], dim=1)
    same(generate(model, ids[:1], steps=6), new[:1])


def test_decoding_ends_once_every_row_has_stopped():
    """A model whose next word is always the current one plus 1: 3 -> 4 5 6 7, 5 -> 6 7 (and on)."""

    def counts_on(ids, keep, at, cache):
        assert at.sum(dim=1).tolist() == [1, 1]
        return F.one_hot(ids[at] + 1, 17).float()

    new = generate(counts_on, torch.tensor([[3], [5]]), steps=9, stop=7)
    assert new.tolist() == [[4, 5, 6, 7], [6, 7, 8, 9]]
    assert generate(counts_on, torch.tensor([[3], [5]]), steps=2, stop=7).shape == (2, 2)
    assert generate(counts_on, torch.tensor([[3], [5]]), steps=5).shape == (2, 5)
