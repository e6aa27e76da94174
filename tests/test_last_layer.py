"""The last layers: which blocks they are, and that the backward pass ends where training ends."""

import pytest
import torch

from deltas import attach, count, merge, trainable
from methods.last_layer import LastLayer
from model import Config, Transformer

GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=3, n_head=3, d_ff=20)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.mark.parametrize("k, blocks", [(1, {2}), (2, {1, 2}), (3, {0, 1, 2})])
def test_the_top_blocks_train_whole_and_nothing_else_does(k, blocks):
    """Neither the final norm nor the tied head: that one would change the input embedding too."""
    model = attach(LastLayer(k=k), Transformer(GPT))
    expected = {name for name, _ in model.named_parameters() if any(f"blocks.{i}." in name for i in blocks)}
    assert set(trainable(model)) == expected
    assert count(model).delta == k * 1184                       # see test_full.py


def test_below_the_trained_block_no_graph_is_recorded():
    model = attach(LastLayer(), Transformer(GPT))
    needed = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: needed.append(output.requires_grad))
    model(IDS).sum().backward()
    assert needed == [False, False, True]
    assert all(p.grad is None for block in model.blocks[:2] for p in block.parameters())


def test_the_gradient_of_the_top_block_is_that_of_full_fine_tuning():
    torch.manual_seed(0)
    one, all_ = Transformer(GPT).double(), Transformer(GPT).double()
    all_.load_state_dict(one.state_dict())
    one = attach(LastLayer(), one)
    for model in (one, all_):
        model(IDS).square().sum().backward()
    for p, q in zip(one.blocks[2].parameters(), all_.blocks[2].parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_only_as_many_blocks_as_there_are(k):
    with pytest.raises(ValueError, match=f"k={k}: this model has 3 blocks"):
        attach(LastLayer(k=k), Transformer(GPT))


def test_merging_keeps_the_trained_block():
    model = attach(LastLayer(), Transformer(GPT))
    with torch.no_grad():
        for p in trainable(model).values():
            p += 1
    logits = model(IDS)
    assert torch.equal(merge(model)(IDS), logits)


def test_counts_in_the_papers():
    """GPT-2 medium, top two blocks: 25.19M in table 3 of the LoRA paper. GPT-2's last block: 7.09M."""
    medium, small = Config(50257, 1024, 1024, 24, 16, 4096), Config(50257, 1024, 768, 12, 12, 3072)
    for config, k, expected in ((medium, 2, 25_192_448), (small, 1, 7_087_872)):
        with torch.device("meta"):
            model = attach(LastLayer(k=k), Transformer(config))
        assert count(model).delta == LastLayer(k=k).formula(config) == expected
    assert round(25_192_448 / 1e6, 2) == 25.19
