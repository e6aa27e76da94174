"""LoRA by hand: the product, its scale, its places, merging, and the counts of the paper."""

import copy

import pytest
import torch

from deltas import attach, count, merge, trainable
from lab.sizes import counted, size
from methods.lora import LoRA, LoRALinear
from model import Config, Transformer
from tiny import GPT, IDS, both, same, stirred

ALL = "query,key,value,out,up,down"
PLACES = (("attention", "query"), ("attention", "key"), ("attention", "value"), ("attention", "out"),
          ("mlp", "up"), ("mlp", "down"))


@pytest.mark.points(3, "lora")
def test_lora_by_hand():
    """Three in, two out, rank 1, alpha 4. W x = (6, 15) for x = (1, 1, 1); A x = 1 - 1 + 2 = 2; scale 4 / 1;
    so B A x = (20, 40) times 4 = (80, 160) and all of it (86, 175), with the bias (87, 177).
    """
    linear = torch.nn.Linear(3, 2)
    lora, x = LoRALinear(linear, rank=1, alpha=4.0), torch.ones(3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        linear.bias.copy_(torch.tensor([1.0, 2.0]))
        assert lora(x).tolist() == [7, 17], "B is zero: the frozen path alone, W x + bias"
        lora.A.copy_(torch.tensor([[1.0, -1.0, 2.0]]))
        lora.B.copy_(torch.tensor([[10.0], [20.0]]))
        assert (lora(x) - linear(x)).tolist() == [80, 160], "the update: alpha / r times B A x"
        assert lora(x).tolist() == [87, 177], "the frozen path and the update, added"
    lora(x.requires_grad_()).sum().backward()
    assert x.grad.tolist() == [41 + 84, -38 - 75, 83 + 166], "the gradient of x goes through both"
    with torch.no_grad():
        merged = lora.merged()
    assert merged is linear, "merged is the base's own Linear"
    assert merged.weight.tolist() == [[41, -38, 83], [84, -75, 166]], "the scale in merge, and W + scale B A"
    assert merged(x).tolist() == [87, 177], "merged computes the same"


@pytest.mark.points(1, "lora")
def test_the_update_is_scaled_by_alpha_over_the_rank():
    for rank, alpha, scale in ((2, 6.0, 3.0), (8, 16.0, 2.0), (4, 1.0, 0.25)):
        assert LoRALinear(torch.nn.Linear(12, 20), rank, alpha).scale == scale, f"{alpha} / {rank}"
    assert (LoRA().rank, LoRA().alpha, LoRA().targets) == (8, 16.0, "query,value"), "rank 8, alpha 16, query and value"


@both
@pytest.mark.points(3, "lora")
def test_lora_is_the_dense_update_of_each_chosen_weight(config):
    """The oracle adds (alpha / r) B A to the plain model's weights, entry by entry."""
    model = stirred(config, LoRA(rank=2, alpha=6.0, targets=ALL))
    plain = Transformer(config).double()
    plain.load_state_dict({name.replace(".linear", ""): p for name, p in model.state_dict().items()
                           if not name.endswith((".A", ".B"))})
    for block, wrapped in zip(plain.blocks, model.blocks):
        for place, name in PLACES:
            weight, lora = getattr(getattr(block, place), name).weight, getattr(getattr(wrapped, place), name)
            assert isinstance(lora, LoRALinear), f"{name}: every block has its own update"
            shapes = tuple(lora.A.shape), tuple(lora.B.shape)
            assert shapes == ((2, weight.shape[1]), (weight.shape[0], 2)), f"{name}: A (r, d_in), B (d_out, r)"
            with torch.no_grad():
                for o in range(weight.shape[0]):
                    for i in range(weight.shape[1]):
                        weight[o, i] += 3 * (lora.B[o, 0] * lora.A[0, i] + lora.B[o, 1] * lora.A[1, i])
    same(model(IDS), plain(IDS), "W + (alpha / r) B A in all six places")


@pytest.mark.points(1, "lora")
def test_query_and_value_are_wrapped_and_the_key_is_not():
    """Counts cannot tell: 4 d r a layer would also be two other projections."""
    for targets, places in (("query,value", ("attention.query", "attention.value")), ("down", ("mlp.down",))):
        model = attach(LoRA(rank=2, targets=targets), Transformer(GPT))
        expected = {f"blocks.{i}.{place}.{matrix}" for i in range(2) for place in places for matrix in "AB"}
        assert set(trainable(model)) == expected, f"targets={targets}"
    assert LoRA().targets == "query,value", "the paper's places"


# ---- what it starts as, what it can reach ----

@pytest.mark.points(1, "lora")
def test_the_start_is_zero_times_a_spread():
    """B = 0, so that nothing changes; A not, or no gradient would ever arrive."""
    torch.manual_seed(0)
    lora = LoRALinear(torch.nn.Linear(300, 20), rank=50, alpha=1.0)
    assert not lora.B.any(), "B starts at zero"
    assert abs(lora.A.std().item() / (3 * 300) ** -0.5 - 1) < 0.05, "A has the spread of U(±1/√d_in)"
    assert abs(lora.A.mean().item()) < 0.001, "around zero"


@pytest.mark.points(1, "lora")
def test_at_the_first_step_only_b_has_a_gradient():
    model = attach(LoRA(rank=2), Transformer(GPT))
    model(IDS).square().sum().backward()
    for name, p in trainable(model).items():
        assert p.grad.any() == name.endswith(".B"), f"{name}: A's gradient passes through B = 0"


@pytest.mark.points(1, "lora")
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
        same(lora.merged().weight - before, wanted, "the merged update is the one that was wanted")


# ---- merging ----

@pytest.mark.points(2, "lora")
def test_merging_changes_the_chosen_weights_and_no_other():
    model = stirred(GPT, LoRA(rank=2))
    before = copy.deepcopy(model)
    plain = merge(model)
    for new, old in zip(plain.blocks, before.blocks):
        for name in ("query", "value"):
            lora = getattr(old.attention, name)
            update = getattr(new.attention, name).weight - lora.linear.weight
            same(update, lora.scale * lora.B @ lora.A, f"{name}: the scale in merge, and B A")
            assert torch.equal(getattr(new.attention, name).bias, lora.linear.bias), f"{name}: its bias stays"
        assert torch.equal(new.attention.key.weight, old.attention.key.weight), "the key was not chosen"
    assert torch.equal(plain.tokens.weight, before.tokens.weight), "the embedding was not chosen"


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
    same(merge(model).blocks[0].attention.key.weight, torch.full((12, 12), 1.0001), "float32 keeps it", atol=1e-7)


# ---- settings and counts ----

def test_settings_that_make_no_sense_are_refused():
    for settings, message in (({"targets": "query,head"}, "targets: 'head' is none of query, key"),
                              ({"rank": 0}, "rank=0"),
                              ({"targets": "query,query"}, "'query,query' names a projection twice")):
        with pytest.raises(ValueError, match=message):
            LoRA(**settings)


@pytest.mark.points(1, "lora")
def test_counts_of_places_by_hand():
    """r (d_in + d_out): 24 r for each projection of width 12, 32 r for the two of the mlp, in two layers."""
    for targets, in_and_out in (("query,value", 48), ("out", 24), ("up", 32), ("down", 32), (ALL, 4 * 24 + 2 * 32)):
        delta = LoRA(rank=3, targets=targets)
        assert delta.formula(GPT) == 2 * 3 * in_and_out, f"{targets}: the formula"
        assert count(attach(delta, Transformer(GPT))).delta == 2 * 3 * in_and_out, f"{targets}: what is there"


def test_counts_of_the_lora_paper():
    """Tables 2, 4 and 15, in millions; some were cut, not rounded."""
    deberta = Config(128100, 512, 1536, 48, 24, 6144, causal=False, norm_first=False, lm_head="none")
    gpt3 = size("gpt3-175b")
    for config, rank, targets, expected, printed in (
        (size("roberta-base"), 8, "query,value", 294_912, 0.3),
        (size("roberta-large"), 8, "query,value", 786_432, 0.8),
        (deberta, 16, "query,value", 4_718_592, 4.7),           # the paper's table says r = 8, its scripts 16
        (gpt3, 2, "value", 4_718_592, 4.7),
        (gpt3, 1, "query,key,value,out", 9_437_184, 9.4),
        (gpt3, 4, "query,value", 18_874_368, 18.8),
        (gpt3, 64, "query,value", 301_989_888, 301.9),
    ):
        assert LoRA(rank=rank, targets=targets).formula(config) == expected, (rank, targets)
        assert abs(expected / 1e6 - printed) < 0.1, (rank, targets)
    assert counted("roberta-base", LoRA(rank=8)).delta == 294_912, "counted on a model of that size"
