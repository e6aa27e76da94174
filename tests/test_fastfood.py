"""Worked examples for the Hadamard transform and the random projections: small enough for paper.

The chain of proof: `plain` is computed by hand and is compared with a matrix that is multiplied out here; the
fast form is compared with `plain`, in values and gradients.
"""

import math

import pytest
import torch

import fastfood
from fastfood import Dense, Fastfood, butterfly, draw, hadamard, plain

FORMS = {"stacked": Fastfood, "padded": lambda d, D, seed=0: Fastfood(d, D, seed, padded=True), "dense": Dense}
NEAR = {"rtol": 0, "atol": 1e-8}
ROUNDED = {"rtol": 0, "atol": 1e-5}  # Fastfood keeps G and its divisor in float32


def by_hand(n):
    """H (n, n): entry (i, j) is -1 to the number of ones that i and j have in common in binary."""
    rows = [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


def matrix_of(project):
    """P (D, d), one column for each unit vector."""
    return torch.stack([project(e) for e in torch.eye(project.d, dtype=torch.float64)], dim=1)


def value_and_gradient(project, z, g, *more):
    z = z.clone().requires_grad_()
    y = project(z, *more)
    y.backward(g)
    return y.detach(), z.grad


# ---- the Hadamard transform ----

@pytest.mark.points(3, "fastfood")
def test_the_four_point_transform_by_hand():
    H = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert by_hand(4).tolist() == H, "the signs of H"
    for transform in (butterfly, hadamard):
        found = transform(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
        assert found == [10.0, -2.0, -4.0, 0.0], f"{transform.__name__}: 1+2+3+4, 1-2+3-4, 1+2-3-4, 1-2-3+4"


@pytest.mark.points(1, "fastfood")
def test_small_products_give_the_butterfly_s_values_at_every_length(monkeypatch):
    for axis in (32, 4):  # one to three axes; one to six
        monkeypatch.setattr(fastfood, "AXIS", axis)
        for n in (1, 2, 8, 32, 64, 256, 1024, 2048):
            x = torch.randn(2, n, dtype=torch.float64)
            torch.testing.assert_close(hadamard(x), butterfly(x), **NEAR)
            if n <= 256:
                torch.testing.assert_close(butterfly(x), x @ by_hand(n), **NEAR)


@pytest.mark.filterwarnings("error")  # such as: an output was resized
def test_it_works_over_the_last_axis_of_any_tensor_however_it_lies_in_memory(monkeypatch):
    monkeypatch.setattr(fastfood, "CHUNK", 3 * 64)  # 10 rows in steps of 3
    x = torch.randn(64, 2, 5, dtype=torch.float64).permute(1, 2, 0)  # (2, 5, 64), not contiguous
    before = x.clone()
    torch.testing.assert_close(hadamard(x), x @ by_hand(64), **NEAR)
    assert torch.equal(x, before), "the input stays as it is"


@pytest.mark.points(1, "fastfood")
def test_its_gradient_is_the_transform_itself_with_no_factor():
    x, g = torch.randn(2, 2, 64, dtype=torch.float64)
    torch.testing.assert_close(value_and_gradient(hadamard, x, g)[1], g @ by_hand(64), **NEAR)
    assert torch.autograd.gradgradcheck(hadamard, x[:, :8].clone().requires_grad_()), "the gradient has a gradient"


def test_a_length_that_is_no_power_of_two_is_an_error_that_names_it():
    for n in (0, 3, 12, 1000):
        with pytest.raises(ValueError, match=f"length {n}:"):
            hadamard(torch.zeros(2, n))


# ---- Fastfood: the plain form by hand, the fast form by the plain one ----

@pytest.mark.points(3, "fastfood")
def test_the_plain_form_by_hand_one_idea_at_a_time():
    # z = (1, 0, 2) is padded to (1, 0, 2, 0); H of it is (3, 3, -1, -1). The divisor is √(D ΣG²).
    signs, order, draws = [1, -1, -1, 1], [2, 0, 3, 1], [1, 2, 0.5, -1]
    same, stay, ones = [1, 1, 1, 1], [0, 1, 2, 3], [1, 1, 1, 1]
    ideas = {  # D, one (B, Pi, G) for each block, P z
        "H twice is n, and so is the divisor √(4·4): z comes back": (4, [(same, stay, ones)], [1, 0, 2, 0]),
        "signs: H H (1, 0, -2, 0) / 4": (4, [(signs, stay, ones)], [1, 0, -2, 0]),
        "permutation: H (-1, 3, -1, 3) / 4, and not its inverse": (4, [(same, order, ones)], [1, -2, 0, 0]),
        "G: H (3, 6, -0.5, 1) / √(4·6.25)": (4, [(same, stay, draws)], [1.9, -0.9, 1.7, -0.3]),
        "G after the permutation: H (-1, 6, -0.5, -3) / 5": (4, [(same, order, draws)], [0.3, -0.9, 1.7, -1.9]),
        "two blocks of 4, cut to 6: H (3, 3, -2, 0) / 6 on H (0, 3, -1, 2) / 6":
            (6, [(same, stay, [1, 1, 2, 0]), (same, stay, [0, 1, 1, -2])], [2/3, -1/3, 4/3, 1/3, 2/3, -1]),
    }
    z = torch.tensor([1, 0, 2], dtype=torch.float64)
    for idea, (D, blocks, expected) in ideas.items():
        B, Pi, G = (torch.tensor(rows) for rows in zip(*blocks))
        torch.testing.assert_close(plain(z, D, B, Pi, G.double()), torch.tensor(expected, dtype=torch.float64), **NEAR,
                                   msg=lambda error, idea=idea: f"{idea}\n{error}")


@pytest.mark.parametrize("form", ["stacked", "padded"])
@pytest.mark.points(2, "fastfood")
def test_the_fast_form_is_the_plain_one_and_the_plain_one_is_the_matrix_of_the_docstring(form, monkeypatch):
    for d, D in ((5, 37), (8, 64), (1, 6), (13, 13), (40, 3001)):
        n = 2 ** math.ceil(math.log2(D if form == "padded" else d))
        B, Pi, G = next(draw(math.ceil(D / n), n, seed=3))
        assert set(B.flatten().tolist()) <= {-1, 1}, "signs: ±1"
        z, g = torch.randn(d, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
        value, gradient = value_and_gradient(plain, z, g, D, B, Pi, G.double())
        if n <= 64:  # [P_1; P_2; ...], each diag(G) times H on the left and on the right, its rows permuted
            H, G = by_hand(n), G.double() / (D * G.double().square().sum(dim=1, keepdim=True)).sqrt()
            P = torch.cat([H @ G[b].diag() @ (H @ B[b].double().diag())[Pi[b]] for b in range(len(B))])[:D, :d]
            torch.testing.assert_close(value, P @ z, **NEAR)
            torch.testing.assert_close(gradient, P.T @ g, **NEAR)
        project = FORMS[form](d, D, seed=3)
        assert project.B.shape == (math.ceil(D / n), n), f"blocks of n={n} for d={d}, D={D}"
        assert 0.6 < matrix_of(project).norm(dim=0).mean() < 1.4, "columns of norm near 1"
        for chunk in (1, 2 * n, 2**18):  # one block at a time, two, all
            monkeypatch.setattr(fastfood, "CHUNK", chunk)
            fast_value, fast_gradient = value_and_gradient(project, z, g)
            where = f"d={d}, D={D}, blocks of {n}, CHUNK={chunk}"
            assert torch.allclose(fast_value, value, **ROUNDED), f"P z: {where}"
            assert torch.allclose(fast_gradient, gradient, **ROUNDED), f"Pᵀ g: {where}"


@pytest.mark.points(1, "fastfood")
def test_why_each_constant_is_in_the_norm():
    n, blocks, i = 16, 3, 5
    B, Pi, G = next(draw(blocks, n, seed=1))
    H, e, G = by_hand(n), torch.eye(n, dtype=torch.float64)[i], G.double()
    first = H @ (B[0] * e)
    assert first.abs().tolist() == [1.0] * n, "a column of H B: every entry ±1"
    second = G[0] * first[Pi[0]]
    torch.testing.assert_close(second.norm(), G[0].norm(), **NEAR)                # G alone decides the norm: √ΣG²
    torch.testing.assert_close((H @ second).norm(), G[0].norm() * n**0.5, **NEAR)  # H H = n I: √n more
    # Each block divided by √(n ΣG²) has unit columns; D/n of them on top of each other have √(D/n).
    P = torch.stack([plain(e, n * blocks, B, Pi, G) for e in torch.eye(n, dtype=torch.float64)], dim=1)
    one = torch.ones(n, dtype=torch.float64)
    for block in P.split(n):
        torch.testing.assert_close(block.norm(dim=0), one / blocks**0.5, **NEAR)
    torch.testing.assert_close(P.norm(dim=0), one, **NEAR)


@pytest.mark.points(1, "fastfood")
def test_without_the_permutation_the_operator_collapses():
    # Entry (i, j) of H diag(G) H is sum_k G_k H_k,(i xor j): n different numbers in n² places.
    n = 16
    project = Fastfood(n, n)
    for order, least, most in ((project.Pi[0], 5 * n, n**2), (torch.arange(n), 1, n)):
        project.Pi[0] = order
        different = {round(abs(p), 6) for p in matrix_of(project).flatten().tolist()}
        assert least <= len(different) <= most


# ---- all three forms ----

@pytest.mark.points(1, "fastfood")
def test_columns_are_unit_and_nearly_orthogonal_in_all_three_forms():
    for form, kind in FORMS.items():
        P = matrix_of(kind(100, 5000))
        assert P.norm(dim=0).sub(1).abs().max() < 0.05, form
        singular = torch.linalg.svdvals(P)
        assert 0.75 < singular.min() and singular.max() < 1.25, form  # a Gaussian matrix: 0.86 to 1.14


def test_a_dense_matrix_too_large_to_keep_is_drawn_again_and_is_the_same(monkeypatch):
    d, D, random = 40, 60_000, torch.Generator().manual_seed(2)
    step = 8 * 2**17 // d                                         # three draws of rows
    P = torch.cat([torch.randn(min(step, D - start), d, generator=random) for start in range(0, D, step)]) / D**0.5
    z, g = torch.randn(d), torch.randn(D)
    kept = Dense(d, D, seed=2)
    monkeypatch.setattr(Dense, "KEEP", 0)
    drawn = Dense(d, D, seed=2)
    assert torch.equal(kept.P, P) and drawn.P is None
    (y, dz), again = value_and_gradient(kept, z, g), value_and_gradient(drawn, z, g)
    assert torch.equal(y, again[0]) and torch.equal(dz, again[1])
    exact = value_and_gradient(kept, z.double(), g.double())
    torch.testing.assert_close(exact, (P.double() @ z.double(), P.double().T @ g.double()), **NEAR)


# ---- the seed ----

def test_a_seed_means_these_signs_permutations_and_gaussians_because_saved_deltas_hold_nothing_else():
    D, n, step = 1024 * 130, 1024, 2**17 // 1024                  # 130 blocks: a draw of 128, and one of 2
    project, random = Fastfood(1000, D, seed=4), torch.Generator().manual_seed(4)
    for start in (0, step):
        shape, rows = (min(step, 130 - start), n), slice(start, start + step)
        signs = torch.randint(0, 2, shape, generator=random, dtype=torch.int8) * 2 - 1
        keys = torch.randint(-2**31, 2**31 - 1, shape, generator=random, dtype=torch.int32)
        gauss = torch.randn(shape, generator=random)
        assert torch.equal(project.B[rows], signs), "B is drawn first: 0 is -1, 1 is +1"
        assert torch.equal(project.Pi[rows].long(), keys.argsort(dim=1)), "Pi sorts 32-bit keys, drawn second"
        unit = gauss / (D * gauss.square().sum(dim=1, keepdim=True)).sqrt()
        assert torch.equal(project.G[rows], unit), "G is drawn last; the divisor is taken into it, in float32"


@pytest.mark.points(1, "fastfood")
def test_another_seed_is_another_projection_and_the_global_generator_is_left_alone():
    for form, kind in FORMS.items():
        z = torch.randn(5)
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        one, same, other = kind(5, 37, seed=4), kind(5, 37, seed=4), kind(5, 37, seed=5)
        assert torch.equal(torch.rand(3), expected), form
        assert torch.equal(one(z), same(z)) and not torch.allclose(one(z), other(z)), form


def test_nothing_random_is_saved():
    for form, kind in FORMS.items():
        assert kind(5, 37).state_dict() == {} and list(kind(5, 37).parameters()) == [], form


# ---- precision, devices, errors ----

def test_signs_take_a_byte_and_the_permutation_as_little_as_holds_it():
    for d, small in ((200, torch.uint8), (1000, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)):
        project = Fastfood(d, 2**16, device="meta")
        assert (project.B.dtype, project.Pi.dtype, project.G.dtype) == (torch.int8, small, torch.float32), d


def test_autocast_does_not_round_the_projection():
    for form, kind in FORMS.items():
        project, z = kind(5, 37), torch.randn(5)
        with torch.autocast("cpu", torch.bfloat16):
            inside = project(z)
        assert inside.dtype == torch.float32 and torch.equal(inside, project(z)), form


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_projection():
    z, x = torch.randn(20), torch.randn(7, 1024)
    for kind in FORMS.values():
        torch.testing.assert_close(kind(20, 3001).cuda()(z.cuda()).cpu(), kind(20, 3001)(z), rtol=0, atol=1e-5)
    there = Fastfood(20, 3001, device="cuda")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there.buffers(), Fastfood(20, 3001).buffers()))
    torch.testing.assert_close(hadamard(x.cuda()).cpu(), hadamard(x), rtol=0, atol=1e-2)


def test_a_d_or_a_vector_that_does_not_fit_is_an_error_and_never_cropped():
    for kind in FORMS.values():
        for d in (38, 0):
            with pytest.raises(ValueError, match=f"d={d} to D=37"):
                kind(d, 37)
        with pytest.raises(ValueError, match=r"takes 5 numbers, not \(6,\)"):
            kind(5, 37)(torch.zeros(6))


# ---- what it costs ----

def test_what_a_hundred_million_weights_cost():
    d, D = 1000, 10**8
    print(f"\nD = {D:.0e}, d = {d}: one P z")
    print(f"{'':<10}{'bytes held':>14}{'additions':>14}")
    costs = {"dense": (4 * d * D, d * D)}
    for form, padded in (("padded", True), ("stacked", False)):
        project = Fastfood(d, D, padded=padded, device="meta")
        blocks, n = project.B.shape
        held = sum(buffer.nbytes for buffer in project.buffers())
        costs[form] = held, 2 * blocks * n * int(math.log2(n))    # two transforms, log2 n stages each
    for form, (held, additions) in costs.items():
        print(f"{form:<10}{held / 1e9:>11.2f} GB{additions / 1e9:>11.2f} G")
    assert costs["dense"] == (4 * 10**11, 10**11)
    assert costs["padded"] == (9 * 2**27, 2 * 2**27 * 27)         # 1 + 4 + 4 bytes for each of 2^27
    assert costs["stacked"] == (7 * 97_657 * 1024, 2 * 97_657 * 1024 * 10)
