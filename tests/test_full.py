"""Full fine-tuning: everything moves, and D is the papers' size of each base."""

import pytest
import torch

from deltas import attach, count, merge, trainable
from methods.full import Full, base_size, block_size
from model import Config, Transformer

GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20)


def gpt2(d, L, H, **other):
    return Config(50257, 1024, d, L, H, 4 * d, **other)


def bert(d, L, H, V, n_ctx=512, n_types=2):
    return Config(V, n_ctx, d, L, H, 4 * d, causal=False, norm_first=False, activation="gelu", eps=1e-12,
                  n_types=n_types, lm_head="none", pooler=True)


GPT3 = Config(50257, 2048, 12288, 96, 96, 4 * 12288)

SIZES = {
    "gpt2": (gpt2(768, 12, 12), 124_439_808),
    "gpt2-medium": (gpt2(1024, 24, 16), 354_823_168),           # printed 354.92M in the LoRA paper: a slip
    "gpt2-large": (gpt2(1280, 36, 20), 774_030_080),            # printed 774.03M
    "gpt2-xl": (gpt2(1600, 48, 25), 1_557_611_200),
    "bert-base-cased": (bert(768, 12, 12, 28996), 108_310_272),
    "bert-base-uncased": (bert(768, 12, 12, 30522), 109_482_240),
    "bert-large-cased": (bert(1024, 24, 16, 28996), 333_579_264),
    "bert-large-uncased": (bert(1024, 24, 16, 30522), 335_141_888),
    "roberta-base": (bert(768, 12, 12, 50265, 514, 1), 124_645_632),
    "roberta-large": (bert(1024, 24, 16, 50265, 514, 1), 355_359_744),
    "gpt3": (GPT3, 174_604_259_328),
    "gpt3-untied": (Config(**{**vars(GPT3), "tied": False}), 175_221_817_344),
}


@pytest.mark.parametrize("config, size", SIZES.values(), ids=SIZES)
def test_the_size_of_every_base_in_the_papers(config, size):
    with torch.device("meta"):
        model = attach(Full(), Transformer(config))
    assert count(model).delta == count(model).base == size == base_size(config)


def test_one_block_by_hand():
    """d = 12, f = 20: four 12 x 12 matrices, 12 x 20 and 20 x 12, their biases, two norms of 12 + 12."""
    assert block_size(GPT) == 4 * 144 + 2 * 240 + (4 * 12 + 20 + 12) + 4 * 12 == 1184
    assert block_size(gpt2(768, 12, 12)) == 12 * 768 ** 2 + 13 * 768                   # f = 4 d


def test_one_step_moves_every_number_that_has_a_gradient():
    """Plain gradient descent by hand: theta = theta_0 - 0.5 gradient, for every tensor of the base."""
    torch.manual_seed(0)
    model = attach(Full(), Transformer(GPT)).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert set(trainable(model)) == set(start)
    model(torch.tensor([[3, 1, 4]])).square().sum().backward()
    torch.optim.SGD(trainable(model).values(), lr=0.5).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, start[name] - 0.5 * p.grad, rtol=0, atol=1e-12)
    seen = model.tokens.weight.grad.any(dim=1)
    assert seen.all()                                  # the tied head gives even unread words a gradient
    assert model.positions.weight.grad.any(dim=1).tolist() == [True] * 3 + [False] * 13


def test_merging_it_is_only_freezing_it():
    model = attach(Full(), Transformer(GPT))
    weights = model.tokens.weight.clone()
    plain = merge(model)
    assert plain is model and torch.equal(plain.tokens.weight, weights) and not trainable(plain)
