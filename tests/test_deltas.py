"""What a delta is, with a technique made for the occasion: one trained vector behind the embedding."""

import copy
import os
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import deltas
from deltas import (Delta, attach, count, fill, fingerprint, head_parameters, load, merge, methods, own_parameters,
                    read, save, setting, trainable)
from methods.bitfit import BitFit
from methods.lora import LoRA
from model import Config, Transformer

GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Shift(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x + self.vector


@dataclass
class Toy(Delta):
    family: ClassVar[str] = "addition"
    size: float = setting(1.0, "nothing")

    def attach(self, model):
        model.prompt = Shift(model.config.d_model)
        return model

    def formula(self, config):
        return config.d_model


def base(classes=0, seed=0):
    torch.manual_seed(seed)
    model = Transformer(GPT)
    if classes:
        model.classify(classes)
    return model


# ---- attach, trainable, count ----

def test_attaching_freezes_all_that_was_there():
    model = base()
    assert all(p.requires_grad for p in model.parameters())
    assert attach(Toy(), model) is model
    assert list(trainable(model)) == ["prompt.vector"]
    assert trainable(model)["prompt.vector"] is model.prompt.vector
    assert count(model) == deltas.Count(base=sum(p.numel() for p in base().parameters()), delta=12, head=0)


def test_a_classifier_trains_with_every_delta_and_is_counted_apart():
    model = attach(Toy(), base(classes=4))
    assert set(trainable(model)) == {"prompt.vector", "head.out.weight", "head.out.bias"}
    assert (count(model).delta, count(model).head) == (12, 4 * 12 + 4)
    assert count(model).base == sum(p.numel() for p in base().parameters())            # the LM head here is tied
    assert head_parameters(model) == {id(p) for p in model.head.parameters()}
    assert head_parameters(base()) == set()
    assert not any(name.startswith("head") for name in own_parameters(model))


def test_percent_is_of_the_base():
    assert deltas.Count(base=400, delta=3, head=100).percent == 0.75


def test_what_was_attached_is_remembered_and_guarded():
    delta = Toy(size=2.0)
    mark = fingerprint(own_parameters(base()))
    model = attach(delta, base())
    assert model.delta is delta and model.base_print == mark
    with pytest.raises(ValueError, match=r"carries a delta already \(Toy\(size=2.0\)\); load a fresh base"):
        attach(BitFit(), model)
    assert list(trainable(model)) == ["prompt.vector"]                                 # the refusal did nothing


def test_a_technique_must_say_what_it_is():
    for call in (lambda: Delta().attach(base()), lambda: Delta().formula(GPT), lambda: Delta().merge(base())):
        with pytest.raises(NotImplementedError):
            call()
    assert Delta().finish(base()) is None
    assert Toy().training_formula(GPT) == 12
    assert Delta.identity and LoRA().name == "lora"


def test_the_list_of_methods_names_files():
    kinds = methods()
    assert list(kinds)[:2] == ["full", "last_layer"] and kinds["lora"] is LoRA
    assert list(kinds) == list(deltas.METHODS)


# ---- fingerprint ----

def test_a_fingerprint_sees_names_shapes_and_values_and_no_order():
    a, b = torch.arange(6.0), torch.ones(2)
    mark = fingerprint({"a": a, "b": b})
    assert len(mark) == 64
    assert fingerprint({"b": b, "a": a}) == mark
    assert fingerprint({"a": a.clone(), "b": nn.Parameter(b)}) == mark
    assert fingerprint({"a": a, "c": b}) != mark
    assert fingerprint({"a": a.view(2, 3), "b": b}) != mark
    assert fingerprint({"a": a, "b": b + 1e-6}) != mark
    assert fingerprint({"a": a}) != mark
    assert fingerprint({"a": a.half(), "b": b}) == mark                                # by value, not by precision
    assert fingerprint({"a": a.view(2, 3).t()}) == fingerprint({"a": a.view(2, 3).t().contiguous()})
    assert fingerprint({"a": torch.empty(2, device="meta")}) == ""


def test_the_classifier_is_no_part_of_the_bases_fingerprint():
    one, other = base(classes=4), base(classes=4)
    with torch.no_grad():
        other.head.out.weight += 1
    assert attach(Toy(), one).base_print == attach(Toy(), other).base_print
    other = base(classes=4)
    with torch.no_grad():
        other.positions.weight[0, 0] += 1
    assert attach(Toy(), other).base_print != one.base_print


# ---- save and read ----

def test_a_file_holds_the_delta_and_what_it_belongs_to(tmp_path):
    model = attach(LoRA(rank=2, alpha=6.0), base(classes=4))
    size = save(tmp_path / "new" / "folder" / "x.pt", model, score=93.5, task="rating")
    assert size == (tmp_path / "new" / "folder" / "x.pt").stat().st_size
    assert os.listdir(tmp_path / "new" / "folder") == ["x.pt"]                         # no half-written file is left
    content = read(tmp_path / "new" / "folder" / "x.pt")
    tensors = content.pop("tensors")
    assert content == {"format": 1, "method": "lora", "classes": 4, "base": model.base_print,
                       "settings": {"rank": 2, "alpha": 6.0, "targets": "query,value"},
                       "notes": {"score": 93.5, "task": "rating"}}
    assert set(tensors) == set(trainable(model))
    assert all(torch.equal(tensors[name], p) and not tensors[name].requires_grad
               for name, p in trainable(model).items())


def test_only_the_delta_is_stored_even_if_it_is_a_view_of_something_large(tmp_path):
    model = attach(BitFit(), base())
    bias = model.blocks[0].mlp.up.bias
    bias.data = torch.zeros(1_000_000)[:20]
    assert save(tmp_path / "x.pt", model) < 4 * count(model).delta + 350 * len(trainable(model)) + 3000


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = attach(BitFit(), base()), tmp_path / "x.pt"
    save(path, model)
    old = path.read_bytes()

    def torn(content, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        save(path, model)
    assert path.read_bytes() == old


def test_what_is_no_delta_file_is_named(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(ValueError, match="x.pt: no such file"):
        read(path)
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path)
    for content in (b"", b"hello, this is text", b"PK\x03\x04 no zip", bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.pt: not a delta file, or cut short"):
            read(path)
    torch.save([1, 2, 3], path)
    with pytest.raises(ValueError, match="not a delta file of format 1"):
        read(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a delta file of format 1"):
        read(path)


def test_reading_runs_no_code(tmp_path):
    """A pickle can call any function; what is not a tensor, a number or a string is refused."""
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": 1, "method": "lora", "tensors": Trap()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a delta file"):
        read(tmp_path / "x.pt")
    assert not (tmp_path / "sprung").exists()


# ---- load ----

def test_a_loaded_delta_is_the_saved_one_head_included(tmp_path):
    model = attach(LoRA(rank=2), base(classes=4))
    with torch.no_grad():
        for p in trainable(model).values():
            p += torch.randn_like(p)
    save(tmp_path / "x.pt", model)
    again = load(tmp_path / "x.pt", base())                                            # it has no Classifier yet
    assert torch.equal(again(IDS), model(IDS))
    assert set(trainable(again)) == set(trainable(model))
    with pytest.raises(ValueError, match="carries a delta already|another base"):
        load(tmp_path / "x.pt", again)


def test_a_delta_for_the_lm_head_does_not_fit_a_classifier(tmp_path):
    save(tmp_path / "x.pt", attach(BitFit(), base()))
    with pytest.raises(ValueError, match="misses head.out.bias, head.out.weight"):
        load(tmp_path / "x.pt", base(classes=4))


def test_another_base_is_refused_by_its_fingerprint(tmp_path):
    model = attach(BitFit(), base())
    save(tmp_path / "x.pt", model)
    other = fingerprint(own_parameters(base(seed=1)))
    with pytest.raises(ValueError, match=f"another base .fingerprint {model.base_print[:12]}, this base has {other[:12]}"):
        load(tmp_path / "x.pt", base(seed=1))


def test_filling_is_strict():
    def targets():
        return {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2, 3))}

    one, two = torch.ones(2), torch.full((2, 3), 2.0)
    found = targets()
    fill(found, {"b": two, "a": one}, "f.pt")
    assert torch.equal(found["a"], one) and torch.equal(found["b"], two)
    for tensors, message in (
        ({"a": one}, r"f.pt misses b \(1 in all\)"),
        ({}, r"f.pt misses a, b \(2 in all\)"),
        ({"a": one, "b": two, "d": one, "c": one}, r"f.pt has a surplus of c, d \(2 in all\)"),
        ({"a": one, "b": two.t()}, r"f.pt: b is \(3, 2\), not \(2, 3\)"),
        ({"a": torch.ones(1), "b": two}, r"f.pt: a is \(1,\), not \(2,\)"),            # would broadcast
    ):
        with pytest.raises(ValueError, match=message):
            fill(targets(), tensors, "f.pt")


# ---- merge ----

def test_merging_freezes_everything_and_leaves_a_model_for_a_new_delta():
    model = attach(LoRA(rank=2), base())
    with torch.no_grad():
        for p in trainable(model).values():
            p += torch.randn_like(p)
    expected = model(IDS)
    plain = merge(copy.deepcopy(model))
    torch.testing.assert_close(plain(IDS), expected, rtol=0, atol=1e-5)
    assert not trainable(plain) and plain.delta is None
    assert not torch.equal(plain(IDS), base()(IDS))
    with pytest.raises(ValueError, match="merged already"):
        merge(plain)
    again = attach(BitFit(), plain)
    assert torch.equal(again(IDS), plain(IDS))
    assert again.base_print != model.base_print                                        # it is another base now


def test_merging_works_in_float32_whatever_the_base_is_stored_in():
    model = attach(LoRA(rank=2), base())
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    assert {p.dtype for p in merge(model).parameters()} == {torch.float32}


def test_a_file_is_loaded_into_a_fresh_base_only(tmp_path):
    model = attach(methods()["bitfit"](), Transformer(GPT))
    save(tmp_path / "d.pt", model)
    with pytest.raises(ValueError, match="carries a delta already.*fresh base"):
        load(tmp_path / "d.pt", model)
