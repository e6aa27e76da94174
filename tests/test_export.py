"""`eval.py export`: a delta as a folder that the other side loads by the lines it prints; what cannot cross says why.

The merged model is read back by transformers, in float64 to 1e-10, for every technique that merges.
"""

import json
import os
import re
import shutil
import sys

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
extras = "pip install -r requirements-extra.txt"
pytest.importorskip("safetensors", reason=extras)
transformers = pytest.importorskip("transformers", reason=extras)
pytest.importorskip("peft", reason=extras)

from safetensors.torch import load_file

from data import checkpoints
from data.bases import load_base
from deltas import attach, merge, methods, save
from lab import export
from methods.lora import LoRA
from model import Refused
from test_checkpoints import BARE, CLASSES, FAMILIES, HEADS, close, configure, text
from test_peft import based, logits, poolerless, tuned
from tiny import stir

transformers.logging.set_verbosity_error()
MERGING = {"full": {}, "last_layer": {}, "bitfit": {}, "lora": {"rank": 2}, "intrinsic": {"dim": 9},
           "mask": {"k": 50, "by": "magnitude"}}


def exported(capsys, *words):
    """What the printed lines of Python make."""
    export.main([str(word) for word in words])
    found = {}
    exec(capsys.readouterr().out.split("to load it:\n\n")[1], found)
    return found


# ---- the merged model ----

@pytest.mark.parametrize("family, kind, classes, pooler", [
    ("gpt2", HEADS, 0, True), ("bert", HEADS, 0, True), ("roberta", HEADS, 0, True),
    ("gpt2", BARE, 3, True), ("bert", BARE, 3, True), ("bert", BARE, 3, False), ("roberta", BARE, 3, True)])
def test_every_technique_that_merges_is_the_same_model_there(family, kind, classes, pooler, tmp_path):
    base = based(tmp_path / "base", family, kind)
    base = base if pooler else poolerless(base)
    merges = {name for name, made in methods().items() if made.merge is methods()["full"].merge} | {
        "lora", "intrinsic", "mask"}
    assert merges == set(MERGING), "a technique that merges is tested here"
    for name, fields in MERGING.items():
        model = tuned(base, classes=classes, delta=methods()[name](**fields)).double()
        ids, keep = text(family)
        with torch.no_grad():
            before = model(ids, keep)[keep]
        model = merge(model)
        checkpoints.write(tmp_path / name, model, base, list("abc")[:classes])
        found = {}
        exec("\n".join(export.lines(model, base, [], {}, tmp_path / name, adapter=False)), found)
        other = found["model"]
        assert other.dtype == torch.float64 and type(other).__name__ == (CLASSES if classes else HEADS)[family]
        ours, there = logits(model, other, family)
        close(ours, there, atol=1e-10)
        if not classes:
            close(before, there, atol=1e-10)
            config, state = checkpoints.read(tmp_path / name)
            assert config == model.config, "and it is a base of its own"
            assert all(torch.equal(state[key], value.float()) for key, value in model.state_dict().items())


def test_classes_have_their_names_there_and_settings_and_tokenizer_are_the_bases(tmp_path):
    for family in FAMILIES:
        base, folder = based(tmp_path / f"{family} base", family, BARE), tmp_path / family
        configure(base, torch_dtype="float16", _name_or_path="elsewhere", id2label={"0": "x"}, attention_dropout=0.3)
        checkpoints.write(folder, merge(tuned(base, classes=3)), base, ["bad", "good", "né"])
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert said["id2label"] == {"0": "bad", "1": "good", "2": "né"} and said["label2id"]["né"] == 2
        assert said["architectures"] == [CLASSES[family]] and said["dtype"] == "float32"
        assert said["attention_dropout"] == 0.3 and not {"torch_dtype", "_name_or_path"} & said.keys()
        words = [path.name for path in folder.iterdir() if path.suffix == ".txt" or path.name == "vocab.json"]
        assert words and all((folder / name).read_bytes() == (base / name).read_bytes() for name in words)
        texts = "bad cab dad"
        assert checkpoints.tokenizer(folder).encode(texts) == checkpoints.tokenizer(base).encode(texts)


def test_a_head_that_is_not_tied_and_the_rows_that_are_never_used_are_written_too(tmp_path):
    for family in FAMILIES:
        base, folder = based(tmp_path / f"{family} base", family, HEADS, tie_word_embeddings=False), tmp_path / family
        model = merge(tuned(base))
        checkpoints.write(folder, model, base)
        other = getattr(transformers, HEADS[family]).from_pretrained(folder)
        close(*logits(model, other, family), atol=1e-10)
        if family == "roberta":  # positions are counted from pad's id + 1
            name = "roberta.embeddings.position_embeddings.weight"
            old, new = (load_file(path / "model.safetensors")[name] for path in (base, folder))
            assert old.shape == new.shape and torch.equal(old[:2], new[:2])


def test_nothing_is_overwritten_least_of_all_the_base(tmp_path):
    base = based(tmp_path / "base", "bert", HEADS)
    model = merge(tuned(base))
    held = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(Refused, match="base: is there already; name a new or an empty folder"):
        checkpoints.write(base, model, base)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == held
    (tmp_path / "empty").mkdir()
    checkpoints.write(tmp_path / "empty", model, base)
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"config.json", "model.safetensors", "vocab.txt"}


