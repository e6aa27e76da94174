"""Worked examples for the intrinsic dimension: a whole model moved by a handful of parameters."""

import copy

import pytest
import torch

from deltas import attach, count, merge, own_parameters, save, trainable
from fastfood import Dense, Fastfood
from methods.intrinsic import Intrinsic
from model import Config, Transformer, generate
from tiny import GPT, IDS, both, same, stirred


def base(config=GPT):
    return stirred(config)


def moved(config=GPT, **fields):
    """A base in float64 with a subspace whose parameters are no longer at their start."""
    model = attach(Intrinsic(**fields), base(config)).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.01 * torch.randn_like(p)
    return model


def flat(model):
    return torch.cat([p.detach().flatten() for p in own_parameters(model).values()])


def columns(model):
    """P (D, d), with its gain."""
    unit = torch.eye(len(model.z), dtype=torch.float64)
    return torch.stack([model.project(e) for e in unit], dim=1)


# ---- theta_0 + P z ----

@pytest.mark.parametrize("projection, kind", [("fastfood", Fastfood), ("dense", Dense)])
@pytest.mark.points(3, "intrinsic")
def test_the_model_stands_at_theta_0_plus_P_z(projection, kind):
    """P has unit rows here: the unit columns of fastfood.py times √(D / d)."""
    model, plain = moved(dim=7, projection=projection, projection_seed=3), base()
    D = len(flat(plain))
    P = (D / 7) ** 0.5 * torch.stack([kind(7, D, seed=3)(e) for e in torch.eye(7).double()], dim=1)
    same(columns(model), P, "unit rows, from projection_seed: a weight moves by about the learning rate")
    torch.nn.utils.vector_to_parameters(flat(plain) + P @ model.z.detach(), plain.parameters())
    same(model(IDS), plain(IDS), "theta_0 + P z")


@pytest.mark.points(1, "intrinsic")
def test_a_step_of_the_optimiser_moves_every_weight_by_about_the_learning_rate():
    for dim in (8, 64):
        model = attach(Intrinsic(dim=dim), base())
        start = flat(model.model)
        assert not model.z.any(), "z starts at zero"
        with torch.no_grad():
            model.z += 0.01 * (2 * torch.randint(0, 2, (dim,)) - 1)  # what Adam's first step does: ±lr
        step = torch.cat([p.flatten() for p in model.theta().values()]) - start
        assert 0.008 < step.square().mean().sqrt() < 0.012, f"d={dim}: rows of unit norm"


@pytest.mark.points(1, "intrinsic")
def test_the_gradient_of_z_is_the_projected_gradient_of_all_weights():
    model, plain = attach(Intrinsic(dim=7), base()).double(), base()
    for one in (model, plain):
        one(IDS).square().sum().backward()
    g = torch.cat([p.grad.flatten() for p in plain.parameters()])
    same(model.z.grad, columns(model).T @ g, "Pᵀ g")


@pytest.mark.points(1, "intrinsic")
def test_tensors_smaller_than_d_are_moved_like_all_others():
    model = moved(dim=200)                                        # a norm has 12 weights
    for name, p in own_parameters(model.model).items():
        assert (model.theta()[name] != p).all(), f"{name}: all of its weights"


@both
@pytest.mark.points(1, "intrinsic")
def test_a_tied_embedding_moves_once_and_its_head_moves_with_it(config):
    model, plain = moved(config, dim=7), base(config)
    assert len(flat(model.model)) == sum(p.numel() for p in plain.parameters()), "D counts a tied weight once"
    assert "tokens.weight" in model.theta() and "head.decoder.weight" not in model.theta(), "it stands in theta once"
    for name, p in plain.named_parameters():
        p.data = model.theta()[name].detach()
    assert plain.head.decoder.weight is plain.tokens.weight
    same(model(IDS), plain(IDS), "the head uses the moved embedding", atol=1e-12)
    merged = merge(model)
    assert merged.head.decoder.weight is merged.tokens.weight, "merged, it is still tied"


@pytest.mark.points(1, "intrinsic")
def test_positions_at_and_generation_pass_through_the_wrapper():
    model = moved(dim=7)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    at = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]).bool()
    plain = merge(copy.deepcopy(model))
    same(flat(plain), torch.cat([p.flatten() for p in model.theta().values()]), "merged, its weights are theta")
    same(model(IDS, keep, at=at), plain(IDS, keep)[at], "ids, keep and at are handed on")
    words = generate(model, IDS, keep, steps=4)
    assert torch.equal(words, generate(plain, IDS, keep, steps=4)), "so are keep and the cache"
    assert model.config is model.model.config and model.head is model.model.head, "it looks like the model"
    assert not model.eval().model.training and model.train().model.training, "eval and train reach the model"


