"""Prefix tuning by hand: longer keys and values, what that mixes, and how the MLP is dropped at the end."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from deltas import attach, count, merge, trainable
from harness.settings import Settings
from lab.sizes import attached, size
from methods.prefix import KeysValues, Prefix, activations
from model import Attention, Config, Transformer
from tiny import GPT, IDS, base_of, both, same, stirred



# ---- one idea at a time ----

def in_front(rows, k, v=None, mask=None):
    """The keys, the values (where none are given, those of the text are its keys) and the mask with a prefix."""
    k, v = torch.tensor(k, dtype=torch.float64), torch.tensor(k if v is None else v, dtype=torch.float64)
    k, v, mask = KeysValues(torch.tensor(rows, dtype=torch.float64))(k, v, mask)       # (B, H, S, D/H) before
    return k.tolist(), v.tolist(), mask                                                # (B, H, P+S, D/H) after


@pytest.mark.points(2, "prefix")
def test_a_row_is_a_key_and_then_a_value():
    """Width 2, one head, one row (1, 2 | 10, 20) beside a text of one token."""
    k, v, _ = in_front([[1, 2, 10, 20]], k=[[[[5, 6]]]], v=[[[[50, 60]]]])
    assert sorted(k[0][0]) == [[1, 2], [5, 6]], "the first half of a row is the key"
    assert sorted(v[0][0]) == [[10, 20], [50, 60]], "the second half of a row is the value"


@pytest.mark.points(1, "prefix")
def test_the_rows_stand_in_front_of_the_text_in_their_order():
    """Key and value of each row are equal here and in the next two tests, so that neither is taken for the other."""
    for new in in_front([[1, 1], [2, 2], [3, 3]], k=[[[[7], [8]]]])[:2]:
        assert new == [[[[1], [2], [3], [7], [8]]]], "rows 1, 2, 3, then the text 7, 8"


@pytest.mark.points(2, "prefix")
def test_every_head_has_its_own_part_of_a_row():
    """Width 6, three heads of 2, two rows 0 .. 5 and 10 .. 15: a view where a transpose is needed would mix rows."""
    rows = [[0, 1, 2, 3, 4, 5] * 2, [10, 11, 12, 13, 14, 15] * 2]
    for new in in_front(rows, k=[[[[9, 9]]] * 3])[:2]:
        expected = [[[0, 1], [9, 9], [10, 11]], [[2, 3], [9, 9], [12, 13]], [[4, 5], [9, 9], [14, 15]]]
        assert [sorted(head) for head in new[0]] == expected, "head h has columns 2 h and 2 h + 1 of every row"


@pytest.mark.points(1, "prefix")
def test_every_text_gets_the_same_rows():
    for new in in_front([[1, 1]], k=[[[[7]]], [[[8]]]])[:2]:
        assert [sorted(text[0]) for text in new] == [[[1], [7]], [[1], [8]]], "two texts, one prefix"


@pytest.mark.points(2, "prefix")
def test_the_mask_grows_by_the_prefix_which_all_may_see():
    seen = torch.tensor([[[[True, False], [True, True]]], [[[True, False], [False, True]]]])
    mask = in_front([[1, 1]] * 3, k=[[[[7], [8]]]] * 2, mask=seen)[2]
    assert mask[..., :3].all(), "the prefix stands left, and every token sees it, pads too"
    assert torch.equal(mask[..., 3:], seen), "what a token sees of the text is as before"
    assert in_front([[1, 1]], k=[[[[7]]]])[2] is None, "no mask: all is seen"


class Gives(nn.Module):
    """Whatever comes in, these rows go out: one text, one head."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor([[rows]], dtype=torch.float64)

    def forward(self, x):
        return self.rows


def attention_of(q, keys, values, rows):
    """What an attention layer makes of one query and of keys and values that are given as they are."""
    layer = Attention(Config(17, 16, len(q), 1, 1, 20))
    layer.heads, layer.out = lambda x: x, nn.Identity()
    layer.query, layer.key, layer.value = (Gives(rows) for rows in ([q], keys, values))
    layer.prefix = KeysValues(torch.tensor(rows, dtype=torch.float64))
    return layer(torch.zeros(1))[0, 0]


