"""Worked examples for the intrinsic dimension: a whole model moved by a handful of numbers."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltas import attach, count, merge, own_parameters, save, trainable
from fastfood import Dense, Fastfood
from methods.intrinsic import Intrinsic
from model import Config, Transformer, generate

GPT = Config(vocab_size=17, n_ctx=11, d_model=12, n_layer=2, n_head=3, d_ff=20)
BERT = replace(GPT, causal=False, norm_first=False, activation="gelu", n_types=2, lm_head="mlm", pooler=True)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def base(config=GPT):
    torch.manual_seed(0)
    return Transformer(config).double().eval()


def moved(config=GPT, **fields):
    """An attached model whose numbers are no longer at their start."""
    model = attach(Intrinsic(**fields), base(config))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.01 * torch.randn_like(p)
    return model


def flat(model):
    return torch.cat([p.detach().flatten() for p in own_parameters(model).values()])


def in_double(model):
    """The plain model; `merge` would round it to float32."""
    with torch.no_grad():
        return model.delta.merge(model)


@pytest.mark.parametrize("config", [GPT, BERT])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_new_subspace_changes_nothing(config, per_layer):
    model = base(config)
    before = model(IDS)
    model = attach(Intrinsic(dim=7, per_layer=per_layer), model)
    assert torch.equal(model(IDS), before)
    assert sum(p.numel() for p in trainable(model).values()) == count(model).delta == 7


@pytest.mark.parametrize("projection, kind", [("fastfood", Fastfood), ("dense", Dense)])
def test_the_model_stands_at_theta_0_plus_P_z(projection, kind):
    model = moved(dim=7, projection=projection, projection_seed=3)
    start, z = flat(base()), model.z.detach()
    D = len(start)
    P = (D / 7) ** 0.5 * torch.stack([kind(7, D, seed=3)(e) for e in torch.eye(7)], dim=1).double()
    plain = base()
    torch.nn.utils.vector_to_parameters(start + P @ z.double(), plain.parameters())
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=1e-6)  # z and its projection are float32


def test_a_step_of_the_optimiser_moves_every_weight_by_about_the_learning_rate():
    for dim in (8, 64):
        model = attach(Intrinsic(dim=dim), base())
        start = flat(model.model)
        with torch.no_grad():
            model.z += 0.01 * (2 * torch.randint(0, 2, (dim,)) - 1)  # what Adam's first step does: ±lr
        step = torch.cat([p.flatten() for p in model.theta().values()]) - start
        assert 0.008 < step.square().mean().sqrt() < 0.012


def test_the_gradient_of_z_is_the_projected_gradient_of_all_weights():
    model, plain = attach(Intrinsic(dim=7), base()), base()
    model(IDS).square().sum().backward()
    plain(IDS).square().sum().backward()
    g = torch.cat([p.grad.flatten() for p in plain.parameters()])
    P = torch.stack([model.gain * model.project(e) for e in torch.eye(7, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(model.z.grad.double(), P.T @ g, rtol=1e-5, atol=1e-5)


def test_tensors_smaller_than_d_are_moved_like_all_others():
    model = moved(dim=200)                                        # a norm has 12 weights
    for name, p in own_parameters(model.model).items():
        assert (model.theta()[name] != p).all(), name


@pytest.mark.parametrize("config", [GPT, BERT])
def test_a_tied_embedding_moves_once_and_its_head_moves_with_it(config):
    model = moved(config, dim=7)
    assert len(flat(model.model)) == sum(p.numel() for p in base(config).parameters())
    assert "tokens.weight" in model.theta() and "head.decoder.weight" not in model.theta()
    tokens = model.theta()["tokens.weight"]
    plain = base(config)
    for name, p in plain.named_parameters():
        p.data = model.theta()[name].detach()
    assert plain.head.decoder.weight is plain.tokens.weight and torch.equal(plain.tokens.weight, tokens)
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=1e-12)
    merged = merge(model)
    assert merged.head.decoder.weight is merged.tokens.weight


def test_the_wrapper_knows_eval_and_train():
    model = attach(Intrinsic(dim=7), base())
    assert not model.eval().model.blocks[0].training
    assert model.train().model.blocks[0].training
    assert model.config is model.model.config and model.head is model.model.head


def test_pads_positions_and_generation_pass_through_the_wrapper():
    model = moved(dim=7)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    at = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]).bool()
    plain = in_double(copy.deepcopy(model))
    torch.testing.assert_close(model(IDS, keep, at=at), plain(IDS, keep)[at], rtol=0, atol=1e-8)
    assert torch.equal(generate(model, IDS, keep, steps=4), generate(plain, IDS, keep, steps=4))


@pytest.mark.parametrize("per_layer", [False, True])
def test_two_steps_move_every_number_and_no_weight(per_layer):
    model = attach(Intrinsic(dim=9, per_layer=per_layer), base())
    model(IDS)                                                    # an evaluation before them must do no harm
    frozen = flat(model.model)
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    assert all((p != start[name]).all() for name, p in trainable(model).items())
    assert torch.equal(flat(model.model), frozen)


def test_a_classifier_trains_beside_the_subspace_and_is_counted_apart():
    model = base(BERT)
    model.classify(4)
    model = attach(Intrinsic(dim=7), model)
    assert (count(model).delta, count(model).head) == (7, 12 * 4 + 4)
    model(IDS, at=torch.eye(2, 5).bool()).square().sum().backward()
    assert model.head.out.weight.grad.abs().sum() > 0 and model.z.grad.abs().sum() > 0
    assert not any(name.startswith("head") for name in model.theta())


# ---- SAID ----

def test_the_scales_come_out_of_the_budget():
    model = attach(Intrinsic(dim=10, per_layer=True), base())
    assert (len(model.scales), len(model.z)) == (4, 6)            # 2 blocks, the embeddings, the rest
    assert Intrinsic(dim=10, per_layer=True).formula(GPT) == count(model).delta == 10


def test_the_first_step_gives_a_scale_no_gradient_and_the_second_does():
    model = attach(Intrinsic(dim=10, per_layer=True), base())
    model(IDS).square().sum().backward()
    assert (model.scales.grad == 0).all() and (model.z.grad != 0).all()  # d theta / d s = P z = 0
    with torch.no_grad():
        model.z -= 1e-2 * model.z.grad.sign()
    model.zero_grad()
    model(IDS).square().sum().backward()
    assert (model.scales.grad != 0).all()


@pytest.mark.parametrize("config", [GPT, BERT])
def test_a_scale_scales_its_own_layer_and_no_other(config):
    for i in range(4):
        model = moved(config, dim=10, per_layer=True)
        m = model.model
        chosen = [[m.blocks[0]], [m.blocks[1]], [m.tokens, m.positions, m.types, m.embedding_norm],
                  [m.final_norm, m.pooler, m.head]][i]
        own = {id(p) for module in chosen if module is not None for p in module.parameters()}
        if i == 3:
            own.remove(id(m.tokens.weight))                       # the tied head is the embedding
        with torch.no_grad():
            model.scales[i] = 0.0
        for name, p in own_parameters(model.model).items():
            assert torch.equal(model.theta()[name], p) == (id(p) in own), (i, name)


# ---- what a budget can do ----

def test_as_many_numbers_as_weights_can_represent_any_update():
    config = Config(vocab_size=5, n_ctx=3, d_model=4, n_layer=1, n_head=2, d_ff=3)
    torch.manual_seed(0)
    model = Transformer(config)
    D = sum(p.numel() for p in model.parameters())
    wanted = flat(model) + 0.1 * torch.randn(D)
    for projection in ("dense", "fastfood"):
        model = attach(Intrinsic(dim=D, projection=projection), Transformer(config)).double()
        P = torch.stack([model.gain * model.project(e) for e in torch.eye(D, dtype=torch.float64)], dim=1)
        model.z.data = torch.linalg.solve(P, wanted - flat(model.model))
        torch.testing.assert_close(flat(in_double(model)), wanted.double(), rtol=0, atol=1e-8)


# ---- merging and saving ----

@pytest.mark.parametrize("per_layer", [False, True])
def test_merging_gives_the_plain_model_back_once(per_layer):
    wrapped = moved(dim=9, per_layer=per_layer).float()
    expected, theta = wrapped(IDS), {name: w.detach().clone() for name, w in wrapped.theta().items()}
    plain = merge(wrapped)
    assert type(plain) is Transformer and not trainable(plain)
    assert all(torch.equal(p, theta[name]) for name, p in plain.named_parameters())
    torch.testing.assert_close(plain(IDS), expected, rtol=0, atol=1e-6)
    merge(wrapped)                                                # the old wrapper has nothing left to add
    assert all(torch.equal(p, theta[name]) for name, p in plain.named_parameters())
    with pytest.raises(ValueError, match="merged already"):
        merge(plain)


READER = """
import sys, torch
sys.path.insert(0, ".")
from deltas import load
from tests.test_intrinsic import base
model = load(sys.argv[1], base().float())
torch.save({name: w.detach() for name, w in model.theta().items()}, sys.argv[2])
"""


@pytest.mark.parametrize("per_layer, projection", [(True, "fastfood"), (False, "dense")])
def test_the_file_holds_d_numbers_and_gives_the_same_bits_in_another_process(tmp_path, per_layer, projection):
    model = attach(Intrinsic(9, projection, per_layer, projection_seed=5), base().float())
    with torch.no_grad():
        model.z += torch.randn(len(model.z))
    save(tmp_path / "delta.pt", model)
    tensors = torch.load(tmp_path / "delta.pt", weights_only=True)["tensors"]
    assert sum(t.numel() for t in tensors.values()) == 9
    subprocess.run([sys.executable, "-c", READER, tmp_path / "delta.pt", tmp_path / "theta.pt"],
                   check=True, cwd=Path(__file__).parents[1])
    theta = torch.load(tmp_path / "theta.pt", weights_only=True)
    assert theta.keys() == model.theta().keys()
    assert all(torch.equal(theta[name], w) for name, w in model.theta().items())


def test_a_device_without_numbers_is_enough_for_counting():
    with torch.device("meta"):
        model = Transformer(GPT)
    assert count(attach(Intrinsic(dim=9, per_layer=True), model)).delta == 9


# ---- errors ----

@pytest.mark.parametrize("fields, message", [
    ({"projection": "sparse"}, "projection='sparse': choose from fastfood, dense"),
    ({"dim": 0}, "dim=0"),
    ({"dim": 4, "per_layer": True}, "dim=4: .* 4 scales .* choose 5 to "),
    ({"dim": 10**6}, "dim=1000000: this model has 2[0-9]{3} weights"),
])
def test_a_budget_that_cannot_be_is_an_error_that_says_what_can(fields, message):
    with pytest.raises(ValueError, match=message):
        attach(Intrinsic(**fields), base())
