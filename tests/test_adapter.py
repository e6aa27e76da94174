"""The adapter by hand: what it computes, where it stands, how it starts, how many parameters it is."""

import math

import pytest
import torch
import torch.nn.functional as F

from deltas import attach, count, merge, trainable
from lab.sizes import counted
from methods.adapter import Adapter, Bottleneck
from model import Config, Transformer
from tiny import GPT, both, same, stirred


@pytest.mark.points(3, "adapter")
def test_an_adapter_by_hand():
    """Width 2, bottleneck 1: down (3, -1) makes 3 - 2 + 1 = 2 of h = (1, 2); up adds gelu(2) (10, 100)."""
    adapter, h = Bottleneck(2, 1, init_std=0.0, device="cpu").double(), torch.tensor([1.0, 2.0]).double()
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[3.0, -1.0]]))
        adapter.down.bias.fill_(1.0)
        assert adapter.down(h).tolist() == [2], "down, with its bias"
        same(adapter(h), h, "the skip: an up-projection of zero adds nothing")
        adapter.up.weight.copy_(torch.tensor([[10.0], [100.0]]))
        gelu = 2 * 0.5 * (1 + math.erf(2 / math.sqrt(2)))           # 1.9545, 2 times P(z < 2)
        added = torch.tensor([10 * gelu, 100 * gelu], dtype=torch.float64)
        same(adapter(h) - h, added, "up of the exact gelu of down")
        adapter.up.bias.copy_(torch.tensor([0.5, 0.25]))
        expected = torch.tensor([1 + 10 * gelu + 0.5, 2 + 100 * gelu + 0.25], dtype=torch.float64)
        same(adapter(h), expected, "skip, up and its bias")


@both
@pytest.mark.points(3, "adapter")
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
    same(block(x), y, "one behind attention, one behind the mlp, before the residual add")


def test_every_slot_has_an_adapter_of_its_own():
    model = attach(Adapter(bottleneck=4, init_std=0.01), Transformer(GPT))
    slots = [slot for block in model.blocks for slot in (block.after_attention, block.after_mlp)]
    assert len({id(p) for slot in slots for p in slot.parameters()}) == 4 * 4, "no parameter serves two places"
    for i, one in enumerate(slots):
        assert not any(torch.equal(one.up.weight, other.up.weight) for other in slots[i + 1:]), "each is drawn anew"


# ---- what it starts as ----

@pytest.mark.points(1, "adapter")
def test_the_papers_start_is_near_the_identity_but_not_on_it():
    """Width 768, bottleneck 64: a spread of 0.01 moves a vector by about 1 %, 0.1 by more than itself."""
    torch.manual_seed(0)
    h = torch.randn(400, 768)

    def moved(std):
        return ((Bottleneck(768, 64, std, "cpu")(h) - h).norm() / h.norm()).item()

    assert moved(0.0) == 0, "0 is our start: W_up is zero"
    assert 0.5e-4 < moved(1e-3) < 2e-4, "init_std is the spread of both matrices"
    assert 0.5e-2 < moved(1e-2) < 2e-2, "the paper's start moves a vector by 1 %"
    assert moved(0.1) > 1
    assert Adapter().identity and not Adapter(init_std=0.01).identity, "only the zero start claims to be the base"


def test_the_spread_is_the_papers_and_nothing_is_beyond_two_of_it():
    """Cutting a normal at two spreads leaves 0.88 of its spread."""
    torch.manual_seed(0)
    zero, near = (Bottleneck(96, 64, std, "cpu") for std in (0.0, 0.01))
    for where, weight in (("down, ours", zero.down.weight), ("down", near.down.weight), ("up", near.up.weight)):
        assert weight.abs().max() <= 0.02, f"{where}: cut at two spreads"
        assert 0.008 < weight.std() < 0.0095, f"{where}: the paper's 0.01"


@pytest.mark.points(1, "adapter")
def test_with_both_matrices_zero_only_a_bias_would_ever_learn():
    adapter = Bottleneck(12, 4, 0.0, "cpu")
    torch.nn.init.zeros_(adapter.down.weight)
    for learns in steps(adapter, 5):
        assert learns == {"up.bias"}, "every other gradient passes through a zero"


@pytest.mark.points(1, "adapter")
def test_with_one_matrix_zero_everything_learns_from_the_second_step_on():
    first, second = steps(Bottleneck(12, 4, 0.0, "cpu"), 2)
    assert first == {"up.weight", "up.bias"}, "the gradient of down passes through up = 0"
    assert second == {"up.weight", "up.bias", "down.weight", "down.bias"}


def steps(adapter, number):
    """The names of those that have a gradient, step by step."""
    optimizer, found = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.0), []
    for _ in range(number):
        optimizer.zero_grad()
        adapter(torch.randn(7, 12)).pow(2).sum().backward()
        found.append({name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    return found


# ---- what trains with it, what it cannot do, counts ----

@both
def test_the_norms_train_with_it_if_wanted(config):
    around = "final_norm" if config.norm_first else "embedding_norm"
    norms = {f"blocks.{block}.norm{i}.{p}" for block in (0, 1) for i in (1, 2) for p in ("weight", "bias")}
    norms |= {f"{around}.weight", f"{around}.bias"}
    with_norms, without = (set(trainable(attach(Adapter(bottleneck=4, norms=wanted), Transformer(config))))
                           for wanted in (True, False))
    assert with_norms - without == norms, "two in every block and the one around the blocks"
    assert all(".after_" in name for name in without), "norms=False: the adapters alone"


def test_an_adapter_cannot_be_merged():
    with pytest.raises(ValueError, match="cannot be merged: no matrix equals a non-linear layer in series"):
        merge(attach(Adapter(), Transformer(GPT)))


def test_settings_that_make_no_sense_are_refused():
    for settings, message in (({"bottleneck": 0}, "bottleneck=0"), ({"init_std": -1.0}, "init_std=-1")):
        with pytest.raises(ValueError, match=message):
            Adapter(**settings)


def test_counts_of_the_adapter_paper():
    assert counted("bert-base-cased", Adapter(64)).delta == 2_379_264 + 38_400, "adapters, and 40k for the norms"
    head = 2 * 1024 + 2                                                     # two classes, beside the delta
    small, large = (counted("bert-large-cased", Adapter(m)).delta + head for m in (16, 256))
    assert (small, large) == (1_725_186, 25_329_666)
    assert [round(100 * n / 335_141_888, 2) for n in (small, large)] == [0.51, 7.56], "0.5 to 8 %"


def test_the_default_is_between_half_a_percent_and_eight_on_the_little_worlds_base():
    with torch.device("meta"):
        counts = count(attach(Adapter(), Transformer(Config(1024, 96, 96, 4, 4, 384))))
    assert counts.delta == 4 * 2 * (2 * 8 * 96 + 8 + 96) + 2 * 96 * 9 == 14_848, "two adapters a block, and the norms"
    assert 0.5 < counts.percent < 8, "the range of the paper's table 1"
