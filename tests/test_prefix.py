"""Prefix tuning by hand: longer keys and values, what that mixes, and how the MLP is dropped at the end."""

import copy
import math

import pytest
import torch
from torch import nn

from deltas import attach, count, load, merge, save, trainable
from methods.prefix import KeysValues, Prefix, activations
from model import Attention, Config, Transformer, generate
from tiny import BERT, GPT, IDS, stirred

both = pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])
variants = pytest.mark.parametrize("mlp", [True, False], ids=["mlp", "flat"])


def attention(q, keys, values):
    """One query by hand: weights exp(q.k / √d_h), divided by their sum Z. Returns the mixture and Z."""
    weights = [math.exp(sum(a * b for a, b in zip(q, k)) / math.sqrt(len(q))) for k in keys]
    Z = sum(weights)
    mixture = [sum(w * v[i] for w, v in zip(weights, values)) / Z for i in range(len(q))]
    return torch.tensor(mixture, dtype=torch.float64), Z


@both
def test_a_prefix_is_attention_over_longer_keys(config):
    """The oracle: one row, one head and one query at a time, in plain Python loops."""
    model = stirred(config, Prefix(length=4, mlp=False))
    layer = model.blocks[1].attention
    rows = layer.prefix.table.tolist()                 # P rows: 12 numbers of key, 12 of value
    x = torch.randn(2, 5, 12).double()
    q, k, v = (linear(x).tolist() for linear in (layer.query, layer.key, layer.value))
    expected = torch.zeros(2, 5, 12).double()
    for b in range(2):
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            for t in range(5):
                seen = range(t + 1) if config.causal else range(5)
                keys = [row[:12][part] for row in rows] + [k[b][s][part] for s in seen]
                values = [row[12:][part] for row in rows] + [v[b][s][part] for s in seen]
                expected[b, t, part] = attention(q[b][t][part], keys, values)[0]
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask = mask.tril() if config.causal else mask
    torch.testing.assert_close(layer(x, mask), layer.out(expected), rtol=0, atol=1e-8)


class Gives(nn.Module):
    """Whatever comes in, these rows go out: one text, one head."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor([[rows]], dtype=torch.float64)

    def forward(self, x):
        return self.rows


def test_a_prefix_mixes_two_attentions():
    """(1 - w) attention(q, K, V) + w attention(q, K_P, V_P), w the prefix's share of the sum."""
    q, K, V = (1.0, 2.0), [(0.5, 0.0), (0.0, 1.0)], [(1.0, 0.0), (0.0, 1.0)]
    K_P, V_P = [(1.0, 1.0), (-1.0, 0.5), (0.0, 2.0)], [(3.0, 1.0), (0.0, 2.0), (5.0, 5.0)]
    text, Z = attention(q, K, V)
    prefix, Z_P = attention(q, K_P, V_P)
    w = Z_P / (Z + Z_P)
    expected = (1 - w) * text + w * prefix

    layer = Attention(Config(17, 16, 2, 1, 1, 20))
    layer.heads = lambda x: x    # the query, the keys and the values are given as they are
    layer.query, layer.key, layer.value = (Gives(rows) for rows in ([q], K, V))
    layer.out = nn.Identity()
    layer.prefix = KeysValues(torch.tensor([[*k, *v] for k, v in zip(K_P, V_P)], dtype=torch.float64))
    torch.testing.assert_close(layer(torch.zeros(1))[0, 0], expected, rtol=0, atol=1e-8)


def test_zero_keys_and_values_are_not_neutral():
    """A zero key scores 0 and weighs exp(0) = 1: P of them shrink the output to its Z / (Z + P)."""
    torch.manual_seed(0)
    layer = Attention(GPT).double()
    nn.init.normal_(layer.query.weight)
    nn.init.normal_(layer.key.weight)
    x, P = torch.randn(1, 5, 12).double(), 4
    q, k = layer.heads(layer.query(x)), layer.heads(layer.key(x))
    Z = (q @ k.transpose(2, 3) / math.sqrt(4)).exp().sum(dim=3)                        # (B, H, T)
    layer.out = nn.Identity()
    plain = layer(x)
    layer.prefix = KeysValues(torch.zeros(P, 24).double())
    expected = layer.heads(plain) * (Z / (Z + P))[..., None]
    torch.testing.assert_close(layer.heads(layer(x)), expected, rtol=0, atol=1e-8)
    assert (layer(x) - plain).norm() > 0.05 * plain.norm()


