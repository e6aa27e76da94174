"""Times the Hadamard transform and the projections against what usually stands in their place.

    python tests/bench/fastfood.py                 the three comparisons, about a minute
    python tests/bench/fastfood.py --growth        time against D at fixed d, and against d at fixed D
    python tests/bench/fastfood.py --growth --out growth.png     the same as a picture (needs matplotlib)

"Usual" is written here in the form in which it circulates: z padded to next_pow2(D), a butterfly of chunk
and cat over an axis for every bit, an int64 permutation. Every figure is a ratio taken in one run: the
two sides take turns, and the median of the turns counts. Memory is the growth of the process's peak.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from deltas import attach, trainable
from fastfood import Dense, Fastfood, butterfly, hadamard, next_pow2
from lab import pictures
from lab.sizes import MINILM
from lab.timing import side_by_side
from methods.full import Full, base_size
from methods.intrinsic import Intrinsic
from model import Transformer


class Usual(torch.nn.Module):
    """The projection as it circulates (with its gradient put right)."""

    def __init__(self, d, D):
        super().__init__()
        self.d, self.D, self.n = d, D, next_pow2(D)
        self.B = 2.0 * torch.randint(0, 2, (self.n,)) - 1
        self.Pi = torch.randperm(self.n)
        self.G = torch.randn(self.n)
        self.divisor = (self.D * self.G.square().sum()).sqrt()

    def forward(self, z):
        x = torch.nn.functional.pad(z, (0, self.n - self.d))
        x = chunk_and_cat(x * self.B)[self.Pi]
        return chunk_and_cat(x * self.G)[:self.D] / self.divisor


class ChunkAndCat(torch.autograd.Function):
    """One axis of length 2 for every bit of the length; each is split, added, subtracted, joined again."""

    @staticmethod
    def forward(ctx, x):
        bits = x.shape[-1].bit_length() - 1
        y = x.view(-1, *[2] * bits)
        for axis in range(1, bits + 1):
            a, b = y.chunk(2, dim=axis)
            y = torch.cat([a + b, a - b], dim=axis)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, g):
        return ChunkAndCat.apply(g)


chunk_and_cat = ChunkAndCat.apply


def seconds(turns, *sides):
    """The median time of each side, the sides taking turns."""
    ms, _ = side_by_side(dict(enumerate(sides)), turns)
    return [ms[i] / 1000 for i in range(len(sides))]


def there_and_back(project):
    z, g = torch.randn(project.d, requires_grad=True), torch.randn(project.D)

    def step():
        z.grad = None
        project(z).backward(g)
    return step


def peak_mb():
    """The process's peak so far, since it was last set back (Linux only)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def extra_mb(make):
    """What building a projection and one step through it add to the memory in use."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak_mb()
    make()()
    return peak_mb() - before


def compare(name, unit, usual, ours):
    print(f"{name:<44}{usual:>10.4g} {unit}{ours:>10.4g} {unit}{usual / ours:>9.1f} x", flush=True)


def transforms(rows=4096, n=1024):
    x = torch.randn(rows, n)
    usual, definition, ours = seconds(15, lambda: chunk_and_cat(x), lambda: butterfly(x), lambda: hadamard(x))
    each = 1e9 / x.numel()
    compare(f"hadamard, {rows} x {n}, chunk and cat", "ns", usual * each, ours * each)
    compare(f"hadamard, {rows} x {n}, butterfly()", "ns", definition * each, ours * each)


def projections(d=1000):
    D = base_size(MINILM)
    ours_mb = extra_mb(lambda: there_and_back(Fastfood(d, D)))
    usual_mb = extra_mb(lambda: there_and_back(Usual(d, D)))
    usual, padded, ours = seconds(3, *(there_and_back(p) for p in
                                       (Usual(d, D), Fastfood(d, D, padded=True), Fastfood(d, D))))
    compare(f"P z and back, D={D:,}, d={d}", "s ", usual, ours)
    compare("  the same, our own padded form", "s ", padded, ours)
    compare("  extra memory", "MB", usual_mb, ours_mb)


def training_step(d=1000, batch=32, tokens=25):
    """A step of the intrinsic dimension against a step of full fine-tuning: MiniLM, random weights."""
    plain, ids = Transformer(MINILM), torch.randint(0, 30522, (batch, tokens))
    plain.classify(2)
    at, labels = torch.arange(tokens).expand(batch, -1) == 0, torch.randint(0, 2, (batch,))

    def stepper(delta):
        model = attach(delta, copy.deepcopy(plain))
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-5)

        def step():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(ids, at=at), labels).backward()
            optimizer.step()
        return step

    deltas = Full(), Intrinsic(dim=d), Intrinsic(dim=d, per_layer=True)
    full, did, said = (1e3 * t for t in seconds(7, *map(stepper, deltas)))
    print(f"a training step, MiniLM, batch {batch} of {tokens} tokens: full {full:.0f} ms, "
          f"intrinsic {did:.0f} ms ({did / full:.2f} x), per layer {said:.0f} ms ({said / full:.2f} x)")


FORMS = {"dense": Dense, "padded": lambda d, D: Fastfood(d, D, padded=True), "stacked": Fastfood}


def growth(picture):
    """Milliseconds of P z and back; dense only where it can be kept."""
    sweeps = {"D": [(200, 2**k + 1) for k in range(14, 24)], "d": [(2**k, 2**18) for k in range(3, 15)]}
    curves = {}
    for axis, points in sweeps.items():
        print("\n" + "".join(f"{name:>10}" for name in ("d", "D", *FORMS)) + "     ms, forward and backward")
        for d, D in points:
            forms = [f for f in FORMS if f != "dense" or d * D <= Dense.KEEP]
            taken = seconds(5, *(there_and_back(FORMS[f](d, D)) for f in forms))
            for form, t in zip(forms, taken):
                curves.setdefault((axis, form), []).append((D if axis == "D" else d, 1e3 * t))
            by_form = dict(zip(forms, taken))
            columns = "".join(f"{1e3 * by_form.get(form, math.nan):>10.2f}" for form in FORMS)
            print(f"{d:>10}{D:>10}{columns}", flush=True)
    if picture:
        draw(curves, picture)


def draw(curves, path):
    figure, plots = pictures.figure(2)
    for plot, axis, fixed in zip(plots, "Dd", ("d = 200", f"D = {2**18}")):
        for form in FORMS:
            plot.loglog(*zip(*curves[axis, form]), marker="o", label=form)
        plot.set(xlabel=axis, ylabel="ms, forward and backward", title=fixed)
        plot.legend()
    pictures.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true", help="time against D and against d")
    parser.add_argument("--out", metavar="PICTURE", help="with --growth: draw the curves into this file")
    parser.add_argument("--threads", type=int, default=2, help="[2]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.growth:
        return growth(args.out)
    print(f"{'':<44}{'usual':>13}{'here':>13}    times better")
    transforms()
    projections()
    training_step()


if __name__ == "__main__":
    main()
