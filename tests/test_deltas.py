"""What a delta is, with a technique made for the occasion: one trained vector behind the embedding."""

import copy
import gc
import math
import os
import re
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import deltas
from deltas import (Delta, attach, check_fields, copy_into, count, detach, fingerprint, head_parameters, kept, load,
                    merge, methods, own_parameters, read, save, setting, trainable)
from methods.bitfit import BitFit
from methods.full import Full
from methods.lora import LoRA
from model import Refused, Transformer
from tiny import BERT, GPT, IDS, same, stir


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


def base(classes=0, seed=0, config=GPT):
    torch.manual_seed(seed)
    model = Transformer(config)
    if classes:
        model.classify(classes)
    return model


# ---- fields ----

@dataclass
class Fields:
    whole: int = setting(3, "from 1 on", least=1)
    real: float = setting(0.5, "above 0", above=0)
    word: str = setting("a", "a or b", among=("a", "b"))
    flag: bool = setting(False, "yes or no")
    maybe: int = setting(None, "may be left out", least=0)
    free: list = None                                                                  # no setting: not checked


def test_a_field_is_checked_from_its_declaration():
    for allowed in ({}, {"whole": 1}, {"real": 1e-9}, {"real": 2}, {"word": "b"}, {"flag": True}, {"maybe": 0},
                    {"free": [7]}):
        assert check_fields(Fields(**allowed)) is None, f"allowed: {allowed}"
    for field, value, wanted in (
        ("whole", 0, "1 or more"), ("whole", 2.0, "a whole number"), ("whole", True, "a whole number"),
        ("whole", "3", "a whole number"), ("whole", None, "a whole number"), ("real", 0.0, "a number above 0"),
        ("real", math.inf, "a finite number"), ("real", math.nan, "a finite number"), ("real", "1", "a finite number"),
        ("real", True, "a finite number"), ("word", "c", "a or b"), ("word", 1, "a text"), ("flag", 1, "true or false"),
        ("maybe", -1, "0 or more"), ("maybe", 0.5, "a whole number"),
    ):
        with pytest.raises(ValueError) as error:
            check_fields(Fields(**{field: value}))
        assert str(error.value) == f"{field}={value!r}: choose {wanted}"


def test_a_technique_checks_its_fields_when_it_is_made():
    with pytest.raises(ValueError, match="^size='large': choose a finite number$"):
        Toy(size="large")


# ---- techniques ----

def test_the_techniques_stand_in_the_order_in_which_they_are_best_read():
    assert list(methods()) == ["full", "last_layer", "bitfit", "lora", "adapter", "prompt", "prefix", "intrinsic",
                               "mask"]
    assert methods()["lora"] is LoRA and LoRA().name == "lora", "a technique has the name of its file"


def test_a_technique_says_how_it_is_attached_and_counted_and_inherits_the_rest():
    for call in (lambda: Delta().attach(base()), lambda: Delta().formula(GPT)):
        with pytest.raises(NotImplementedError):
            call()
    toy, model = Toy(), base()
    assert toy.identity and toy.for_task("a task") is toy and toy.finish(model) is None and toy.merge(model) is model
    assert toy.training_formula(GPT) == toy.formula(GPT) == 12, "what is trained is what is stored"
    n = 2 * (4 * 12 * 12 + 2 * 12 * 20)
    assert deltas.matrix_entries(GPT) == n and toy.flops(GPT, text=5) == (2 * n, 4 * n), "2 n forward, 4 n in training"


# ---- attach, trainable, count ----

@pytest.mark.points(3, "deltas")
def test_attaching_freezes_all_that_was_there_and_notes_the_base():
    model, toy = base(), Toy(size=2.0)
    assert all(p.requires_grad for p in model.parameters())
    mark, size = fingerprint(own_parameters(model), GPT), sum(p.numel() for p in model.parameters())
    assert attach(toy, model) is model
    assert list(trainable(model)) == ["prompt.vector"], "all is frozen but the delta"
    assert trainable(model)["prompt.vector"] is model.prompt.vector
    assert count(model) == deltas.Count(base=size, delta=12, head=0), "base and delta are counted apart"
    assert model.delta is toy and model.base_fingerprint == mark, "the base before the delta came in"
    assert model.base_shapes == {name: tuple(p.shape) for name, p in base().named_parameters()}


