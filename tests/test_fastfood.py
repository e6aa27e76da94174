"""Worked examples for the Hadamard transform and the random projections: small enough for paper."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastfood
from fastfood import Dense, Fastfood, butterfly, hadamard

FORMS = {"stacked": lambda d, D, seed=0: Fastfood(d, D, seed),
         "padded": lambda d, D, seed=0: Fastfood(d, D, seed, padded=True),
         "dense": Dense}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def matrix_of(project):
    """P (D, d), one column for each unit vector."""
    return torch.stack([project(e) for e in torch.eye(project.d, dtype=torch.float64)], dim=1)


def by_hand(n):
    """H (n, n): entry (i, j) is -1 to the number of ones that i and j have in common in binary."""
    rows = [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


# ---- the Hadamard transform ----

def test_the_four_point_transform_by_hand():
    H = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert by_hand(4).tolist() == H
    # 1+2+3+4, 1-2+3-4, 1+2-3-4, 1-2-3+4
    assert hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [10.0, -2.0, -4.0, 0.0]


@pytest.mark.parametrize("n", [1, 2, 8, 32, 64, 256, 1024, 2048, 2**15, 2**16])
def test_small_products_give_what_the_butterfly_gives(n):
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), butterfly(x), rtol=0, atol=1e-8)
    if n <= 256:
        torch.testing.assert_close(hadamard(x), x @ by_hand(n), rtol=0, atol=1e-8)


def test_it_works_over_the_last_axis_of_any_tensor_however_it_lies_in_memory(monkeypatch):
    monkeypatch.setattr(fastfood, "CHUNK", 3 * 64)  # 10 rows in steps of 3
    x = torch.randn(64, 2, 5, dtype=torch.float64).permute(1, 2, 0)  # (2, 5, 64), not contiguous
    before = x.clone()
    torch.testing.assert_close(hadamard(x), x @ by_hand(64), rtol=0, atol=1e-8)
    assert torch.equal(x, before)


def test_transforming_twice_multiplies_by_the_length():
    x = torch.randn(3, 128, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), 128 * x, rtol=0, atol=1e-8)


def test_its_gradient_is_the_transform_itself_with_no_factor():
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 64, dtype=torch.float64)
    hadamard(x).backward(g)
    torch.testing.assert_close(x.grad, g @ by_hand(64), rtol=0, atol=1e-8)
    assert torch.autograd.gradcheck(hadamard, x)
    assert torch.autograd.gradgradcheck(hadamard, x)


@pytest.mark.parametrize("n", [0, 3, 12, 1000])
def test_another_length_is_an_error_that_names_it(n):
    with pytest.raises(ValueError, match=f"length {n}:"):
        hadamard(torch.zeros(2, n))


# ---- Fastfood ----

def test_fastfood_of_length_four_by_hand():
    project = Fastfood(3, 4)
    project.B[0] = torch.tensor([1, -1, 1, 1])
    project.Pi[0] = torch.tensor([2, 0, 3, 1])
    project.G[0] = torch.tensor([1.0, 2.0, 0.5, -1.0])
    # B * (1, 0, 2, 0) = (1, 0, 2, 0); H of it: (3, 3, -1, -1); in the order 2, 0, 3, 1: (-1, 3, -1, 3);
    # times G: (-1, 6, -0.5, -3); H of that:
    assert project(torch.tensor([1.0, 0.0, 2.0])).tolist() == [1.5, -4.5, 8.5, -9.5]


@pytest.mark.parametrize("d, D, padded", [(5, 37, False), (5, 37, True), (8, 64, False), (40, 301, False),
                                          (1, 6, False)])
def test_it_is_the_matrix_that_the_docstring_writes_down(d, D, padded, monkeypatch):
    project = Fastfood(d, D, seed=3, padded=padded)
    n, H = project.n, by_hand(project.n)
    assert n == 2 ** math.ceil(math.log2(D if padded else d)) and len(project.B) == math.ceil(D / n)
    B, Pi, G, z = project.B, project.Pi.long(), project.G.double(), torch.randn(d, dtype=torch.float64)
    slow = [H @ (G[b] * (H @ (B[b] * F.pad(z, (0, n - d))))[Pi[b]]) for b in range(len(B))]
    for chunk in (2 * n, 2**17):
        monkeypatch.setattr(fastfood, "CHUNK", chunk)
        torch.testing.assert_close(project(z), torch.cat(slow)[:D], rtol=0, atol=1e-8)


def test_signs_permutations_and_numbers_are_what_they_should_be():
    project = Fastfood(100, 128 * 50)
    assert set(project.B.unique().tolist()) == {-1, 1}
    assert all(sorted(row) == list(range(128)) for row in project.Pi.tolist())
    assert len({tuple(row) for row in project.Pi.tolist()}) == 50
    kurtosis = (project.G ** 4).mean() / (project.G ** 2).mean() ** 2  # 3 for a Gaussian
    assert abs(project.B.float().mean()) < 0.05 and abs(kurtosis - 3) < 0.3


def test_why_each_constant_is_in_the_norm():
    n, blocks, i = 16, 3, 5
    project = Fastfood(n, n * blocks, seed=1)
    H, e = by_hand(n), torch.eye(n, dtype=torch.float64)[i]
    G = torch.randn(n, dtype=torch.float64)
    first = H @ (project.B[0] * e)
    assert first.abs().tolist() == [1.0] * n                      # a column of H B: every entry ±1
    second = G * first[project.Pi[0].long()]
    assert torch.isclose(second.norm(), G.norm())                 # so G alone decides the norm: √ΣG²
    assert torch.isclose((H @ second).norm(), G.norm() * n**0.5)  # H H = n I: √n more
    # Each block divided by √(n ΣG²) has unit columns; D/n of them on top of each other have √(D/n).
    P, one = matrix_of(project), torch.ones(n, dtype=torch.float64)
    for block in P.split(n):
        torch.testing.assert_close(block.norm(dim=0), one / blocks**0.5, rtol=0, atol=1e-7)  # G is float32
    torch.testing.assert_close(P.norm(dim=0), one, rtol=0, atol=1e-7)


def test_columns_are_unit_and_nearly_orthogonal_in_all_three_forms(form):
    P = matrix_of(form(100, 5000))
    assert P.norm(dim=0).sub(1).abs().max() < 0.05
    singular = torch.linalg.svdvals(P)
    assert 0.75 < singular.min() and singular.max() < 1.25        # a Gaussian matrix: 0.86 to 1.14
    rows = P.norm(dim=1) / (100 / 5000) ** 0.5
    assert torch.isclose(rows.square().mean(), torch.tensor(1.0, dtype=torch.float64), atol=0.01)


def test_without_the_permutation_the_operator_collapses():
    # Entry (i, j) of H diag(G) H is sum_k G_k H_k,(i xor j): n different numbers in n² places.
    n = 16
    project = Fastfood(n, n)
    different = lambda P: len({round(abs(p), 6) for p in P.flatten().tolist()})  # noqa: E731
    assert different(matrix_of(project)) > 5 * n
    project.Pi[0] = torch.arange(n)
    assert different(matrix_of(project)) <= n


def test_the_gradient_is_exactly_the_transpose(form):
    project = form(5, 37)
    P, g = matrix_of(project), torch.randn(37, dtype=torch.float64)
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    project(z).backward(g)
    torch.testing.assert_close(z.grad, P.T @ g, rtol=0, atol=1e-8)
    assert torch.autograd.gradcheck(project, z)


def test_a_long_gradient_in_many_chunks_is_exact_too(form, monkeypatch):
    monkeypatch.setattr(fastfood, "CHUNK", 1000)
    project = form(20, 3001)
    P, g = matrix_of(project), torch.randn(3001, dtype=torch.float64)
    z = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    project(z).backward(g)
    torch.testing.assert_close(z.grad, P.T @ g, rtol=0, atol=1e-8)


def test_a_square_projection_reaches_every_vector(form):
    P, wanted = matrix_of(form(13, 13)), torch.randn(13, dtype=torch.float64)
    z = torch.linalg.solve(P, wanted)
    torch.testing.assert_close(form(13, 13)(z), wanted, rtol=0, atol=1e-6)


# ---- the seed ----

def test_a_seed_means_one_projection_and_leaves_the_world_s_dice_alone(form):
    z = torch.randn(5)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, same, other = form(5, 37, seed=4), form(5, 37, seed=4), form(5, 37, seed=5)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one(z), same(z))
    assert not torch.allclose(one(z), other(z))


def test_nothing_random_is_saved(form):
    project = form(5, 37)
    assert project.state_dict() == {} and list(project.parameters()) == []


@pytest.mark.parametrize("d, small", [(200, torch.uint8), (1000, torch.int16), (2**15, torch.int16),
                                      (2**15 + 1, torch.int32)])
def test_signs_take_a_byte_and_the_permutation_as_little_as_holds_it(d, small):
    project = Fastfood(d, 2**16, device="meta")
    assert (project.B.dtype, project.Pi.dtype, project.G.dtype) == (torch.int8, small, torch.float32)


def test_a_dense_matrix_too_large_to_keep_is_drawn_again_and_is_the_same(monkeypatch):
    kept = Dense(40, 60_000)                                      # three draws of rows
    monkeypatch.setattr(Dense, "KEEP", 0)
    drawn = Dense(40, 60_000)
    assert kept.P.shape == (60_000, 40) and drawn.P is None
    z, same = torch.randn(40, requires_grad=True), torch.zeros(40, requires_grad=True)
    same.data.copy_(z)
    assert torch.equal(kept(z), drawn(same))
    torch.testing.assert_close(drawn(z), torch.cat(list(drawn.rows())) @ z)
    g = torch.randn(60_000)
    kept(z).backward(g), drawn(same).backward(g)
    assert torch.equal(z.grad, same.grad)


# ---- precision, devices, errors ----

def test_autocast_does_not_round_the_projection(form):
    project, z = form(5, 37), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = project(z)
    assert inside.dtype == torch.float32 and torch.equal(inside, project(z))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_projection(form):
    here, there, z = form(20, 3001), form(20, 3001).cuda(), torch.randn(20)
    torch.testing.assert_close(there(z.cuda()).cpu(), here(z), rtol=0, atol=1e-5)
    x = torch.randn(7, 1024)
    torch.testing.assert_close(hadamard(x.cuda()).cpu(), hadamard(x), rtol=0, atol=1e-2)


@pytest.mark.parametrize("d, D", [(38, 37), (0, 37)])
def test_more_dimensions_than_weights_are_an_error(form, d, D):
    with pytest.raises(ValueError, match=f"d={d} to D={D}"):
        form(d, D)


def test_a_vector_of_the_wrong_length_is_an_error_and_never_cropped(form):
    with pytest.raises(ValueError, match=r"takes 5 numbers, not \(6,\)"):
        form(5, 37)(torch.zeros(6))


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