# ---- SAID: a scale for each layer ----

def test_the_scales_come_out_of_the_budget():
    model = attach(Intrinsic(dim=10, per_layer=True), base())
    assert (len(model.scales), len(model.z)) == (4, 6), "2 blocks, the embeddings, the rest; and 6 for z"
    assert (model.scales == 1).all() and not model.z.any(), "scales start at one, z at zero"
    assert Intrinsic(dim=10, per_layer=True).formula(GPT) == count(model).delta == 10, "d in all"


@pytest.mark.points(1, "intrinsic")
def test_the_first_step_gives_a_scale_no_gradient_and_the_second_does():
    model = attach(Intrinsic(dim=10, per_layer=True), base())
    model(IDS).square().sum().backward()
    assert (model.scales.grad == 0).all() and (model.z.grad != 0).all(), "P z = 0 at the start, and scales start at one"
    with torch.no_grad():
        model.z -= 1e-2 * model.z.grad.sign()
    model.zero_grad()
    model(IDS).square().sum().backward()
    assert (model.scales.grad != 0).all(), "P z is no longer zero, and every scale has its layer"


@both
@pytest.mark.points(2, "intrinsic")
def test_a_scale_scales_its_own_layer_and_no_other(config):
    model = moved(config, dim=10, per_layer=True)
    m, scales = model.model, model.scales.detach().clone()
    embeddings, rest = [m.tokens, m.positions, m.types, m.embedding_norm], [m.final_norm, m.pooler, m.head]
    for i, modules in enumerate(([m.blocks[0]], [m.blocks[1]], embeddings, rest)):
        own = {id(p) for module in modules if module is not None for p in module.parameters()}
        if i == 3:
            own.remove(id(m.tokens.weight))                       # the tied head is the embedding
        with torch.no_grad():
            model.scales.copy_(scales)[i] = 0.0
        theta = model.theta()
        for name, p in own_parameters(m).items():
            assert torch.equal(theta[name], p) == (id(p) in own), f"scale {i} of 4 at {name}"


# ---- what a budget can do ----

@pytest.mark.points(1, "intrinsic")
def test_as_many_parameters_as_weights_can_represent_any_update():
    config = Config(vocab_size=5, n_ctx=3, d_model=4, n_layer=1, n_head=2, d_ff=3)
    for projection in ("dense", "fastfood"):
        plain = stirred(config)
        D = len(flat(plain))
        wanted = flat(plain) + 0.1 * torch.randn(D).double()
        model = attach(Intrinsic(dim=D, projection=projection), plain).double()
        model.z.data = torch.linalg.solve(columns(model), wanted - flat(plain))
        same(flat(merge(model)), wanted, f"{projection}: d = D reaches every update")


# ---- merging and saving ----

@pytest.mark.parametrize("per_layer", [False, True], ids=["DID", "SAID"])
@pytest.mark.points(1, "intrinsic")
def test_merging_gives_the_plain_model_back_and_leaves_nothing_in_the_wrapper(per_layer):
    wrapped = moved(dim=9, per_layer=per_layer)
    theta = {name: w.detach().clone() for name, w in wrapped.theta().items()}
    plain = merge(wrapped)
    assert type(plain) is Transformer and not trainable(plain), "the plain model, all frozen"
    for name, p in plain.named_parameters():
        assert torch.equal(p, theta[name]), f"{name}: theta is written over theta_0"
    for name, p in wrapped.theta().items():
        assert torch.equal(p, theta[name]), f"{name}: the old wrapper has nothing left to add"


def test_the_file_holds_d_parameters(tmp_path):
    """P is its seed. That another process draws the same one is a law, see test_laws.py."""
    save(tmp_path / "delta.pt", attach(Intrinsic(9, "fastfood", True, projection_seed=5), base()))
    content = torch.load(tmp_path / "delta.pt", weights_only=True)
    assert {name: len(t) for name, t in content["tensors"].items()} == {"z": 5, "scales": 4}
    assert content["settings"]["projection_seed"] == 5, "the seed of P"


# ---- errors ----

def test_a_budget_that_cannot_be_is_an_error_that_says_what_can():
    for fields, message in (({"projection": "sparse"}, "projection='sparse': choose fastfood or dense"),
                            ({"dim": 0}, "dim=0"),
                            ({"dim": 4, "per_layer": True}, "dim=4: .* 4 scales .* choose 5 to "),
                            ({"dim": 10**6}, "dim=1000000: this model has 2788 weights")):
        with pytest.raises(ValueError, match=message):
            attach(Intrinsic(**fields), base())