def test_a_score_is_divided_by_the_root_of_a_heads_width():
    """Width 4. Score of the prefix: 2 ln 3 / √4 = ln 3, it weighs 3; of the text 0, it weighs 1: 3/4 and 1/4."""
    found = attention_of((2.0, 0.0, 0.0, 0.0), keys=[(0.0,) * 4], values=[(0.0, 4.0, 0.0, 0.0)],
                         rows=[[math.log(3), 0, 0, 0, 8, 0, 0, 0]])
    same(found, torch.tensor([6.0, 1.0, 0.0, 0.0]).double(), "the prefix's scores have the scale of the text's")


@pytest.mark.points(1, "prefix")
def test_a_prefix_mixes_two_attentions():
    """(1 - w) attention(q, K, V) + w attention(q, K_P, V_P), w the prefix's share of the sum."""
    q, K, V = (1.0, 2.0), [(0.5, 0.0), (0.0, 1.0)], [(1.0, 0.0), (0.0, 1.0)]
    K_P, V_P = [(1.0, 1.0), (-1.0, 0.5), (0.0, 2.0)], [(3.0, 1.0), (0.0, 2.0), (5.0, 5.0)]
    (text, Z), (prefix, Z_P) = slow_attention(q, K, V), slow_attention(q, K_P, V_P)
    w = Z_P / (Z + Z_P)
    same(attention_of(q, K, V, [[*k, *v] for k, v in zip(K_P, V_P)]), (1 - w) * text + w * prefix, "the mixture by w")


def slow_attention(q, keys, values):
    """One query by hand: weights exp(q.k / √d_h), divided by their sum Z. Returns the mixture and Z."""
    weights = [math.exp(sum(a * b for a, b in zip(q, k)) / math.sqrt(len(q))) for k in keys]
    Z = sum(weights)
    mixture = [sum(w * v[i] for w, v in zip(weights, values)) / Z for i in range(len(q))]
    return torch.tensor(mixture, dtype=torch.float64), Z


@pytest.mark.points(1, "prefix")
def test_zero_keys_and_values_are_not_neutral():
    """A zero key scores 0 and weighs exp(0) = 1: P = 4 of them shrink the output from 1 to Z / (Z + P) = 1/5."""
    found = attention_of((0.0, 0.0), keys=[(5.0, 5.0)], values=[(1.0, 1.0)], rows=[[0.0] * 4] * 4)
    same(found, torch.tensor([0.2, 0.2]).double(), "zeros take their share of the attention")


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
@pytest.mark.points(1, "prefix")
def test_a_masked_prefix_is_the_base_model(config):
    """So the text keeps its positions and nothing but the extra keys has come in."""
    model = stirred(config, Prefix(length=4))
    for block in model.blocks:
        block.attention.prefix = Masked(block.attention.prefix)
    same(model(IDS), base_of(model)(IDS), "the text keeps its positions", atol=1e-12)


@pytest.mark.points(1, "prefix")
def test_each_layer_has_its_own_prefix_and_it_depends_on_no_text():
    model = stirred(GPT, Prefix(length=4))
    first, second = (block.attention.prefix for block in model.blocks)
    assert (first.table - second.table).abs().max() > 1e-3, "rows of its own in every layer"
    k, v = torch.randn(2, 2, 3, 5, 4).double()
    for one, other in zip(first(k, v, None)[:2], first(k + 1, v + 1, None)[:2]):
        assert torch.equal(one[:, :, :4], other[:, :, :4]), "another text, the same rows"


def test_the_prefix_moves_every_logit():
    model = stirred(GPT, Prefix(length=4))
    before = model(IDS)
    with torch.no_grad():
        model.blocks[0].attention.prefix.table[1] += 1
    assert ((model(IDS) - before).abs().amax(dim=-1) > 1e-6).all(), "every token sees every row"


