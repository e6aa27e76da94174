"""Random projections P (D, d): from a few numbers z to an update of all D weights of a model.

    theta = theta_0 + P z        z (d,) is trained, P is fixed and random, |P e_i| = 1 for every i

    dense      P_ij ~ N(0, 1) / √D                                          O(D d) time and memory
    Fastfood   P z = the first D numbers of [P_1 z; P_2 z; ...],            O(D log d) time, O(D) memory
               P_b z = H (G * (H (B * z))[Pi]) / √(D Σ G²),    z padded to n = 2^k >= d

H (n, n) is the Hadamard matrix, +1 and -1 only, H H = n I. Each block P_b has its own B (signs), Pi (a
permutation) and G (n numbers from N(0, 1)). Why the divisor: column i of H (B * .) is ±1 everywhere, Pi
changes no norm, G makes it √ΣG², the second H multiplies by √n; D/n blocks stand on top of each other,
so a column of P has the norm √(n ΣG²) √(D/n) = √(D ΣG²). Cutting to D rows costs less than one block.

H is never stored. H_mn = H_m ⊗ H_n, so a transform of length 1024 is a reshape to (32, 32) and a product
with H_32 along each axis: two small matrix products, the thing that a CPU and a GPU do best.

P is never stored either: B, Pi and G come from a seed, and the seed is all that a saved delta keeps.
References: Le, Sarlos & Smola 2013, "Fastfood" (the stacked blocks); Li et al. 2018, "Measuring the
Intrinsic Dimension of Objective Landscapes" (the projection of all weights, unit columns).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 2**18       # numbers worked on at a time: a megabyte in float32, so that it stays in cache
CUDA_CHUNK = 2**24  # a GPU wants few large steps instead
DRAW = 2**17        # numbers drawn at a time, on every device: another value would give another P
AXIS = 32           # the largest Hadamard matrix that is written out


class Product(torch.autograd.Function):
    """y = P x by `times`; the gradient is exactly Pᵀ g, by `transposed`."""

    @staticmethod
    def forward(ctx, x, times, transposed):
        ctx.maps = transposed, times
        return times(x)

    @staticmethod
    def backward(ctx, g):
        return Product.apply(g, *ctx.maps), None, None


def butterfly(x):
    """The Hadamard transform by its definition, H_2n (a, b) = (H_n (a + b), H_n (a - b)): x (..., 2^k)."""
    if x.shape[-1] == 1:
        return x
    a, b = x.chunk(2, dim=-1)
    return torch.cat([butterfly(a + b), butterfly(a - b)], dim=-1)


def hadamard(x):
    """H x over the last axis: x (..., n), n = 2^k -> (..., n). Same numbers as `butterfly(x)`, much sooner.

    Unnormalised: hadamard(hadamard(x)) = n x. H is symmetric, so the gradient is hadamard(g).
    Raises ValueError where the length is no power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard transform needs a power of two, not an axis of length {n}: pad it")
    return Product.apply(x, transform, transform)