class Masked(nn.Module):
    """A prefix that nobody may look at."""

    def __init__(self, prefix):
        super().__init__()
        self.prefix = prefix

    def forward(self, k, v, mask):
        k, v, longer = self.prefix(k, v, mask)
        longer[..., :-mask.shape[-1]] = False
        return k, v, longer


@both
def test_a_masked_prefix_is_the_base_model(config):
    """So the text keeps its positions and nothing but the extra keys has come in."""
    model = stirred(config, Prefix(length=4, mlp=False))
    assert not torch.allclose(model(IDS), base_of(model)(IDS))
    for block in model.blocks:
        block.attention.prefix = Masked(block.attention.prefix)
    torch.testing.assert_close(model(IDS), base_of(model)(IDS), rtol=0, atol=1e-12)


def base_of(model):
    base = Transformer(model.config).double()
    base.load_state_dict(model.state_dict(), strict=False)
    return base


@both
def test_each_layer_has_its_own_prefix_and_it_depends_on_no_text(config):
    model = stirred(config, Prefix(length=4))
    first, second = (block.attention.prefix for block in model.blocks)
    assert not torch.allclose(first.rows(), second.rows())
    (k, v), mask = torch.randn(2, 2, 3, 5, 4).double(), torch.ones(2, 1, 5, 5).bool()
    for old, new in ((k, first(k, v, mask)[0]), (v, first(k, v, mask)[1])):
        assert torch.equal(new[:, :, 4:], old)
        assert torch.equal(new[0, :, :4], new[1, :, :4])
    assert torch.equal(first(k, v, mask)[0][:, :, :4], first(k + 1, v + 1, mask)[0][:, :, :4])


@both
def test_pads_change_nothing(config):
    model = stirred(config, Prefix(length=4))
    padded = torch.cat([IDS, torch.full((2, 2), 7)], dim=1)
    keep = torch.tensor([[True] * 5 + [False] * 2] * 2)
    torch.testing.assert_close(model(padded, keep)[:, :5], model(IDS), rtol=0, atol=1e-8)


def test_the_last_word_moves_no_earlier_logit_and_the_prefix_moves_all():
    model = stirred(GPT, Prefix(length=4, mlp=False))
    before = model(IDS)
    other = IDS.clone()
    other[:, -1] = 8
    assert torch.equal(model(other)[:, :-1], before[:, :-1])
    with torch.no_grad():
        model.blocks[0].attention.prefix.table[1] += 1
    assert ((model(IDS) - before).abs().amax(dim=-1) > 1e-6).all()


@variants
def test_decoding_with_a_cache_equals_decoding_by_whole_texts(mlp):
    model = stirred(GPT, Prefix(length=4, mlp=mlp))
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    new = generate(model, IDS, keep, steps=6)
    for row, length in ((0, 5), (1, 3)):
        text = IDS[row:row + 1, :length]
        for step in range(6):
            word = model(text)[:, -1:].argmax(dim=-1)
            assert word.item() == new[row, step]
            text = torch.cat([text, word], dim=1)


def test_with_a_prefix_the_key_bias_is_no_longer_dead():
    """One number more on every score of a row is invisible to softmax; on the text's alone, it is not."""
    for delta, dead in ((None, True), (Prefix(length=4, mlp=False), False)):
        model = stirred(GPT, delta).requires_grad_(True)
        model(IDS).pow(2).sum().backward()
        gradient = model.blocks[0].attention.key.bias.grad.abs().max()
        assert (gradient < 1e-12) == dead


# ---- the MLP ----

