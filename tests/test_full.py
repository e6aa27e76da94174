"""Full fine-tuning: everything moves, and D is the sum of what a model is made of."""

import pytest
import torch

from deltas import attach, count, trainable
from methods.full import Full, base_size, block_size
from model import Transformer
from tiny import BERT, GPT, same, stirred


@pytest.mark.points(2, "counts")
def test_one_block_by_hand():
    """d = 12, f = 20: four 12 x 12 matrices, 12 x 20 and 20 x 12, their biases, two norms of 12 + 12."""
    assert block_size(GPT) == 4 * 144 + 2 * 240 + (4 * 12 + 20 + 12) + 4 * 12 == 1184


@pytest.mark.points(3, "counts")
def test_a_whole_base_by_hand():
    """17 words and 16 positions; BERT has two types, a pooler and an MLM head more, the decoder's matrix is tied."""
    gpt, bert = 2 * 1184 + (17 + 16) * 12 + 24, 2 * 1184 + (17 + 16 + 2) * 12 + 24 + (144 + 12) + (144 + 12 + 24 + 17)
    for config, size in ((GPT, gpt), (BERT, bert)):
        counted = count(attach(Full(), Transformer(config)))
        assert base_size(config) == size, "the formula"
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