def test_a_folder_that_was_stopped_half_way_is_no_checkpoint(tmp_path, monkeypatch):
    base = based(tmp_path / "base", "bert", HEADS)
    monkeypatch.setattr(checkpoints.shutil, "copyfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.write(tmp_path / "half", merge(tuned(base)), base)
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["model.safetensors"]
    with pytest.raises(Refused, match="no config.json"):
        checkpoints.read(tmp_path / "half")


def test_without_safetensors_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(Refused, match="pip install safetensors"):
        checkpoints.store(tmp_path / "x.safetensors", {})


# ---- the command ----

def kept(folder, model, **notes):
    """A delta file of a run on `folder`/base."""
    save(folder / "x.pt", model, **{"base": "base", "data": None, "labels": [], "label_words": None} | notes)
    return folder / "x.pt"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_the_lines_that_are_printed_load_what_was_written(tmp_path, capsys):
    base = based(tmp_path / "base", "bert", BARE)
    model = tuned(base, classes=2)
    file = kept(tmp_path, model, labels=["bad", "it's good"])
    adapter = exported(capsys, file, "-o", tmp_path / "adapter", "--base", base)
    whole = exported(capsys, file, "-o", tmp_path / "whole", "--merge", "--base", base)
    for found in (adapter, whole):
        other = found["model"]
        assert other.config.id2label == {0: "bad", 1: "it's good"} and "words" not in found and not other.training
        close(*logits(model, other, "bert"), atol=1e-5)
        assert found["tokenizer"]("b a")["input_ids"] == checkpoints.tokenizer(base).wrap(
            checkpoints.tokenizer(base).encode("b a"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_a_cloze_is_exported_with_the_tokens_of_its_labels(tmp_path, capsys):
    base = based(tmp_path / "base", "gpt2", HEADS)
    model = tuned(base)
    file = kept(tmp_path, model, labels=["bad", "good"], label_words=[5, 9])
    found = exported(capsys, file, "-o", tmp_path / "out", "--base", base)
    assert found["words"] == {"bad": 5, "good": 9}
    close(*logits(model, found["model"], "gpt2"), atol=1e-5)


def test_a_classifier_of_gpt2_needs_no_bias(tmp_path):
    base = based(tmp_path / "base", "gpt2", BARE)
    model = tuned(base, classes=2)
    torch.nn.init.ones_(model.head.out.bias)
    file = kept(tmp_path, model, labels=["a", "b"])
    for more in ([], ["--merge"]):
        with pytest.raises(Refused, match="x.pt: its classifier has a bias, and GPT-2's in transformers, `score`, has"):
            export.main([str(file), "-o", str(tmp_path / "out"), "--base", str(base), *more])
    assert not (tmp_path / "out").exists()


def test_what_cannot_cross_says_so_and_why(tmp_path):
    base = based(tmp_path / "base", "bert", HEADS)
    for name, fields, plain, merged in (
            ("prompt", {"length": 3}, "PEFT gives a text behind P soft tokens the pos", "a prompt cannot be merged"),
            ("prefix", {"length": 3}, "PEFT gives a text behind P soft tokens the pos", "a prefix cannot be merged"),
            ("adapter", {"bottleneck": 2}, "PEFT has no format for adapters", "an adapter cannot be merged"),
            ("bitfit", {}, "PEFT has no format for bitfit; --merge writes the whole model", None)):
        file = kept(tmp_path, attach(methods()[name](**fields), load_base(str(base))[0]))
        for more, why in (([], plain), (["--merge"], merged)):
            if why:
                with pytest.raises(Refused, match=f"x.pt: {re.escape(why)}"):
                    export.main([str(file), "-o", str(tmp_path / "out"), "--base", str(base), *more])
    assert not (tmp_path / "out").exists()


def test_the_base_must_be_a_folder_and_here(tmp_path):
    little = attach(LoRA(), load_base("gpt-xs")[0])
    for more in ([], ["--merge"]):
        with pytest.raises(Refused, match="its base gpt-xs is this repository's own"):
            export.main([str(kept(tmp_path, little, base="gpt-xs")), "-o", str(tmp_path / "out"), *more])
    base = based(tmp_path / "base", "bert", HEADS)
    file = kept(tmp_path, tuned(base))
    with pytest.raises(Refused, match="its base, <base>, is not here; --base DIR says where it is now"):
        export.main([str(file), "-o", str(tmp_path / "out")])
    other = based(tmp_path / "other", "bert", HEADS, hidden_act="relu")
    with pytest.raises(Refused, match="trained on another base"):
        export.main([str(file), "-o", str(tmp_path / "out"), "--base", str(other)])


def test_random_weights_are_in_no_folder_and_are_written_with_the_model(tmp_path, capsys):
    base = based(tmp_path / "base", "bert", HEADS)
    torch.manual_seed(7)
    model = attach(LoRA(), load_base(str(base), scratch=True)[0])
    stir(p for p in model.parameters() if p.requires_grad)
    file = kept(tmp_path, model, scratch=True, seed=7)
    with pytest.raises(Refused, match="its base is random weights, which are in no folder"):
        export.main([str(file), "-o", str(tmp_path / "out"), "--base", str(base)])
    found = exported(capsys, file, "-o", tmp_path / "out", "--merge", "--base", base)
    shutil.rmtree(base)
    close(*logits(model, found["model"], "bert"), atol=1e-5)