def test_the_rows_are_what_the_mlp_of_the_paper_makes():
    """One matrix (2 L d, h) for all layers is the layers' (2 d, h) on top of each other."""
    model = stirred(GPT, Prefix(length=4, width=7, hidden=5))
    layers = [block.attention.prefix for block in model.blocks]
    trunk = layers[0].trunk
    assert trunk is layers[1].trunk
    W, b = torch.cat([l.out.weight for l in layers]), torch.cat([l.out.bias for l in layers])
    assert trunk.words.shape == (4, 7) and trunk.dense.weight.shape == (5, 7) and W.shape == (2 * 2 * 12, 5)
    expected = torch.tanh(trunk.words @ trunk.dense.weight.T + trunk.dense.bias) @ W.T + b
    torch.testing.assert_close(torch.cat([l.rows() for l in layers], dim=1), expected, rtol=0, atol=1e-8)


def test_the_mlp_is_dropped_at_the_end_and_the_logits_stay():
    delta = Prefix(length=4, width=7, hidden=5)
    model = stirred(GPT, delta)
    assert count(model).delta == delta.training_formula(GPT) == 4 * 7 + 7 * 5 + 5 + 5 * 48 + 48
    before = model(IDS)
    for _ in range(2):                       # a second call has nothing left to do
        delta.finish(model)
        assert torch.equal(model(IDS), before)
        assert set(trainable(model)) == {f"blocks.{l}.attention.prefix.table" for l in (0, 1)}
        assert count(model).delta == delta.formula(GPT) == 2 * 2 * 4 * 12


def test_finishing_leaves_a_flat_prefix_alone():
    delta = Prefix(length=4, mlp=False)
    model = attach(delta, Transformer(GPT))
    before = trainable(model)
    delta.finish(model)
    assert all(p is before[name] for name, p in trainable(model).items())


@variants
def test_an_evaluation_before_training_stops_nothing(mlp):
    """Rows kept from a pass without gradients would never change again."""
    delta = Prefix(length=4, mlp=mlp)
    model = attach(delta, Transformer(GPT))
    with torch.no_grad():
        first = model(IDS)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).pow(2).sum().backward()
        optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in trainable(model).items())
    assert not torch.equal(model(IDS), first)


def test_the_trunk_is_trained_through_every_layer():
    """Its gradient is the sum of what each layer alone would give it."""
    model = stirred(GPT, Prefix(length=4))
    trunk = model.blocks[0].attention.prefix.trunk
    direction = torch.randn(2, 4, 24).double()
    parts = [torch.autograd.grad((block.attention.prefix.rows() * d).sum(), trunk.words)[0]
             for block, d in zip(model.blocks, direction)]
    both = sum((block.attention.prefix.rows() * d).sum() for block, d in zip(model.blocks, direction))
    torch.testing.assert_close(torch.autograd.grad(both, trunk.words)[0], sum(parts), rtol=0, atol=1e-8)


def test_a_deep_copy_is_a_real_copy():
    model = stirred(GPT, Prefix(length=4))
    twin, before = copy.deepcopy(model), model(IDS)
    layers = [block.attention.prefix for block in twin.blocks]
    assert layers[0].trunk is layers[1].trunk is not model.blocks[0].attention.prefix.trunk
    with torch.no_grad():
        layers[0].trunk.words += 1
    assert torch.equal(model(IDS), before) and not torch.equal(twin(IDS), before)


@variants
def test_the_stored_file_holds_the_rows_alone(mlp, tmp_path):
    torch.manual_seed(0)
    base, delta = Transformer(GPT), Prefix(length=4, mlp=mlp, init="random")
    state = copy.deepcopy(base.state_dict())
    model = attach(delta, base)
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.1 * torch.randn_like(p)
    expected = model(IDS)
    delta.finish(model)
    size = save(tmp_path / "prefix.pt", model)
    assert size < 4 * delta.formula(GPT) + 6000
    fresh = Transformer(GPT)
    fresh.load_state_dict(state)
    assert torch.equal(load(tmp_path / "prefix.pt", fresh)(IDS), expected)


# ---- what it starts as ----

@variants
@both
def test_a_start_from_words_is_their_keys_and_values(config, mlp):
    base = stirred(config).float()
    cache, words = {}, torch.tensor([[12, 7, 3, 0]])
    base(words, cache=cache)
    expected = [cache[block.attention] for block in base.blocks]
    model = attach(Prefix(length=4, init="words", words="12,7,3,0", mlp=mlp), base)
    for block, (k, v) in zip(model.blocks, expected):
        nothing = torch.zeros(1, 3, 0, 4)
        new_k, new_v, _ = block.attention.prefix(nothing, nothing, None)
        torch.testing.assert_close(new_k, k, rtol=0, atol=1e-4)
        torch.testing.assert_close(new_v, v, rtol=0, atol=1e-4)