@both
@pytest.mark.points(2, "prefix")
def test_all_of_it_together_in_a_slow_loop(config):
    """One text, one head and one query at a time, in plain Python loops."""
    layer = stirred(config, Prefix(length=4)).blocks[1].attention
    rows, x = layer.prefix.table.tolist(), torch.randn(2, 5, 12).double()              # 12 of key, 12 of value
    q, k, v = (linear(x).tolist() for linear in (layer.query, layer.key, layer.value))
    expected = torch.zeros(2, 5, 12).double()
    for b in range(2):
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            for t in range(5):
                seen = range(t + 1) if config.causal else range(5)
                keys = [row[:12][part] for row in rows] + [k[b][s][part] for s in seen]
                values = [row[12:][part] for row in rows] + [v[b][s][part] for s in seen]
                expected[b, t, part] = slow_attention(q[b][t][part], keys, values)[0]
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    same(layer(x, mask.tril() if config.causal else mask), layer.out(expected), "attention over longer keys")


# ---- the MLP ----

def test_the_rows_are_what_the_mlp_of_the_paper_makes():
    """One matrix (2 L d, h) for all layers is the layers' (2 d, h) on top of each other."""
    model = stirred(GPT, Prefix(length=4, mlp=True, hidden=5))
    first, second = (block.attention.prefix for block in model.blocks)
    trunk = first.trunk
    assert trunk is second.trunk, "one trunk for all layers"
    assert (trunk.words.shape, trunk.dense.weight.shape) == ((4, 12), (5, 12)), "P' (P, d) and W' (h, d)"
    W, b = torch.cat([first.out.weight, second.out.weight]), torch.cat([first.out.bias, second.out.bias])
    expected = torch.tanh(trunk.words @ trunk.dense.weight.T + trunk.dense.bias) @ W.T + b
    same(torch.cat([first.rows(), second.rows()], dim=1), expected, "W_l tanh(W' P' + b') + b_l")


def test_the_mlp_is_dropped_at_the_end_and_the_logits_stay():
    delta = Prefix(length=4, mlp=True, hidden=5)
    model = stirred(GPT, delta)
    assert count(model).delta == delta.training_formula(GPT) == 4 * 12 + 12 * 5 + 5 + 5 * 48 + 48, "the MLP trains"
    before = model(IDS)
    delta.finish(model)
    assert torch.equal(model(IDS), before), "the rows are those that the MLP made"
    assert set(trainable(model)) == {f"blocks.{i}.attention.prefix.table" for i in (0, 1)}, "nothing else is left"
    assert count(model).delta == delta.formula(GPT) == 2 * 2 * 4 * 12, "the rows are stored"


def test_finishing_leaves_a_flat_prefix_alone():
    delta = Prefix(length=4)
    model = attach(delta, Transformer(GPT))
    before = trainable(model)
    delta.finish(model)
    assert all(p is before[name] for name, p in trainable(model).items())


def test_the_trunk_is_trained_through_every_layer():
    """Its gradient is the sum of what each layer alone would give it."""
    model = stirred(GPT, Prefix(length=4, mlp=True, hidden=5))
    trunk, direction = model.blocks[0].attention.prefix.trunk, torch.randn(2, 4, 24).double()
    outputs = [(block.attention.prefix.rows() * d).sum() for block, d in zip(model.blocks, direction)]
    parts = [torch.autograd.grad(output, trunk.words, retain_graph=True)[0] for output in outputs]
    assert all(part.abs().max() > 1e-3 for part in parts), "each layer gives it a gradient"
    same(torch.autograd.grad(sum(outputs), trunk.words)[0], sum(parts), "the sum of the layers'")


def test_the_mlp_has_smaller_steps_than_the_rows():
    """Its default rate is a hundredth of theirs, with every base; the user's own rate stays."""
    assert Prefix().lr == Prefix().lr_real == 0.1 and Prefix(mlp=True).lr == Prefix(mlp=True).lr_real == 1e-3
    made = Settings(Prefix(mlp=True), base="gpt-xs", device="cpu")
    assert made.lr == 1e-3 and made.with_delta(Prefix()).lr == 0.1 and replace(made, lr=0.5).lr == 0.5