@pytest.mark.points(1, "deltas")
def test_a_model_whose_delta_is_refused_is_as_it_was():
    class Unfit(Toy):
        def attach(self, model):
            raise Refused("it does not fit")

    model = base()
    with pytest.raises(Refused, match="it does not fit"):
        attach(Unfit(), model)
    assert all(p.requires_grad for p in model.parameters()), "the freezing is undone too"
    assert count(attach(Toy(), model)).delta == 12, "and another delta may come"


@pytest.mark.points(3, "deltas")
def test_a_classifier_trains_with_every_delta_and_is_counted_apart():
    model = attach(Toy(), base(classes=4))
    assert set(trainable(model)) == {"prompt.vector", "head.out.weight", "head.out.bias"}
    assert (count(model).delta, count(model).head) == (12, 4 * 12 + 4), "the head is no part of the delta"
    assert count(model).base == sum(p.numel() for p in base().parameters()), "nor of the base; the LM head is tied"
    assert head_parameters(model) == {id(p) for p in model.head.parameters()}
    assert head_parameters(base()) == set(), "an LM head is part of the base"
    free = count(attach(Full(), Transformer(replace(GPT, tied=False))))
    assert (free.delta, free.head) == (free.base, 0), "no name makes a head: an LM head that trains is delta"


def test_percent_is_of_the_base():
    assert deltas.Count(base=400, delta=3, head=100).percent == 0.75


@pytest.mark.points(1, "saving")
def test_a_model_carries_one_delta_at_a_time(tmp_path):
    model = attach(Toy(size=2.0), base())
    save(tmp_path / "x.pt", attach(BitFit(), base()))
    for call in (lambda: attach(BitFit(), model), lambda: load(tmp_path / "x.pt", model)):
        with pytest.raises(ValueError, match=r"a delta already \(Toy\(size=2.0\)\); detach it, or load .*fresh base"):
            call()
    assert list(trainable(model)) == ["prompt.vector"], "the refusal did nothing"


# ---- detach ----

def test_what_trained_the_base_itself_is_detached_only_from_a_copy_that_was_kept():
    """BitFit trains eight biases a block and the final norm's, in place: without a copy they are gone."""
    for delta, of_the_base in ((BitFit(), 17), (BitFit(only="query_up"), 4), (LoRA(rank=2), 0), (Toy(), 0)):
        model = attach(delta, base(classes=4))
        stir(trainable(model).values())
        if of_the_base:
            why = rf"tensors of the base itself \({of_the_base}\) were trained or cast, and no copy.* restorable=True"
            with pytest.raises(ValueError, match=why):
                detach(model)
            assert model.delta is delta, "the refusal did nothing"
        else:
            mark = model.base_fingerprint
            assert fingerprint(own_parameters(detach(model)), model.config) == mark, f"{delta}: none is needed"
    model = attach(Toy(), base())
    model.tokens.weight.data = model.tokens.weight.data.bfloat16()
    with pytest.raises(ValueError, match=r"tensors of the base itself \(1\) were trained or cast"):
        detach(model)
    for plain in (base(), merge(attach(LoRA(rank=2), base()))):
        with pytest.raises(ValueError, match="nothing to detach"):
            detach(plain)


def test_training_keeps_no_copy_of_anything():
    """`detach` costs a run no memory, and the model is in no circle that Python would free late."""
    for kind in methods().values():
        before = attach(kind() if kind.name != "mask" else kind(by="random", k=31), base()).before
        assert before.values is None, kind.name
    model = base()
    gone = weakref.ref(model)
    gc.disable()
    try:
        model = attach(BitFit(), model, restorable=True)
        del model
        assert gone() is None, "the model is freed when its last name goes"
    finally:
        gc.enable()


