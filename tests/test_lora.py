"""LoRA by hand: the product, its scale, its places, merging, and the counts of the papers."""

import copy

import pytest
import torch

from deltas import attach, count, merge, trainable
from methods.lora import LoRA, LoRALinear
from model import Config, Transformer

GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20)
BERT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20, n_types=2, causal=False,
              norm_first=False, activation="gelu", eps=1e-12, lm_head="mlm", pooler=True)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
ALL = "query,key,value,out,up,down"


def stirred(config, delta):
    torch.manual_seed(0)
    model = attach(delta, Transformer(config)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def test_lora_by_hand():
    """Three in, two out, rank 1, alpha 4. W x = (6, 15) for x = (1, 1, 1); A x = 1 - 1 + 2 = 2; scale 4 / 1;
    so B A x = (20, 40) times 4 = (80, 160) and all of it (86, 175), with the bias (87, 177).
    """
    linear = torch.nn.Linear(3, 2)
    lora = LoRALinear(linear, rank=1, alpha=4.0)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        linear.bias.copy_(torch.tensor([1.0, 2.0]))
        lora.A.copy_(torch.tensor([[1.0, -1.0, 2.0]]))
        lora.B.copy_(torch.tensor([[10.0], [20.0]]))
        assert lora(torch.ones(3)).tolist() == [87, 177]
        merged = lora.merged()
    assert merged is linear
    assert merged.weight.tolist() == [[41, -38, 83], [84, -75, 166]]
    assert merged(torch.ones(3)).tolist() == [87, 177]


def test_the_update_is_scaled_by_alpha_over_the_rank():
    for rank, alpha, scale in ((2, 6.0, 3.0), (8, 16.0, 2.0), (4, 1.0, 0.25)):
        assert LoRALinear(torch.nn.Linear(12, 20), rank, alpha).scale == scale
    assert (LoRA().rank, LoRA().alpha, LoRA().targets) == (8, 16.0, "query,value")


@pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])
def test_lora_is_the_dense_update_of_each_chosen_weight(config):
    """The oracle adds (alpha / r) B A to the plain model's weights, entry by entry."""
    model = stirred(config, LoRA(rank=2, alpha=6.0, targets=ALL))
    plain = Transformer(config).double()
    plain.load_state_dict({name.replace(".linear", ""): p for name, p in model.state_dict().items()
                           if not name.endswith((".A", ".B"))})
    for block, wrapped in zip(plain.blocks, model.blocks):
        for place, name in (("attention", "query"), ("attention", "key"), ("attention", "value"),
                            ("attention", "out"), ("mlp", "up"), ("mlp", "down")):
            weight, lora = getattr(getattr(block, place), name).weight, getattr(getattr(wrapped, place), name)
            assert lora.A.shape == (2, weight.shape[1]) and lora.B.shape == (weight.shape[0], 2)
            with torch.no_grad():
                for o in range(weight.shape[0]):
                    for i in range(weight.shape[1]):
                        weight[o, i] += 3 * (lora.B[o, 0] * lora.A[0, i] + lora.B[o, 1] * lora.A[1, i])
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=1e-8)


def test_query_and_value_are_wrapped_and_the_key_is_not():
    """Counts cannot tell: 4 d r a layer would also be two other projections."""
    model = attach(LoRA(rank=2), Transformer(GPT))
    assert set(trainable(model)) == {f"blocks.{i}.attention.{name}.{matrix}"
                                     for i in range(2) for name in ("query", "value") for matrix in "AB"}
    model = attach(LoRA(rank=2, targets="down"), Transformer(GPT))
    assert set(trainable(model)) == {f"blocks.{i}.mlp.down.{matrix}" for i in range(2) for matrix in "AB"}


def test_the_start_is_zero_times_a_spread():
    """B = 0, so that nothing changes; A not, or no gradient would ever arrive."""
    torch.manual_seed(0)
    lora = LoRALinear(torch.nn.Linear(300, 20), rank=50, alpha=1.0)
    assert not lora.B.any()
    assert abs(lora.A.std().item() / (3 * 300) ** -0.5 - 1) < 0.05
    assert abs(lora.A.mean().item()) < 0.001


def test_at_the_first_step_only_b_has_a_gradient():
    torch.manual_seed(0)
    model = attach(LoRA(rank=2), Transformer(GPT))
    model(IDS).square().sum().backward()
    for name, p in trainable(model).items():
        assert p.grad.any() == name.endswith(".B")