def test_the_mlp_starts_with_pytorchs_own_weights_and_small_rows():
    """Uniform in W_l up to 1 / √h, so with variance 1 / 3 h; the rows' spread is near √(h E[tanh²] / 3 h) = 0.3."""
    torch.manual_seed(0)
    model = attach(Prefix(length=50, mlp=True, hidden=400), Transformer(replace(GPT, d_model=48)))
    prefix = model.blocks[1].attention.prefix
    assert prefix.out.weight.abs().max().item() == pytest.approx(1 / 20, rel=1e-2)
    spread = prefix.trunk().pow(2).mean().item() ** 0.5 / 3**0.5
    assert prefix.rows().std().item() == pytest.approx(spread, rel=0.1) and 0.2 < spread < 0.4


# ---- what it starts as ----

@both
@pytest.mark.points(1, "prefix")
def test_a_start_from_words_is_their_keys_and_values(config):
    base, cache = stirred(config).float(), {}
    base(torch.tensor([[12, 7, 3, 0]]), cache=cache)
    expected = [cache[block.attention] for block in base.blocks]
    model = attach(Prefix(length=4, init="words", words="12,7,3,0"), base)
    nothing = torch.zeros(1, 3, 0, 4)
    for block, (k, v) in zip(model.blocks, expected):
        new_k, new_v, _ = block.attention.prefix(nothing, nothing, None)
        same(new_k, k, "the keys of the words", atol=1e-4)
        same(new_v, v, "the values of the words", atol=1e-4)


def test_a_random_start_is_a_quarter_of_the_size_of_the_models_own_keys_and_values():
    torch.manual_seed(0)
    base, cache = Transformer(replace(GPT, n_ctx=256, d_model=48)), {}
    for block in base.blocks:
        block.attention.key.weight.data *= 3                       # keys and values differ in size
    base(torch.randint(17, (1, 200)), cache=cache)
    spreads = [[x.std() for x in cache[block.attention]] for block in base.blocks]
    model = attach(Prefix(length=200), base)
    for block, expected in zip(model.blocks, spreads):
        prefix = block.attention.prefix
        for what, half, spread in zip(("keys", "values"), prefix.table.chunk(2, dim=1), expected):
            assert abs(4 * half.std() / spread - 1) < 0.1, f"{what}: a quarter of the model's own"


def test_a_prefix_may_be_longer_than_the_context():
    """Its words are then read as several texts, one after the other."""
    torch.manual_seed(0)
    words = torch.randint(17, (20,))
    model = attach(Prefix(length=20, init="words", words=",".join(map(str, words.tolist()))), Transformer(GPT))
    table = model.blocks[1].attention.prefix.table
    for part in (slice(0, 16), slice(16, 20)):
        same(table[part], activations(base_of(model).float(), words[part])[1], f"words {part}", atol=1e-5)
    assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 17), "and takes no place from the text"


def test_reading_the_words_leaves_no_gradient_and_no_graph_behind():
    model = attach(Prefix(length=4), Transformer(GPT))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.is_leaf for p in trainable(model).values())


# ---- merging, settings, counts ----

def test_a_prefix_cannot_be_merged():
    with pytest.raises(ValueError, match="cannot be merged: it is P more keys to look at"):
        merge(attach(Prefix(), Transformer(GPT)))


def test_settings_that_make_no_sense_are_refused():
    for settings, message in (({"length": 0}, "length=0"), ({"init": "zero"}, "init='zero'"),
                              ({"hidden": 0}, "hidden=0")):
        with pytest.raises(ValueError, match=message):
            Prefix(**settings)


def test_counts_of_the_prefix_paper():
    """GPT-2 medium: 250K for E2E and WebNLG (P = 5), 500K for DART (P = 10)."""
    medium = size("gpt2-medium")
    assert [Prefix(length=P).formula(medium) for P in (5, 10)] == [245_760, 491_520], "2 L P d"
    assert [round(100 * n / 354_823_168, 3) for n in (245_760, 491_520)] == [0.069, 0.139], "printed: 0.1 %"


def test_in_training_the_mlp_is_7_percent_of_gpt2_not_a_tenth_of_one():
    """What is stored is small; what is trained is the authors' MLP with k = d and h = 512."""
    delta, medium = Prefix(length=5, mlp=True), size("gpt2-medium")
    counted = count(attached(medium, delta))
    assert counted.delta == delta.training_formula(medium) == 25_744_896
    assert round(counted.percent, 1) == 7.3