@variants
def test_a_random_start_has_the_size_of_the_models_own_keys_and_values(mlp):
    """Larger ones would take all the attention from the start, smaller ones none."""
    torch.manual_seed(0)
    base = Transformer(Config(vocab_size=17, n_ctx=256, d_model=48, n_layer=2, n_head=3, d_ff=20))
    for block in base.blocks:
        block.attention.key.weight.data *= 3                       # keys and values differ in size
    cache = {}
    base(torch.randint(17, (1, 200)), cache=cache)
    spreads = [[x.std() for x in cache[block.attention]] for block in base.blocks]
    model = attach(Prefix(length=200, init="random", mlp=mlp, hidden=300), base)
    for block, expected in zip(model.blocks, spreads):
        for half, spread in zip(block.attention.prefix.rows().chunk(2, dim=1), expected):
            assert abs(half.std() / spread - 1) < 0.1


def test_a_prefix_may_be_longer_than_the_context():
    """Its words are then read as several texts, one after the other."""
    torch.manual_seed(0)
    words = torch.randint(17, (20,))
    model = attach(Prefix(length=20, words=",".join(map(str, words.tolist())), mlp=False), Transformer(GPT))
    assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 17)
    table = model.blocks[1].attention.prefix.table
    for part in (slice(0, 16), slice(16, 20)):
        torch.testing.assert_close(table[part], activations(base_of(model).float(), words[part])[1])


def test_the_model_is_untouched_by_the_look_at_its_activations():
    model = attach(Prefix(length=4), Transformer(GPT))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.is_leaf for p in trainable(model).values())


def test_a_prefix_cannot_be_merged():
    with pytest.raises(ValueError, match="keys to look at"):
        merge(attach(Prefix(), Transformer(GPT)))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="length=0"):
        Prefix(length=0)
    with pytest.raises(ValueError, match="init='zero'"):
        Prefix(init="zero")


# ---- counts ----

GPT2_M = Config(50257, 1024, 1024, 24, 16, 4096)


def test_counts_of_the_prefix_paper():
    """GPT-2 medium: 250K for E2E and WebNLG (P = 5), 500K for DART (P = 10)."""
    assert [Prefix(length=P).formula(GPT2_M) for P in (5, 10)] == [245_760, 491_520]
    assert [round(100 * n / 354_823_168, 3) for n in (245_760, 491_520)] == [0.069, 0.139]      # "0.1 %"
    assert Prefix(length=20).formula(GPT2_M) == 983_040                                # a model of 24 x 1024
    assert Prefix(length=10).formula(Config(50257, 1024, 768, 12, 12, 3072)) == 184_320


def test_in_training_the_mlp_is_7_percent_of_gpt2_not_a_tenth_of_one():
    """What is stored is small; what is trained is the authors' MLP with k = d and h = 512."""
    delta = Prefix(length=5, hidden=512)
    with torch.device("meta"):
        model = attach(delta, Transformer(GPT2_M))
    assert count(model).delta == delta.training_formula(GPT2_M) == 25_744_896
    assert round(count(model).percent, 1) == 7.3


def test_counts_of_gpt3_in_the_lora_paper_are_of_another_thing():
    """Its PreLayer replaces activations, L d a word: half of keys and values. And its print fits neither."""
    gpt3 = Config(50257, 2048, 12288, 96, 96, 4 * 12288)
    printed = {4: 5.1, 8: 10.1, 16: 20.2, 36: 44.1, 64: 76.1}
    half = {P: Prefix(length=P).formula(gpt3) // 2 for P in printed}
    assert half == {4: 4_718_592, 8: 9_437_184, 16: 18_874_368, 36: 42_467_328, 64: 75_497_472}
    assert all(round(half[P] / 1e6, 1) != printed[P] for P in printed)
    assert all(1.005 < printed[P] / (half[P] / 1e6) < 1.09 for P in printed)