def test_as_wide_as_the_matrix_lora_reaches_every_update():
    """Rank min(d_in, d_out): any dW is (alpha / r) B A, by its singular values."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 3).double()
    wanted, before = torch.randn(3, 5).double(), linear.weight.detach().clone()
    lora = LoRALinear(linear, rank=3, alpha=6.0).double()
    U, S, V = torch.linalg.svd(wanted, full_matrices=False)
    with torch.no_grad():
        lora.B.copy_(U * S / 2)                        # the scale is 6 / 3
        lora.A.copy_(V)
        torch.testing.assert_close(lora.merged().weight - before, wanted, rtol=0, atol=1e-12)


# ---- merging ----

def test_merging_changes_the_chosen_weights_and_no_other():
    model = stirred(GPT, LoRA(rank=2)).float()
    before = copy.deepcopy(model)
    plain = merge(model)
    for new, old in zip(plain.blocks, before.blocks):
        for name in ("query", "value"):
            lora = getattr(old.attention, name)
            update = getattr(new.attention, name).weight - lora.linear.weight
            torch.testing.assert_close(update, lora.scale * lora.B @ lora.A, rtol=0, atol=1e-6)
        assert torch.equal(new.attention.key.weight, old.attention.key.weight)
        assert torch.equal(new.attention.query.bias, old.attention.query.linear.bias)
    assert torch.equal(plain.tokens.weight, before.tokens.weight)


def test_a_base_in_bfloat16_is_merged_in_float32():
    """An update of 1e-4 on weights near 1 lies below bfloat16's 2^-8: merged there it would be lost."""
    model = attach(LoRA(rank=1, alpha=1.0, targets="key"), Transformer(GPT))
    lora = model.blocks[0].attention.key
    with torch.no_grad():
        lora.linear.weight.fill_(1.0)
        lora.A.fill_(0.01)
        lora.B.fill_(0.01)
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    weight = merge(model).blocks[0].attention.key.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, torch.full((12, 12), 1.0001), rtol=0, atol=1e-7)


# ---- settings ----

def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="targets: 'head' is none of query, key"):
        LoRA(targets="query,head")
    with pytest.raises(ValueError, match="rank=0"):
        LoRA(rank=0)


# ---- counts ----

def gpt2(d, L, H):
    return Config(50257, 1024, d, L, H, 4 * d)


def roberta(d, L, H):
    return Config(50265, 514, d, L, H, 4 * d, n_types=1, causal=False, norm_first=False, lm_head="none", pooler=True)


GPT3 = Config(50257, 2048, 12288, 96, 96, 4 * 12288)
DEBERTA_XXL = Config(128100, 512, 1536, 48, 24, 6144, causal=False, norm_first=False, lm_head="none")


@pytest.mark.parametrize("config, rank, targets, expected, printed", [
    (roberta(768, 12, 12), 8, "query,value", 294_912, "0.3"),
    (roberta(1024, 24, 16), 8, "query,value", 786_432, "0.8"),
    (DEBERTA_XXL, 16, "query,value", 4_718_592, "4.7"),         # the paper's table says r = 8, its scripts 16
    (GPT3, 1, "query,value", 4_718_592, "4.7"),
    (GPT3, 2, "value", 4_718_592, "4.7"),
    (GPT3, 2, "query,value", 9_437_184, "9.4"),
    (GPT3, 1, "query,key,value,out", 9_437_184, "9.4"),
    (GPT3, 4, "query,value", 18_874_368, "18.8"),               # cut, not rounded, as the next but one
    (GPT3, 8, "query,value", 37_748_736, "37.7"),
    (GPT3, 64, "query,value", 301_989_888, "301.9"),
])
def test_counts_of_the_lora_paper(config, rank, targets, expected, printed):
    """Tables 2, 4 and 15, in millions."""
    assert LoRA(rank=rank, targets=targets).formula(config) == expected
    assert abs(expected / 1e6 - float(printed)) < 0.1


@pytest.mark.parametrize("config, expected", [(roberta(768, 12, 12), 294_912), (GPT3, 37_748_736)])
def test_the_formula_counts_what_a_model_of_that_size_has(config, expected):
    with torch.device("meta"):
        model = attach(LoRA(rank=8), Transformer(config))
    assert count(model).delta == expected


def test_counts_of_places_by_hand():
    """r (d_in + d_out): 24 r for each projection of width 12, 32 r for the two of the mlp, in two layers."""
    assert LoRA(rank=3).formula(GPT) == 2 * 3 * (24 + 24) == 288
    for targets, size in (("out", 24), ("up", 32), ("down", 32), (ALL, 4 * 24 + 2 * 32)):
        delta = LoRA(rank=3, targets=targets)
        assert count(attach(delta, Transformer(GPT))).delta == delta.formula(GPT) == 2 * 3 * size


def test_two_printed_counts_follow_from_no_rank():
    """GPT-2 medium 0.35M and large 0.77M in table 3: rank 4 gives 0.39M and 0.74M; 0.1 % of D gives the print."""
    medium, large = gpt2(1024, 24, 16), gpt2(1280, 36, 20)
    assert (LoRA(rank=4).formula(medium), LoRA(rank=4).formula(large)) == (393_216, 737_280)
    for config, printed in ((medium, 0.35), (large, 0.77)):
        assert printed not in {round(LoRA(rank=r).formula(config) / 1e6, 2) for r in range(1, 65)}
    assert LoRA(rank=8).formula(gpt2(768, 12, 12)) == 294_912


def test_a_projection_named_twice_is_refused():
    with pytest.raises(ValueError, match="query,query.*twice"):
        LoRA(targets="query,query")
