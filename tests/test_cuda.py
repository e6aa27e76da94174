"""Attention in PyTorch's one kernel, as a GPU computes it, tested on the CPU; then what only a GPU can show.

The second half is skipped where there is no CUDA device. It trains with train.py's own loop, there and here.
"""


import pytest
import torch
import torch.nn.functional as F

import deltas
import train
from data.tasks import Example, Task
from deltas import attach, fingerprint, load, save, trainable
from harness import report
from harness.settings import Settings
from model import generate
from test_laws import BASES, TASK, cases, frozen, law, transformer
from tiny import IDS, same, stir

on_a_gpu = pytest.mark.parametrize("device", [
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))])


def padded(where):
    """keep (2, 5) of a text of five tokens beside one of three, its two pads on the left or on the right."""
    return torch.tensor([[True] * 5, [False] * 2 + [True] * 3 if where == "left" else [True] * 3 + [False] * 2])


# ---- the branch of model.py that a GPU takes ----

def in_both_ways(monkeypatch, compute):
    """compute() with attention written out, and with PyTorch's kernel; the kernel is called then and only then."""
    kernel, calls, found = F.scaled_dot_product_attention, [], []
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **b: calls.append(1) or kernel(*a, **b))
        for fused in (False, True):
            patch.setattr("model.fused", lambda x: fused)
            found.append(compute())
            assert bool(calls) is fused, f"PyTorch's kernel, {fused}: called {len(calls)} times"
    return found


@law
def test_attention_in_one_kernel_gives_the_same_logits_and_gradients(name, monkeypatch):
    """For all tokens, and for the one that a classifier reads, the only one that the last block computes."""
    for case in cases(name):
        model = case.fresh().double()
        stir(trainable(model).values())
        for where in ("left", "right"):
            keep = padded(where)
            last = keep & (keep.cumsum(dim=1) == keep.sum(dim=1, keepdim=True))
            for at in (keep, last):
                def compute():
                    logits = model(IDS, keep, at=at)
                    return logits, *torch.autograd.grad(logits.square().mean(), trainable(model).values())
                for what, one, other in zip(("logits", *trainable(model)), *in_both_ways(monkeypatch, compute)):
                    same(other, one, f"{case}: {what}, {at.sum()} places, pads on the {where}", atol=1e-10)


@law
def test_attention_in_one_kernel_says_the_same_words(name, monkeypatch):
    """A text in three pieces, with a cache; then seven words more for it and for a shorter one."""
    for case in cases(name, ["gpt"]):
        model, keep = case.trained(), padded("left")
        with torch.no_grad():
            transformer(model).positions.weight.mul_(8)                                # so that it says different words

        def pieces():
            cache = {}
            return torch.cat([model(IDS[:, start:end], keep[:, :end], cache=cache)
                              for start, end in ((0, 2), (2, 3), (3, 5))], dim=1)
        one, other = in_both_ways(monkeypatch, pieces)
        same(other[keep], one[keep], f"{case}: logits with a cache", atol=1e-10)
        one, other = in_both_ways(monkeypatch, lambda: generate(model, IDS, padded("right"), steps=7))
        assert one.tolist() == other.tolist(), f"{case}: words"


# ---- where there is a GPU ----

def text(i):
    """Three to five words, and the one wanted behind the last: one of four, which may be classes too."""
    ids = [(i * j + 3) % 17 for j in range(1, 4 + i % 3)]
    return Example(ids, [-100] * (len(ids) - 1) + [i % 4], "", ["x"])


def trained(case, device, steps=6, **change):
    """(model, dev scores) after train.py's loop; base and delta start from the same values on every device."""
    model = attach(case.delta.for_task(TASK), case.plain().to(device))
    deltas.copy_into(trainable(model), trainable(case.fresh()), "the CPU's delta")
    words = None if BASES[case.base][1] else [0, 1, 2, 3]
    task = Task("four", [text(i) for i in range(8)], [text(i) for i in range(8, 15)], [], metric="", words=words)
    # A third of the usual rate: key biases have no gradient but rounding noise, and Adam makes whole steps of that.
    settings = Settings(case.delta, steps=steps, batch_size=3, lr=case.delta.lr / 3, device=device, **change)
    train.to_precision(model, settings.dtype)
    still, mark = frozen(model), fingerprint(frozen(model))
    curve, _ = train.train(model, task, 0, settings, report.quiet)
    assert fingerprint(still) == mark, f"{case} on {device}: a frozen tensor has changed"
    model.delta.finish(model)
    return model, [score for _, score in curve]


@on_a_gpu
@law
def test_a_gpu_trains_as_the_cpu_does(name, device):
    for case in cases(name):
        _, here = trained(case, "cpu")
        _, there = trained(case, device)
        assert len(here) == 6 and here[-1] != here[0], f"{case}: training that changes nothing shows nothing"
        assert there == pytest.approx(here, rel=1e-4), f"{case}: dev after every step"


@on_a_gpu
@law
def test_a_gpu_trains_in_bfloat16(name, device):
    for case in cases(name):
        _, here = trained(case, "cpu")
        model, there = trained(case, device, dtype="bfloat16")
        assert there == pytest.approx(here, rel=0.1), f"{case}: dev after every step"
        assert all(p.dtype == torch.bfloat16 for p in frozen(model).values() if p.ndim > 1), f"{case}: half the bytes"
        assert all(p.dtype == torch.float32 for p in trainable(model).values()), f"{case}: the delta stays in float32"


@on_a_gpu
@law
def test_a_delta_saved_on_a_gpu_answers_on_a_cpu_and_there_again(name, device, tmp_path):
    """Texts with pads on either side: with a prefix or a prompt there are more keys than queries."""
    for case in cases(name):
        model, _ = trained(case, device)
        save(tmp_path / "delta.pt", model)
        here, there = (load(tmp_path / "delta.pt", case.plain().to(place)) for place in ("cpu", device))
        for where in ("left", "right"):
            keep = padded(where)
            for what, one in (("as trained", model), ("loaded", there)):
                logits = one(IDS.to(device), keep.to(device)).cpu()
                same(logits[keep], here(IDS, keep)[keep], f"{case}: {what}, pads on the {where}", atol=1e-4)
        if case.base == "gpt":
            words = generate(there, IDS.to(device), padded("right").to(device), steps=7)
            assert words.tolist() == generate(here, IDS, padded("right"), steps=7).tolist(), f"{case}: words"
