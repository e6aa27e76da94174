"""BitFit: which numbers are biases, why one of them is dead, and the counts of the papers."""

import pytest
import torch

from deltas import attach, count, merge, trainable
from methods.bitfit import BitFit
from methods.prefix import KeysValues
from model import Config, Transformer

GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20)
BERT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20, n_types=2, causal=False,
              norm_first=False, activation="gelu", eps=1e-12, lm_head="mlm", pooler=True)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])

IN_A_BLOCK = ["attention.query", "attention.key", "attention.value", "attention.out", "norm1", "mlp.up", "mlp.down",
              "norm2"]


def stirred(config, delta):
    torch.manual_seed(0)
    model = attach(delta, Transformer(config)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("config, outside", [
    (GPT, ["final_norm"]),
    (BERT, ["embedding_norm", "pooler.dense", "head.dense", "head.norm", "head.decoder"]),
], ids=["gpt", "bert"])
def test_all_biases_train_and_no_weight_does(config, outside):
    """Eight in a block, two of them of norms. The gains of the norms are weights."""
    model = attach(BitFit(), Transformer(config))
    owners = [f"blocks.{i}.{place}" for i in range(2) for place in IN_A_BLOCK] + outside
    assert set(trainable(model)) == {f"{owner}.bias" for owner in owners}


def test_the_smaller_choice_is_the_query_and_the_first_mlp_bias():
    model = attach(BitFit(only="query_up"), Transformer(BERT))
    assert set(trainable(model)) == {f"blocks.{i}.{place}.bias" for i in range(2)
                                     for place in ("attention.query", "mlp.up")}
    assert count(model).delta == 2 * (12 + 20)
    with pytest.raises(ValueError, match="only='weights'"):
        BitFit(only="weights")


def test_the_classifiers_bias_is_not_counted_as_delta():
    model = Transformer(BERT)
    model.classify(4)
    model = attach(BitFit(), model)
    assert count(model).delta == 2 * (7 * 12 + 20) + 12 + 12           # blocks, embedding norm, pooler
    assert count(model).head == 4 * 12 + 4


def test_a_bias_shifts_the_output_by_as_much():
    """W x + b with W = [[1, 2], [3, 4]], x = (1, 1), b = (10, 20) -> (13, 27); b moved by 0.5 -> (13.5, 27.5)."""
    torch.manual_seed(0)
    model = attach(BitFit(), Transformer(Config(5, 4, 2, 1, 1, 2)))
    out = model.blocks[0].attention.out
    with torch.no_grad():
        out.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        out.bias.copy_(torch.tensor([10.0, 20.0]))
        assert out(torch.ones(2)).tolist() == [13, 27]
        trainable(model)["blocks.0.attention.out.bias"].add_(0.5)
        assert out(torch.ones(2)).tolist() == [13.5, 27.5]


@pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])
def test_the_keys_bias_is_dead(config):
    """It adds the same q.b to every score of a query, and softmax does not see that."""
    model = stirred(config, BitFit())
    before = model(IDS)
    before.square().sum().backward()
    for block in model.blocks:
        assert block.attention.key.bias.grad.abs().max() < 1e-11
        assert block.attention.query.bias.grad.abs().max() > 1e-3
    with torch.no_grad():
        for block in model.blocks:
            block.attention.key.bias += 7
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-8)


def test_a_prefix_brings_the_keys_bias_to_life():
    """A prefix's keys have no bias added: the scores of a row are no longer shifted alike."""
    model = stirred(GPT, BitFit())
    model.blocks[1].attention.prefix = KeysValues(torch.randn(3, 24).double())
    model(IDS).square().sum().backward()
    dead, alive = (block.attention.key.bias.grad.abs().max() for block in model.blocks)
    assert dead < 1e-11 and alive > 1e-3


def test_merging_keeps_the_biases():
    model = stirred(GPT, BitFit()).float()
    logits = model(IDS)
    assert torch.equal(merge(model)(IDS), logits)


# ---- counts ----

def counted(config, **settings):
    with torch.device("meta"):
        model = attach(BitFit(**settings), Transformer(config))
    assert count(model).delta == BitFit(**settings).formula(config)
    return count(model)


def gpt2(d, L, H):
    return Config(50257, 1024, d, L, H, 4 * d)


def bert(d, L, H):
    return Config(28996, 512, d, L, H, 4 * d, n_types=2, causal=False, norm_first=False, lm_head="none", pooler=True)


@pytest.mark.parametrize("d, L, H, expected", [
    (768, 12, 12, 102_144), (1024, 24, 16, 271_360), (1280, 36, 20, 508_160), (1600, 48, 25, 846_400)])
def test_counts_of_gpt2(d, L, H, expected):
    """11 L d + d."""
    assert counted(gpt2(d, L, H)).delta == 11 * L * d + d == expected


def test_counts_of_the_bitfit_paper():
    """0.09 % and 0.08 % of BERT-base and -large; 0.04 % with two biases a block. (Printed cut, not rounded.)"""
    base, large = counted(bert(768, 12, 12)), counted(bert(1024, 24, 16))
    assert (base.delta, large.delta) == (102_912, 272_384)
    assert (round(base.percent, 4), round(large.percent, 4)) == (0.0950, 0.0817)
    base, large = counted(bert(768, 12, 12), only="query_up"), counted(bert(1024, 24, 16), only="query_up")
    assert (base.delta, large.delta) == (46_080, 122_880)
    assert (round(base.percent, 2), round(large.percent, 2)) == (0.04, 0.04)
    assert base.delta / (11 * 12 * 768) == 5 / 11              # "half the biases": 45 % of those in the blocks


def test_gpt3s_printed_count_is_another_formula():
    """14.2M in table 4 of the LoRA paper. 11 L d + d is 13.0M; 12 L d would be 14.2M."""
    n = counted(Config(50257, 2048, 12288, 96, 96, 4 * 12288)).delta
    assert n == 12_988_416
    assert round(12 * 96 * 12288 / 1e6, 1) == 14.2
