"""The adapter by hand: what it computes, where it stands, how it starts, how many numbers it is."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from deltas import attach, count, merge, trainable
from methods.adapter import Adapter, Bottleneck
from model import Config, Transformer
from tiny import BERT, GPT, IDS, stirred



def test_an_adapter_by_hand():
    """Width 2, bottleneck 1: down (3, -1) makes 3 - 2 + 1 = 2 of h = (1, 2); up adds gelu(2) (10, 100)."""
    adapter = Bottleneck(2, 1, init_std=0.0, device="cpu").double()
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[3.0, -1.0]]))
        adapter.down.bias.fill_(1.0)
        adapter.up.weight.copy_(torch.tensor([[10.0], [100.0]]))
        adapter.up.bias.copy_(torch.tensor([0.5, 0.25]))
    gelu = 2 * 0.5 * (1 + math.erf(2 / math.sqrt(2)))           # 1.9545, 2 times P(z < 2)
    expected = torch.tensor([1 + 10 * gelu + 0.5, 2 + 100 * gelu + 0.25], dtype=torch.float64)
    torch.testing.assert_close(adapter(torch.tensor([1.0, 2.0]).double()), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])
def test_an_adapter_stands_behind_each_sub_layer_and_before_the_residual_add(config):
    model = stirred(config, Adapter(bottleneck=4))
    block = model.blocks[0]
    x = torch.randn(2, 5, 12).double()

    def adapter(slot, h):
        d, u = slot.down, slot.up
        return h + F.gelu(h @ d.weight.T + d.bias) @ u.weight.T + u.bias

    if config.norm_first:
        y = x + adapter(block.after_attention, block.attention(block.norm1(x)))
        y = y + adapter(block.after_mlp, block.mlp(block.norm2(y)))
    else:
        y = block.norm1(x + adapter(block.after_attention, block.attention(x)))
        y = block.norm2(y + adapter(block.after_mlp, block.mlp(y)))
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-8)


@pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])
def test_a_new_adapter_changes_nothing(config):
    base = stirred(config)
    before = base(IDS)
    assert torch.equal(attach(Adapter(bottleneck=4), base).double()(IDS), before)


def test_the_papers_start_is_near_the_identity_but_not_on_it():
    """Width 768, bottleneck 64: a spread of 0.01 moves a vector by about 1 %, 0.1 by more than itself."""
    torch.manual_seed(0)
    h = torch.randn(400, 768)

    def moved(std):
        return ((Bottleneck(768, 64, std, "cpu")(h) - h).norm() / h.norm()).item()

    assert moved(0.0) == 0
    assert 0.5e-4 < moved(1e-3) < 2e-4
    assert 0.5e-2 < moved(1e-2) < 2e-2
    assert moved(0.1) > 1


def test_where_the_up_projection_is_zero_the_down_projection_has_the_papers_spread():
    assert 0.008 < Bottleneck(96, 64, 0.0, "cpu").down.weight.std() < 0.0095


def test_no_starting_number_is_beyond_two_spreads():
    weight = Bottleneck(96, 64, 0.01, "cpu").up.weight
    assert weight.abs().max() <= 0.02
    assert 0.008 < weight.std() < 0.0095           # cutting a normal at two spreads leaves 0.88 of its spread


def gradients(adapter):
    adapter(torch.randn(7, 12)).pow(2).sum().backward()
    return {name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_with_both_matrices_zero_only_a_bias_would_ever_learn():
    adapter = Bottleneck(12, 4, 0.0, "cpu")
    torch.nn.init.zeros_(adapter.down.weight)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        assert gradients(adapter) == {"up.bias"}
        optimizer.step()


def test_with_one_matrix_zero_everything_learns_from_the_second_step_on():
    adapter = Bottleneck(12, 4, 0.0, "cpu")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.0)
    assert gradients(adapter) == {"up.weight", "up.bias"}
    optimizer.step()
    assert gradients(adapter) == {"up.weight", "up.bias", "down.weight", "down.bias"}


def test_every_slot_has_an_adapter_of_its_own():
    model = attach(Adapter(bottleneck=4, init_std=0.01), Transformer(GPT))
    slots = [slot for block in model.blocks for slot in (block.after_attention, block.after_mlp)]
    for i, one in enumerate(slots):
        assert not any(torch.equal(one.up.weight, other.up.weight) for other in slots[i + 1:])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].after_mlp.up.bias += 1
    assert model.blocks[0].after_mlp.up.bias.abs().sum() == 0


@pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])
def test_the_norms_train_with_it_if_wanted(config):
    around = "final_norm" if config.norm_first else "embedding_norm"
    norms = {f"blocks.{l}.norm{i}.{p}" for l in (0, 1) for i in (1, 2) for p in ("weight", "bias")}
    norms |= {f"{around}.weight", f"{around}.bias"}
    with_norms = trainable(attach(Adapter(bottleneck=4, norms=True), Transformer(config)))
    without = trainable(attach(Adapter(bottleneck=4, norms=False), Transformer(config)))
    assert set(with_norms) - set(without) == norms
    assert all(".after_" in name for name in without)


def test_an_adapter_cannot_be_merged():
    with pytest.raises(ValueError, match="non-linear"):
        merge(attach(Adapter(), Transformer(GPT)))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="bottleneck=0"):
        Adapter(bottleneck=0)
    with pytest.raises(ValueError, match="init_std=-1"):
        Adapter(init_std=-1.0)


# ---- counts at real sizes; models on the meta device hold shapes and no numbers ----

GPT2, GPT2_M, GPT2_L, GPT3 = (Config(50257, n_ctx, d, L, 16, 4 * d) for n_ctx, d, L in
                              ((1024, 768, 12), (1024, 1024, 24), (1024, 1280, 36), (2048, 12288, 96)))
BERT_BASE, BERT_LARGE = (Config(28996, 512, d, L, 16, 4 * d, n_types=2, causal=False, norm_first=False,
                                lm_head="none", pooler=True) for d, L in ((768, 12), (1024, 24)))


def counted(config, **settings):
    with torch.device("meta"):
        model = Transformer(config)
    delta = Adapter(**settings)
    n = count(attach(delta, model)).delta
    assert n == delta.formula(config)
    return n


def test_counts_of_the_adapter_paper():
    assert counted(BERT_BASE, bottleneck=64) == 2_379_264 + 38_400         # adapters, and "40k" for the norms
    assert counted(GPT2, bottleneck=64, norms=False) == 2_379_264
    assert counted(BERT_LARGE, bottleneck=64, norms=False) == 6_343_680
    head = 2 * 1024 + 2                                                     # two classes, beside the delta
    small, large = (counted(BERT_LARGE, bottleneck=m) + head for m in (16, 256))
    assert (small, large) == (1_725_186, 25_329_666)
    assert [round(100 * n / 335_141_888, 2) for n in (small, large)] == [0.51, 7.56]     # "0.5 to 8 %"


def test_counts_of_gpt3_in_the_lora_paper():
    """Its table 4 and 15, AdapterH, in millions, without norms."""
    printed = {1: 7.1, 4: 21.2, 8: 40.1, 16: 77.9, 64: 304.4}
    exact = {1: 7_078_080, 4: 21_234_432, 8: 40_109_568, 16: 77_859_840, 64: 304_361_472}
    assert counted(GPT3, bottleneck=64, norms=False) == exact[64]
    for m, n in exact.items():
        assert Adapter(bottleneck=m, norms=False).formula(GPT3) == n
        assert round(n / 1e6, 1) == printed[m]


def test_counts_of_gpt2_in_the_lora_paper_are_of_a_variant_we_do_not_build():
    """Its table 3, AdapterL: one adapter a block, behind the mlp, with a trained LayerNorm of its own."""

    def adapter_l(config, m):
        d = config.d_model
        return config.n_layer * (2 * m * d + m + d + 2 * d)

    rows = [(GPT2_M, 6, 368_784, 0.37), (GPT2_M, 224, 11_089_152, 11.09),
            (GPT2_L, 8, 875_808, 0.88), (GPT2_L, 248, 23_002_848, 23.00)]
    for config, m, exact, printed in rows:
        assert adapter_l(config, m) == exact
        assert round(exact / 1e6, 2) == printed


def test_one_printed_count_follows_from_no_bottleneck():
    """AdapterH on GPT-2 medium, 11.09M in the same table: m = 112 gives 11.06M, 113 gives 11.16M."""
    for norms in (False, True):
        sizes = (Adapter(bottleneck=m, norms=norms).formula(GPT2_M) for m in range(1, 300))
        assert 11.09 not in {round(n / 1e6, 2) for n in sizes}
    assert Adapter(bottleneck=112, norms=False).formula(GPT2_M) == 11_064_576


def test_the_default_is_between_half_a_percent_and_eight_on_the_little_worlds_base():
    config = Config(1024, 96, 96, 4, 4, 384)
    with torch.device("meta"):
        model = attach(Adapter(), Transformer(config))
    assert count(model).delta == 4 * 2 * (2 * 8 * 96 + 8 + 96) + 2 * 96 * 9 == 14_848
    assert 0.5 < count(model).percent < 8


def test_only_the_zero_start_claims_to_be_the_base_model():
    assert Adapter().identity and not Adapter(init_std=0.01).identity
