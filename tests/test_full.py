"""Full fine-tuning: everything moves, and D is the sum of what a model is made of."""

from dataclasses import replace

import pytest
import torch

from deltas import attach, count, trainable
from methods.full import Full, base_size, block_size
from model import Transformer
from tiny import BERT, GPT, same, stirred


@pytest.mark.points(2, "counts")
def test_one_block_by_hand():
    """d = 12, f = 20: four 12 x 12 matrices, 12 x 20 and 20 x 12, their biases, two norms of 12 + 12."""
    parts = {"four projections": 4 * 144, "two matrices of the mlp": 2 * 240, "biases": 4 * 12 + 20 + 12, "norms": 48}
    assert block_size(GPT) == sum(parts.values()) == 1184, f"{block_size(GPT)} is not the sum of {parts}"


@pytest.mark.points(3, "counts")
def test_a_whole_base_by_hand():
    """17 words and 16 positions; BERT has two types, a pooler and an MLM head more, the decoder's matrix is tied."""
    gpt = {"blocks": 2 * 1184, "words, tied": 17 * 12, "positions": 16 * 12, "the norm around the blocks": 24}
    bert = gpt | {"types": 2 * 12, "pooler": 144 + 12, "MLM head": 144 + 12 + 24 + 17}
    bare = replace(GPT, lm_head="none", tied=False)  # without a head there is no matrix that could be untied
    for config, parts in ((GPT, gpt), (BERT, bert), (bare, gpt | {"the untied matrix of no head": 0})):
        counted, size = count(attach(Full(), Transformer(config))), sum(parts.values())
        assert base_size(config) == size, f"{base_size(config)} is not {size}, the sum of {parts}"
        assert counted.base == counted.delta == size, "everything is the delta, a tied matrix counts once"


def test_one_step_moves_every_parameter_that_has_a_gradient():
    """Plain gradient descent by hand: theta = theta_0 - 0.5 gradient, for every tensor of the base."""
    model = stirred(GPT, Full())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert set(trainable(model)) == set(start), "all of it trains"
    model(torch.tensor([[3, 1, 4]])).square().sum().backward()
    torch.optim.SGD(trainable(model).values(), lr=0.5).step()
    for name, p in model.named_parameters():
        same(p, start[name] - 0.5 * p.grad, f"{name}: a step against its gradient")
    assert model.tokens.weight.grad.any(dim=1).all(), "the tied head gives even unread words a gradient"
    assert model.positions.weight.grad.any(dim=1).tolist() == [True] * 3 + [False] * 13, "three positions were read"