def test_three_files_take_turns_on_one_base(tmp_path):
    """A cloze, four classes, two classes: the LM head comes back in between, and each answers as on its own base."""
    files, plain, known = {}, base(), set()
    for i, (delta, classes) in enumerate(((LoRA(rank=2), 0), (BitFit(), 4), (methods()["full"](), 2))):
        model = attach(delta, base(classes))
        stir(trainable(model).values())
        save(tmp_path / f"{i}.pt", model)
        files[tmp_path / f"{i}.pt"] = model(IDS)
    mark, names = fingerprint(own_parameters(plain), GPT), list(plain.state_dict())
    for path, expected in list(files.items()) * 2:
        model = load(path, plain, restorable=True, known=known)
        known.add(model.base_fingerprint)
        assert torch.equal(model(IDS), expected), path.name
        assert detach(model) is plain and plain.config == GPT and list(plain.state_dict()) == names
        assert fingerprint(own_parameters(plain), plain.config) == mark, f"{path.name}: the base is as it was"
    with pytest.raises(ValueError, match="another base"):
        load(path, base(seed=1), known={"another mark"})


def test_what_a_delta_keeps_is_its_buffers_and_a_base_has_none():
    assert kept(base()) == kept(base(config=BERT)) == kept(attach(BitFit(), base(classes=4))) == {}
    model = attach(Toy(), base())
    model.prompt.register_buffer("places", torch.tensor([3, 7], dtype=torch.int32))
    model.prompt.register_buffer("drawn", torch.zeros(9), persistent=False)           # from a seed, at any time
    assert list(kept(model)) == ["prompt.places"] and list(trainable(model)) == ["prompt.vector"]
    assert kept(model)["prompt.places"].data_ptr() == model.prompt.places.data_ptr(), "itself, to be filled from a file"
    assert count(model).delta == 12, "it is not counted"


# ---- fingerprint ----

@pytest.mark.points(1, "saving")
def test_a_fingerprint_sees_names_shapes_values_and_the_config_and_no_order():
    a, b = torch.arange(6.0), torch.ones(2)
    mark = fingerprint({"a": a, "b": b})
    assert len(mark) == 64
    for what, equal in (("order", {"b": b, "a": a}), ("copies", {"a": a.clone(), "b": nn.Parameter(b)}),
                        ("precision", {"a": a.half(), "b": b})):
        assert fingerprint(equal) == mark, f"{what} does not count"
    for what, other in (("a name", {"a": a, "c": b}), ("a shape", {"a": a.view(2, 3), "b": b}),
                        ("a value", {"a": a, "b": b + 1e-6}), ("a missing tensor", {"a": a}),
                        ("the last value", {"a": a + torch.tensor([0, 0, 0, 0, 0, 1]), "b": b})):
        assert fingerprint(other) != mark, f"{what} counts"
    assert fingerprint({"a": a, "b": b}, GPT) != mark, "the Config counts"
    turned = a.view(2, 3).t()
    assert fingerprint({"a": turned}) == fingerprint({"a": turned.contiguous()}), "how it lies in memory does not count"
    assert fingerprint({"a": torch.empty(2, device="meta")}) == "", "there are no values on the meta device"


def test_a_fingerprint_tells_places_apart_that_a_float32_does_not():
    one, next_one = (torch.tensor([place], dtype=torch.int32) for place in (2**24, 2**24 + 1))
    assert one.float() == next_one.float() and fingerprint({"a": one}) != fingerprint({"a": next_one})


@pytest.mark.points(1, "deltas")
def test_the_classifier_is_no_part_of_the_bases_fingerprint():
    one, head, place = base(classes=4), base(classes=4), base(classes=4)
    with torch.no_grad():
        head.head.out.weight += 1
        place.positions.weight[0, 0] += 1
    mark, with_head, with_place = (attach(Toy(), model).base_fingerprint for model in (one, head, place))
    assert mark == with_head, "the head is trained, so it is not the base's"
    assert mark != with_place, "one value of the base counts"


# ---- save and read ----

