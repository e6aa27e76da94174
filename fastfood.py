"""Random projections P (D, d): from d trained parameters z to an update of all D weights of a model.

    theta = theta_0 + P z        z (d,) is trained; P is fixed and random, with columns of norm 1

    dense      P_ij ~ N(0, 1) / √D                                          O(D d) time and memory
    Fastfood   P z = the first D entries of [P_1 z; P_2 z; ...],            O(D log d) time, O(D) memory
               P_b z = H (G * (H (B * z))[Pi]) / √(D Σ G²),    z padded with zeros to n = 2^k >= d

H (n, n) is the Hadamard matrix, +1 and -1 only, H H = n I. Each block P_b has its own B (signs), Pi (a
permutation) and G (n draws from N(0, 1)). `plain` is this formula, a step a line; `Fastfood` computes the
same, a few blocks at a time. Why the divisor: column i of H (B * .) is ±1 everywhere, Pi changes no norm, G
makes it √ΣG², the second H multiplies by √n; D/n blocks stand on top of each other, so a column of P has the
norm √(n ΣG²) √(D/n) = √(D ΣG²). Cutting to D rows costs less than one block: the norm stays near 1.

H is never stored. H_mn = H_m ⊗ H_n, so a transform of length 1024 is a reshape to (32, 32) and a product
with H_32 along each axis: two small matrix products, which a CPU and a GPU do best. P is never stored
either: B, Pi and G come from a seed, and the seed is all that a saved delta keeps.
References: Le, Sarlos & Smola 2013, "Fastfood" (the stacked blocks); Li et al. 2018, "Measuring the
Intrinsic Dimension of Objective Landscapes" (the projection of all weights, unit columns).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from model import Refused

DRAW = 2**17        # entries drawn at a time, on every device: another value would give another P
CHUNK = 2**18       # entries worked on at a time: a megabyte in float32, so that it stays in cache
CUDA_CHUNK = 2**22  # a GPU works best in few large steps; 2**24 saves an H200 a third of the time and takes 336 MB more
AXIS = 32           # the largest Hadamard matrix that is written out


def butterfly(x):
    """The Hadamard transform by its definition, H_2n (a, b) = (H_n (a + b), H_n (a - b)): x (..., 2^k), a its first
    half, b its second."""
    if x.shape[-1] == 1:
        return x
    a, b = x.chunk(2, dim=-1)
    return torch.cat([butterfly(a + b), butterfly(a - b)], dim=-1)


def plain(z, D, B, Pi, G):
    """z (d,) and B, Pi, G (blocks, n) -> P z (D,). Fastfood(5, 50)(z) is plain(z, 50, *next(draw(7, 8, seed=0)))."""
    x = F.pad(z, (0, B.shape[1] - len(z)))                                             # (n,)
    x = B * x                                                                          # (blocks, n)
    x = butterfly(x)
    x = x.gather(1, Pi)
    G = G / (D * G.square().sum(dim=1, keepdim=True)).sqrt()  # the divisor, ahead of H: H is linear
    x = G * x
    x = butterfly(x)
    return x.flatten()[:D]                                                             # (D,)


def draw(blocks, n, seed):
    """B (signs), Pi (permutations), G (from N(0, 1)), each (r, n): r blocks at a time, on the CPU."""
    random, step = torch.Generator().manual_seed(seed), max(1, DRAW // n)
    for start in range(0, blocks, step):
        shape = min(step, blocks - start), n
        B = torch.randint(0, 2, shape, generator=random, dtype=torch.int8) * 2 - 1
        Pi = torch.randint(-2**31, 2**31 - 1, shape, generator=random, dtype=torch.int32).argsort(dim=-1, stable=True)
        yield B, Pi, torch.randn(shape, generator=random)


# ---- the same, a few blocks at a time ----

class Product(torch.autograd.Function):
    """y = A x by `times`, for a matrix A that is nowhere stored; the gradient is Aᵀ g, by `transposed`."""

    @staticmethod
    def forward(ctx, x, times, transposed):
        ctx.maps = transposed, times
        return times(x)

    @staticmethod
    def backward(ctx, g):
        return Product.apply(g, *ctx.maps), None, None


def hadamard(x):
    """H x over the last axis: x (..., n), n = 2^k -> (..., n). The values of `butterfly(x)`, much sooner.

    Unnormalised: hadamard(hadamard(x)) = n x. H is symmetric, so the gradient is hadamard(g). Raises
    Refused where n is no power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise Refused(f"a Hadamard transform needs a power of two, not an axis of length {n}: pad it")
    return Product.apply(x, transform, transform)


