"""BitFit: which parameters are biases, why one of them is dead, and the counts of the paper."""

import pytest
import torch

from deltas import attach, count, trainable
from harness import checks
from lab.sizes import counted
from methods.bitfit import BitFit
from methods.lora import LoRA
from methods.prefix import KeysValues
from model import Config, Transformer
from tiny import BERT, GPT, IDS, both, same, stirred

IN_A_BLOCK = ["attention.query", "attention.key", "attention.value", "attention.out", "norm1", "mlp.up", "mlp.down",
              "norm2"]


@pytest.mark.parametrize("config, outside", [
    (GPT, ["final_norm"]),
    (BERT, ["embedding_norm", "pooler.dense", "head.dense", "head.norm", "head.decoder"]),
], ids=["gpt", "bert"])
@pytest.mark.points(3, "bitfit")
def test_all_biases_train_and_no_weight_does(config, outside):
    """Eight in a block, two of them of norms. The gains of the norms are weights."""
    model = attach(BitFit(), Transformer(config))
    owners = [f"blocks.{i}.{place}" for i in range(2) for place in IN_A_BLOCK] + outside
    assert set(trainable(model)) == {f"{owner}.bias" for owner in owners}, "every bias, those of norms too"
    assert count(model).delta == BitFit().formula(config), "the count: eight in a block, and those outside"


@pytest.mark.points(2, "bitfit")
def test_the_smaller_choice_is_the_query_and_the_first_mlp_bias():
    model = attach(BitFit(only="query_up"), Transformer(BERT))
    assert set(trainable(model)) == {f"blocks.{i}.{place}.bias" for i in range(2)
                                     for place in ("attention.query", "mlp.up")}, "query and up"
    assert count(model).delta == BitFit(only="query_up").formula(BERT) == 2 * (12 + 20), "the count: d + f a block"
    with pytest.raises(ValueError, match="only='weights': choose all or query_up"):
        BitFit(only="weights")


@pytest.mark.points(1, "bitfit")
def test_the_classifiers_bias_is_not_counted_as_delta():
    model = Transformer(BERT)
    model.classify(4)
    model = attach(BitFit(), model)
    assert count(model).delta == 2 * (7 * 12 + 20) + 12 + 12, "blocks, embedding norm, pooler"
    assert count(model).head == 4 * 12 + 4, "the Classifier, weights and bias"


@pytest.mark.points(1, "bitfit")
def test_a_bias_shifts_the_output_by_as_much():
    """W x + b with W = [[1, 2], [3, 4]], x = (1, 1), b = (10, 20) -> (13, 27); b moved by 0.5 -> (13.5, 27.5)."""
    model = Transformer(Config(5, 4, 2, 1, 1, 2))
    out = model.blocks[0].attention.out
    with torch.no_grad():
        out.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        out.bias.copy_(torch.tensor([10.0, 20.0]))
        model = attach(BitFit(), model)
        assert out(torch.ones(2)).tolist() == [13, 27], "W x + b: training starts from the base's own biases"
        trainable(model)["blocks.0.attention.out.bias"].add_(0.5)
        assert out(torch.ones(2)).tolist() == [13.5, 27.5], "b is the trained parameter"


@both
@pytest.mark.points(1, "bitfit")
def test_the_keys_bias_is_dead(config):
    """It adds the same q.b to every score of a query, and softmax does not see that."""
    model = stirred(config, BitFit())
    before = model(IDS)
    before.square().sum().backward()
    for block in model.blocks:
        assert block.attention.key.bias.grad.abs().max() < 1e-10, "the key's bias has no gradient"
        assert block.attention.query.bias.grad.abs().max() > 1e-3, "the query's has"
    with torch.no_grad():
        for block in model.blocks:
            block.attention.key.bias += 7
    same(model(IDS), before, "the key's bias moves nothing")


def test_only_a_trained_key_bias_counts_as_one_that_noise_alone_moves():
    deltas = BitFit(), BitFit(only="query_up"), LoRA()
    assert [len(checks.key_biases(attach(delta, Transformer(GPT)))) for delta in deltas] == [2, 0, 0]


def test_a_prefix_brings_the_keys_bias_to_life():
    """A prefix's keys have no bias added: the scores of a row are no longer shifted alike."""
    model = stirred(GPT, BitFit())
    model.blocks[1].attention.prefix = KeysValues(torch.randn(3, 24).double())
    model(IDS).square().sum().backward()
    dead, alive = (block.attention.key.bias.grad.abs().max() for block in model.blocks)
    assert dead < 1e-10, "without a prefix"
    assert alive > 1e-3, "with one"


@pytest.mark.points(1, "bitfit")
def test_counts_of_the_bitfit_paper():
    """0.09 % and 0.08 % of BERT-base and -large; 0.04 % with two biases a block. (Printed cut, not rounded.)"""
    base, large = (counted(f"bert-{size}-cased", BitFit()) for size in ("base", "large"))
    assert (base.delta, large.delta) == (102_912, 272_384), "11 L d, and 2 d around them"
    assert (round(base.percent, 4), round(large.percent, 4)) == (0.0950, 0.0817)
    base, large = (counted(f"bert-{size}-cased", BitFit(only="query_up")) for size in ("base", "large"))
    assert (base.delta, large.delta) == (46_080, 122_880), "L (d + f)"
    assert (round(base.percent, 2), round(large.percent, 2)) == (0.04, 0.04)
    assert base.delta / (11 * 12 * 768) == 5 / 11, "half the biases: 45 % of those in the blocks"