def transform(x):
    """hadamard(x) without a gradient, a few rows at a time."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()                                     # (R, n)
    out = torch.empty_like(rows)
    step = per_chunk(rows.shape[-1], x.device)
    spare = torch.empty_like(rows[:step])
    for a, b in zip(rows.split(step), out.split(step)):
        axes(a, spare[:len(a)], b)
    return out.view(x.shape)


def axes(x, spare, out):
    """out = H x for rows x (R, n): one product with a small Hadamard matrix along each axis of 32.

    As one line: `torch.einsum("ia,jb,kc,rabc->rijk", H_8, H_32, H_32, x.view(R, 8, 32, 32))` for n = 8192.
    The three are contiguous and share no memory; the spare is overwritten.
    """
    n, inner = x.shape[-1], 1
    sizes = [AXIS] * ((n.bit_length() - 1) // 5) + [2 ** ((n.bit_length() - 1) % 5)]
    sizes = [k for k in sizes if k > 1] or [1]
    for left, k in zip(reversed(range(len(sizes))), sizes):  # the last of them writes to out
        target, H = spare if left % 2 else out, matrix(k, x.dtype, x.device)
        if inner == 1:
            torch.mm(x.view(-1, k), H, out=target.view(-1, k))
        else:
            a, b = x.view(-1, k, inner), target.view(-1, k, inner)
            torch.bmm(H.expand(len(a), k, k), a, out=b)
        x, inner = target, inner * k
    return out


@lru_cache(maxsize=None)
def matrix(n, dtype, device):
    return butterfly(torch.eye(n, dtype=dtype, device=device))


def per_chunk(width, device):
    return max(1, (CHUNK if device.type == "cpu" else CUDA_CHUNK) // width)


def next_pow2(n):
    return 1 << (n - 1).bit_length()


class Projection(nn.Module):
    """z (d,) -> P z (D,), given `times` and `transposed`. Raises ValueError unless 1 <= d <= D."""

    def __init__(self, d, D, seed):
        if not 1 <= d <= D:
            raise ValueError(f"a projection from d={d} to D={D} numbers: d must be at least 1 and at most D")
        super().__init__()
        self.d, self.D, self.seed = d, D, seed

    def forward(self, z):
        if z.shape != (self.d,):
            raise ValueError(f"this projection takes {self.d} numbers, not {tuple(z.shape)}")
        return Product.apply(z, self.times, self.transposed)                           # (D,)


class Fastfood(Projection):
    """z (d,) -> P z (D,), float32 or float64, P as above; block b, with H the (n, n) Hadamard matrix, is

        H @ (G[b] * (H @ (B[b] * F.pad(z, (0, n - d))))[Pi[b]])        1 / √(D ΣG²) is multiplied into G

    stacked (the default)  n = next_pow2(d), many blocks     2 D log₂ d additions, in cache
    padded                 n = next_pow2(D), one block       2 n log₂ n additions, as the usual code has it

    Signs take one byte, the permutation the smallest integer that holds it: 7 bytes a weight at d = 1000.
    Drawn on the CPU from a generator of its own, so a seed means the same P on every device; on the
    meta device nothing is drawn. B, Pi and G are buffers that state_dict leaves out.
    """

    def __init__(self, d, D, seed=0, padded=False, device="cpu"):
        super().__init__(d, D, seed)
        self.padded = padded
        self.n = next_pow2(D if padded else d)
        shape = -(-D // self.n), self.n                                                # (blocks, n)
        integers = torch.uint8, torch.int16, torch.int32
        small = next(kind for kind in integers if self.n - 1 <= torch.iinfo(kind).max)
        for name, dtype in (("B", torch.int8), ("Pi", small), ("G", torch.float32)):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), persistent=False)
        if self.G.device.type != "meta":
            self.draw(torch.Generator().manual_seed(seed))

    def draw(self, random):
        for B, Pi, G in zip(*(t.split(max(1, DRAW // self.n)) for t in (self.B, self.Pi, self.G))):
            B.copy_(torch.randint(0, 2, B.shape, generator=random, dtype=torch.int8) * 2 - 1)
            keys = torch.randint(-2**31, 2**31 - 1, Pi.shape, generator=random, dtype=torch.int32)
            Pi.copy_(keys.argsort(dim=-1, stable=True))
            numbers = torch.randn(G.shape, generator=random)
            G.copy_(numbers / (self.D * numbers.square().sum(dim=-1, keepdim=True)).sqrt())

    def chunks(self, like):
        """B, Pi, G and three buffers of the same shape (r, n), a few blocks at a time."""
        step = min(per_chunk(self.n, self.B.device), len(self.B))
        buffers = like.new_empty(3, step, self.n)
        index = torch.empty(step, self.n, dtype=torch.int64, device=like.device)
        for B, Pi, G in zip(self.B.split(step), self.Pi.split(step), self.G.split(step)):
            r = len(B)
            yield B, index[:r].copy_(Pi), G, *(buffer[:r] for buffer in buffers)

    def times(self, z):
        """P z, block after block: every step in the order of the formula."""
        z, out, start = F.pad(z, (0, self.n - self.d)), z.new_empty(self.B.numel()), 0
        for B, Pi, G, x, y, spare in self.chunks(z):
            part = out[start:start + B.numel()].view(B.shape)
            start += B.numel()
            torch.mul(B, z, out=x)
            axes(x, spare, y)
            torch.gather(y, 1, Pi, out=x)
            axes(x.mul_(G), spare, part)
        return out[:self.D]

    def transposed(self, g):
        """Pᵀ g: the same steps in reverse, each transposed, summed over the blocks. H and * are symmetric."""
        total, start = g.new_zeros(self.n), 0
        for B, Pi, G, x, y, spare in self.chunks(g):
            part = g[start:start + B.numel()]
            start += B.numel()
            axes(F.pad(part, (0, B.numel() - len(part))).view(B.shape), spare, x)
            y.scatter_(1, Pi, x.mul_(G))
            axes(y, spare, x)
            total += x.mul_(B).sum(dim=0)
        return total[:self.d]

    def extra_repr(self):
        form = "padded" if self.padded else "stacked"
        return f"d={self.d}, D={self.D}, {form}: {len(self.B)} blocks of {self.n}, seed={self.seed}"


class Dense(Projection):
    """z (d,) -> P z (D,), P_ij ~ N(0, 1) / √D: the plain projection, which Fastfood replaces.

        torch.cat(list(self.rows())) @ z

    Up to KEEP numbers P is kept; beyond that its rows are drawn again, a few at a time, in every forward
    and every backward: 23 million weights and d = 1000 would be 91 GB, and take minutes here instead.
    """

    KEEP = 2**28  # a gigabyte in float32

    def __init__(self, d, D, seed=0, device="cpu"):
        super().__init__(d, D, seed)
        self.register_buffer("P", None, persistent=False)
        if torch.device(device).type != "meta" and d * D <= self.KEEP:
            self.P = torch.cat(list(self.draw())).to(device)                           # (D, d)

    def draw(self):
        random, step = torch.Generator().manual_seed(self.seed), max(1, 8 * DRAW // self.d)
        for start in range(0, self.D, step):
            yield torch.randn(min(step, self.D - start), self.d, generator=random) / self.D ** 0.5

    def rows(self):
        """P, a few rows (r, d) at a time."""
        return self.draw() if self.P is None else self.P.split(max(1, 8 * DRAW // self.d))

    def times(self, z):
        out, start = z.new_empty(self.D), 0
        for rows in self.rows():
            torch.mv(rows.to(z), z, out=out[start:start + len(rows)])
            start += len(rows)
        return out

    def transposed(self, g):
        total, start = g.new_zeros(self.d), 0
        for rows in self.rows():
            torch.addmv(total, rows.to(g).T, g[start:start + len(rows)], out=total)
            start += len(rows)
        return total

    def extra_repr(self):
        how = "drawn again at every use" if self.P is None else "kept"
        return f"d={self.d}, D={self.D}, {how}, seed={self.seed}"
