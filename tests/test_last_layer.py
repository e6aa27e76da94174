"""The last layers: which blocks they are, and that the backward pass ends where training ends."""

from dataclasses import replace

import pytest

from deltas import attach, count, trainable
from methods.full import Full
from methods.last_layer import LastLayer
from model import Transformer
from tiny import GPT, IDS, same, stirred

THREE = replace(GPT, n_layer=3)


@pytest.mark.points(3, "last_layer")
def test_the_top_blocks_train_whole_and_nothing_else_does():
    """Neither the final norm nor the tied head: that one would change the input embedding too."""
    for k, blocks in ((1, {2}), (2, {1, 2}), (3, {0, 1, 2})):
        model = attach(LastLayer(k=k), Transformer(THREE))
        expected = {name for name, _ in model.named_parameters() if any(f"blocks.{i}." in name for i in blocks)}
        found = set(trainable(model))
        assert not {"final_norm.weight", "final_norm.bias"} & found, "the final norm stays frozen"
        assert "tokens.weight" not in found, "the tied head stays frozen"
        assert found == expected, f"k={k}: from the top"
        assert count(model).delta == LastLayer(k=k).formula(THREE) == k * 1184, f"k={k}: as test_full.py counts"


@pytest.mark.points(2, "last_layer")
def test_below_the_trained_block_no_graph_is_recorded():
    model, needed = attach(LastLayer(), Transformer(THREE)), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: needed.append(output.requires_grad))
    model(IDS).sum().backward()
    assert needed == [False, False, True], "the graph begins at the trained block"


@pytest.mark.points(1, "last_layer")
def test_the_gradient_of_the_top_block_is_that_of_full_fine_tuning():
    last, full = stirred(THREE, LastLayer()), stirred(THREE, Full())
    for model in (last, full):
        model(IDS).square().sum().backward()
    for (name, p), q in zip(last.blocks[2].named_parameters(), full.blocks[2].parameters()):
        same(p.grad, q.grad, f"{name}: what is frozen below changes no gradient above")


@pytest.mark.points(1, "last_layer")
def test_only_as_many_blocks_as_there_are():
    for k, message in ((0, "k=0: choose 1 or more"), (4, "k=4: this model has 3 blocks, choose 1 to that many")):
        with pytest.raises(ValueError, match=message):
            attach(LastLayer(k=k), Transformer(THREE))