def transform(x):
    """hadamard(x) without a gradient, a few rows at a time."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()                                     # (R, n)
    step = per_chunk(rows.shape[-1], x.device)
    out, spare = torch.empty_like(rows), torch.empty_like(rows[:step])
    for a, b in zip(rows.split(step), out.split(step)):
        axes(a, spare[:len(a)], b)
    return out.view(x.shape)


def axes(x, spare, out):
    """out = H x for rows x (R, n): one product with a small Hadamard matrix along each axis of 32.

    For n = 8192 it is `torch.einsum("ia,jb,kc,rabc->rijk", H_8, H_32, H_32, x.view(R, 8, 32, 32))`.
    x, spare and out are contiguous and share no memory; spare is overwritten.
    """
    whole, rest = divmod(x.shape[-1].bit_length() - 1, AXIS.bit_length() - 1)
    sizes, inner = [AXIS] * whole + [2**rest] * (rest > 0) or [1], 1
    for left, k in zip(reversed(range(len(sizes))), sizes):  # the last of them writes to out
        target, H = spare if left % 2 else out, matrix(k, x.dtype, x.device)
        if inner == 1:
            torch.mm(x.view(-1, k), H, out=target.view(-1, k))
        else:
            a, b = x.view(-1, k, inner), target.view(-1, k, inner)
            torch.bmm(H.expand(len(a), k, k), a, out=b)
        x, inner = target, inner * k


@cache
def matrix(n, dtype, device):
    return butterfly(torch.eye(n, dtype=dtype, device=device))


def per_chunk(width, device):  # rows
    return max(1, (CHUNK if device.type == "cpu" else CUDA_CHUNK) // width)


def next_pow2(n):
    return 1 << (n - 1).bit_length()


class Projection(nn.Module):
    """z (d,) -> gain P z (D,), given `times` and `transposed`. Raises Refused unless 1 <= d <= D."""

    def __init__(self, d, D, seed, gain):
        if not 1 <= d <= D:
            raise Refused(f"a projection from d={d} to D={D} numbers: d must be at least 1 and at most D")
        super().__init__()
        self.d, self.D, self.seed, self.gain = d, D, seed, gain

    def forward(self, z):
        if z.shape != (self.d,):
            raise Refused(f"this projection takes {self.d} numbers, not {tuple(z.shape)}")
        return Product.apply(self.gain * z, self.times, self.transposed)               # (D,)

    def extra_repr(self):
        return f"d={self.d}, D={self.D}, seed={self.seed}"


class Fastfood(Projection):
    """z (d,) -> P z (D,), float32 or float64: `plain`, with the divisor taken into G once and for all.

    stacked (the default)  n = next_pow2(d), many blocks     2 D log₂ d additions, in cache
    padded                 n = next_pow2(D), one block       2 n log₂ n additions, as the usual code has it

    Signs take one byte, the permutation the smallest integer that holds it: 7 bytes a weight at d = 1000. A
    seed means the same P on every device; on meta nothing is drawn. state_dict leaves B, Pi and G out.
    """

    def __init__(self, d, D, seed=0, gain=1.0, padded=False, device="cpu"):
        super().__init__(d, D, seed, gain)
        self.n = next_pow2(D if padded else d)
        shape = -(-D // self.n), self.n                                                # (blocks, n)
        small = next(kind for kind in (torch.uint8, torch.int16, torch.int32) if self.n - 1 <= torch.iinfo(kind).max)
        for name, dtype in (("B", torch.int8), ("Pi", small), ("G", torch.float32)):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), persistent=False)
        start = 0
        for B, Pi, G in draw(*shape, seed) if self.G.device.type != "meta" else ():
            end = start + len(B)
            self.B[start:end], self.Pi[start:end] = B, Pi
            self.G[start:end] = G / (D * G.square().sum(dim=1, keepdim=True)).sqrt()
            start = end

    def chunks(self, y):
        """A few blocks at a time: B, Pi, G (r, n), their part of y (r n,) and three spare tensors (r, n)."""
        step = min(per_chunk(self.n, self.B.device), len(self.B))
        index = torch.empty(step, self.n, dtype=torch.int64, device=y.device)
        spare = y.new_empty(3, step, self.n)
        buffers = (t.split(step) for t in (self.B, self.Pi, self.G))
        for B, Pi, G, part in zip(*buffers, y.split(step * self.n)):
            yield B, index[:len(B)].copy_(Pi), G, part, *spare[:, :len(B)]

    def times(self, z):
        """P z: the steps of `plain`, each into memory that is there already."""
        z, out = F.pad(z, (0, self.n - self.d)), z.new_empty(self.B.numel())           # (n,), (blocks n,)
        for B, Pi, G, part, x, y, spare in self.chunks(out):
            torch.mul(B, z, out=x)
            axes(x, spare, y)
            torch.gather(y, 1, Pi, out=x)
            axes(x.mul_(G), spare, part.view(B.shape))
        return out[:self.D]

    def transposed(self, g):
        """Pᵀ g: the same steps in reverse, each transposed, summed over the blocks. H and * are symmetric."""
        total = g.new_zeros(self.n)
        for B, Pi, G, part, x, y, spare in self.chunks(g):
            axes(F.pad(part, (0, B.numel() - len(part))).view(B.shape), spare, x)  # the last is cut: zeros for it
            y.scatter_(1, Pi, x.mul_(G))
            axes(y, spare, x)
            total += x.mul_(B).sum(dim=0)
        return total[:self.d]


class Dense(Projection):
    """z (d,) -> P z (D,), P_ij ~ N(0, 1) / √D: `torch.cat(list(self.rows())) @ z`, a few rows at a time.

    Up to KEEP entries P is kept; beyond that its rows are drawn again in every forward and every backward:
    23 million weights and d = 1000 would be 91 GB, and take minutes here instead.
    """

    KEEP = 2**28  # a gigabyte in float32

    def __init__(self, d, D, seed=0, gain=1.0, device="cpu"):
        super().__init__(d, D, seed, gain)
        self.step = max(1, 8 * DRAW // d)
        self.register_buffer("P", None, persistent=False)
        if torch.device(device).type != "meta" and d * D <= self.KEEP:
            self.P = torch.cat(list(self.rows())).to(device)                           # (D, d)

    def rows(self):
        """P, a few rows (r, d) at a time."""
        if self.P is not None:
            return self.P.split(self.step)
        random = torch.Generator().manual_seed(self.seed)
        return (torch.randn(min(self.step, self.D - start), self.d, generator=random) / self.D ** 0.5
                for start in range(0, self.D, self.step))

    def times(self, z):
        out = z.new_empty(self.D)
        for rows, part in zip(self.rows(), out.split(self.step)):
            torch.mv(rows.to(z), z, out=part)
        return out

    def transposed(self, g):
        total = g.new_zeros(self.d)
        for rows, part in zip(self.rows(), g.split(self.step)):
            torch.addmv(total, rows.to(g).T, part, out=total)
        return total