@pytest.mark.points(2, "saving")
def test_a_file_holds_the_delta_and_what_it_belongs_to(tmp_path):
    model, folder = attach(LoRA(rank=2, alpha=6.0), base(classes=4)), tmp_path / "new" / "folder"
    size = save(folder / "x.pt", model, score=93.5, task="rating")
    assert size == (folder / "x.pt").stat().st_size
    assert os.listdir(folder) == ["x.pt"], "no half-written file is left"
    content = read(folder / "x.pt")
    tensors, digest = content.pop("tensors"), content.pop("digest")
    assert len(digest) == 64
    assert content == {"format": 2, "method": "lora", "classes": 4, "base": model.base_fingerprint,
                       "settings": {"rank": 2, "alpha": 6.0, "targets": "query,value"},
                       "notes": {"score": 93.5, "task": "rating"}}
    assert set(tensors) == set(trainable(model)), "the delta and the head, no more"
    for name, p in trainable(model).items():
        assert torch.equal(tensors[name], p) and not tensors[name].requires_grad, f"{name}: stored as it was trained"


@pytest.mark.points(1, "saving")
def test_only_the_delta_is_stored_even_if_it_is_a_view_of_something_large(tmp_path):
    model = attach(BitFit(), base())
    model.blocks[0].mlp.up.bias.data = torch.zeros(1_000_000)[:20]
    assert save(tmp_path / "x.pt", model) < 20_000


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = attach(BitFit(), base()), tmp_path / "x.pt"
    save(path, model)
    old = path.read_bytes()

    def torn(part, data):
        with open(part, "wb") as file:
            file.write(data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(KeyboardInterrupt):
        save(path, model)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path], "the old file, and no half of a new one"


def test_a_full_disk_is_the_systems_error_and_not_pytorchs(tmp_path, monkeypatch):
    def full(part, data):
        raise OSError(28, "No space left on device", str(part))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "x.pt", attach(BitFit(), base()))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_delta_file_is_named(tmp_path):
    path = tmp_path / "x.pt"
    for place, why in ((path, "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(ValueError, match=f"{place.name}: {why}"):
            read(place)
    for content in (b"", b"hello, this is text", b"PK\x03\x04 no zip", bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.pt: not written by torch.save, or cut short"):
            read(path)
    for content in ([1, 2, 3], {"weights": torch.ones(2)}, {"format": 3}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="x.pt: not a delta file of format 1 or 2"):
            read(path)


@pytest.mark.points(1, "saving")
def test_reading_runs_no_code(tmp_path):
    """A pickle can call any function; what is not a tensor, a number or a string is refused."""
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": 2, "method": "lora", "tensors": Trap()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not written by torch.save"):
        read(tmp_path / "x.pt")
    assert not (tmp_path / "sprung").exists(), "the file ran code"


# ---- load ----

def test_a_base_without_a_classifier_gets_the_saved_one(tmp_path):
    model = attach(LoRA(rank=2), base(classes=4))
    stir(trainable(model).values())
    save(tmp_path / "x.pt", model)
    again = load(tmp_path / "x.pt", base())
    assert torch.equal(again(IDS), model(IDS)), "the saved head, not a new one"
    assert set(trainable(again)) == set(trainable(model))


def test_a_delta_for_the_lm_head_does_not_fit_a_classifier(tmp_path):
    save(tmp_path / "x.pt", attach(BitFit(), base()))
    with pytest.raises(ValueError, match="misses head.out.bias, head.out.weight|another base"):
        load(tmp_path / "x.pt", base(classes=4))


@pytest.mark.parametrize("change", [{"n_head": 4}, {"activation": "relu"}, {"eps": 1e-4}, {"causal": False}],
                         ids=lambda change: next(iter(change)))
def test_a_base_of_equal_parameters_and_another_config_is_another_base(change, tmp_path):
    """With other heads the same tensors are another function: a delta for one does not fit the other."""
    save(tmp_path / "x.pt", attach(BitFit(), base()))
    with pytest.raises(ValueError, match="trained on another base"):
        load(tmp_path / "x.pt", base(config=replace(GPT, **change)))


@pytest.mark.points(1, "saving")
def test_another_base_is_refused_and_both_fingerprints_are_named(tmp_path):
    model = attach(BitFit(), base())
    save(tmp_path / "x.pt", model)
    mine, other = model.base_fingerprint[:12], fingerprint(own_parameters(base(seed=1)), GPT)[:12]
    with pytest.raises(ValueError, match=f"another base .fingerprint {mine}, this base has {other}"):
        load(tmp_path / "x.pt", base(seed=1))


def test_a_file_of_format_1_still_loads_and_a_warning_says_that_it_proves_less(tmp_path):
    """Its fingerprint covers the parameters of the base and not the Config."""
    model = attach(LoRA(rank=2), base(classes=4))
    stir(trainable(model).values())
    torch.save({"format": 1, "method": "lora", "settings": asdict(model.delta), "classes": 4,
                "base": fingerprint(own_parameters(base())), "notes": {},
                "tensors": {name: p.detach() for name, p in trainable(model).items()}}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="x.pt: an older file, which proves its base's parameters but not its Config"):
        again = load(tmp_path / "x.pt", base())
    assert torch.equal(again(IDS), model(IDS))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="trained on another base"):
        load(tmp_path / "x.pt", base(seed=1))


def test_a_file_of_format_2_loads_without_a_warning(tmp_path, recwarn):
    save(tmp_path / "x.pt", attach(BitFit(), base()))
    load(tmp_path / "x.pt", base())
    assert not recwarn.list


@pytest.mark.points(1, "saving")
def test_copying_is_strict():
    def targets():
        return {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2, 3))}

    one, two = torch.ones(2), torch.full((2, 3), 2.0)
    found = targets()
    copy_into(found, {"b": two, "a": one}, "f.pt")
    assert torch.equal(found["a"], one) and torch.equal(found["b"], two), "by name, in any order"
    for tensors, message in (
        ({"a": one}, r"f.pt misses b \(1 in all\)"),
        ({}, r"f.pt misses a, b \(2 in all\)"),
        ({"a": one, "b": two, "d": one, "c": one}, r"f.pt has a surplus of c, d \(2 in all\)"),
        ({"a": one, "b": two.t()}, r"f.pt: b is \(3, 2\), not \(2, 3\)"),
        ({"a": torch.ones(1), "b": two}, r"f.pt: a is \(1,\), not \(2,\)"),            # would broadcast
        ({"a": one.int(), "b": two}, r"f.pt: a is torch.int32, not torch.float32"),
    ):
        said = "no error"
        try:
            copy_into(targets(), tensors, "f.pt")
        except Refused as error:
            said = str(error)
        assert re.search(message, said), f"{said}; expected: {message}"


# ---- merge ----

@pytest.mark.points(2, "saving")
def test_merging_freezes_everything_and_leaves_a_base_for_a_new_delta():
    model = attach(LoRA(rank=2), base(classes=4))
    stir(trainable(model).values())
    expected = model(IDS)
    plain = merge(copy.deepcopy(model))
    same(plain(IDS), expected, "the merged model answers alike", atol=1e-5)
    assert not trainable(plain) and plain.delta is None, "nothing is attached any more"
    with pytest.raises(ValueError, match="nothing to merge.* merged already"):
        merge(plain)
    again = attach(BitFit(), plain)
    assert torch.equal(again(IDS), plain(IDS))
    assert again.base_fingerprint != model.base_fingerprint, "it is another base now"


def test_a_plain_model_has_nothing_to_merge():
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(base().requires_grad_(False))


@pytest.mark.points(1, "deltas")
def test_a_technique_whose_merged_model_is_not_the_base_again_cannot_be_merged():
    """The default `merge` returns the model as it is; a toy that has left its vector there is refused by name."""
    model = attach(Toy(), base(classes=4))
    with pytest.raises(ValueError, match="cannot be merged: prompt.vector is left, which is not the base's own"):
        merge(model)
    assert list(trainable(model)) == ["prompt.vector", "head.out.weight", "head.out.bias"], "the refusal did nothing"


def test_a_merged_model_of_other_shapes_is_refused_too():
    class Shorter(Toy):
        def merge(self, model):
            model.prompt = nn.Identity()
            model.positions = nn.Embedding(15, 12)
            return model

    with pytest.raises(ValueError, match="cannot be merged: positions.weight"):
        merge(attach(Shorter(), base()))


@pytest.mark.points(1, "saving")
def test_merging_works_in_float32_whatever_the_base_is_stored_in():
    model = attach(LoRA(rank=2), base(config=BERT))
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    assert {p.dtype for p in merge(model).parameters()} == {torch.float32}
