"""The settings of a run: a field is declared once, what is not given is filled in, and no two share a delta file."""

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

import harness.settings
import train
from data.tasks import Task
from deltas import methods, read, setting
from harness import report
from harness.settings import Settings, arguments, chosen, settings_from, settings_of, settings_typed, several, value
from lab import compare, d90, lowdata, prompts

SMALL = {"base": "gpt-xs", "scratch": True, "examples": 12, "batch_size": 4, "steps": 4, "device": "cpu"}


def settings(name, **change):
    return Settings(methods()[name](), **SMALL | change)


# ---- a field is declared once ----

@dataclass
class More(Settings):
    """A run with one field more; `setting` is all that is ever said about it."""

    smoothing: float = setting(0.1, "how far targets are smoothed", least=0)


def helped(capsys, command, *argv):
    with pytest.raises(SystemExit):
        command([*argv, "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("few_examples")
def test_a_field_is_declared_once(monkeypatch, capsys, tmp_path):
    for place in (harness.settings, compare, d90, lowdata, prompts):
        monkeypatch.setattr(place, "Settings", More)
    for command in (arguments, compare.main, d90.main, lowdata.main, prompts.main):
        assert "--smoothing SMOOTHING how far targets are smoothed [0.1]" in helped(capsys, command), command

    line = "--method bitfit --base gpt-xs --scratch --examples 12 --batch_size 4 --steps 1 --device cpu".split()
    args = arguments([*line, "--smoothing", "0.25"])
    assert chosen(args, More) == SMALL | {"steps": 1, "smoothing": 0.25}
    made = settings_typed(args)
    assert made.smoothing == made.plain["smoothing"] == made.key["smoothing"] == 0.25
    assert made.file != settings_typed(arguments(line)).file, "0.1 is another run"
    with pytest.raises(ValueError, match="smoothing=-1.0: choose 0 or more"):
        settings_typed(arguments([*line, "--smoothing", "-1"]))
    assert value("smoothing", "0.5") == 0.5, "--sweep"

    record = train.run(made, tmp_path, report.quiet)
    assert record["settings"]["smoothing"] == read(tmp_path / record["file"])["notes"]["smoothing"] == 0.25
    assert settings_from(record) == made


def test_every_field_has_a_help_text_and_a_type_that_a_line_can_hold():
    for kind in (Settings, *methods().values()):
        for f in fields(kind)[kind is Settings:]:                                      # all but Settings.delta
            assert f.metadata["help"] and f.type in (int, float, str, bool), (kind, f.name)


# ---- what is given and what is filled in ----

def test_what_is_not_given_is_filled_in():
    lora = methods()["lora"]()
    made = Settings(lora)
    assert (made.base, made.task, made.lr, made.steps, made.epochs) == ("gpt-s", "rating", lora.lr, 300, None)
    real = Settings(lora, base="some/folder")
    assert (real.lr, real.steps, real.epochs) == (lora.lr_real, None, 3.0)
    assert (made.evaluations, real.evaluations) == (15, 6)
    assert (Settings(lora, epochs=2.0).steps, Settings(lora, steps=7).epochs) == (None, None)
    assert Settings(lora, lr=0.25).lr == 0.25
    assert Settings(lora, data="some/where/mine").task == "mine"
    assert made.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_value_that_makes_no_sense_is_named():
    wrong = [(name, number, "choose a number above 0")
             for name in ("examples", "steps", "epochs", "batch_size", "lr") for number in (0, -1)]
    wrong += [("lr", math.nan, "choose a finite number"), ("epochs", math.inf, "choose a finite number"),
              ("steps", 2.5, "choose a whole number"), ("seed", "one", "choose a whole number"),
              ("scratch", 1, "choose true or false"), ("dtype", "int8", "choose float32 or bfloat16"),
              ("device", "tpu", "choose cpu or cuda")]
    for name, given, why in wrong:
        with pytest.raises(ValueError, match=re.escape(f"{name}={given!r}: {why}")):
            settings("lora", **{name: given})


def test_epochs_become_steps_on_a_copy_and_stay_epochs_in_the_key():
    """A pass over 10 examples, 4 in a step, is 3 steps."""
    task = Task("t", [None] * 10, [], [])
    for epochs, batch_size, steps in ((1.0, 4, 3), (2.0, 4, 6), (0.5, 4, 2), (0.01, 4, 1), (3.0, 10, 3)):
        given = settings("lora", steps=None, epochs=epochs, batch_size=batch_size)
        before = replace(given)
        done = given.completed(task)
        assert (done.steps, done.epochs, done.lr, done.delta) == (steps, None, given.lr, given.delta), epochs
        assert given == before and (given.key["steps"], given.key["epochs"]) == (None, epochs)
    assert settings("lora").completed(task) == settings("lora")


def test_another_technique_in_the_same_setting_has_its_own_learning_rate():
    full = methods()["full"]()
    assert settings("lora", lr=0.5, seed=3).with_delta(full) == settings("full", seed=3)
    assert settings("full", seed=3).lr == full.lr


def test_bfloat16_is_for_forward_passes():
    for dtype, found in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with settings("lora", dtype=dtype).precision():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == found


# ---- what tells runs apart ----

def test_two_settings_never_share_a_delta_file(tmp_path):
    """Whatever is changed, the name of the file is another one: a field of the run, one of the technique, a byte."""
    changed = {"delta": methods()["lora"](rank=4), "base": "gpt-s", "task": "claim", "data": str(tmp_path),
               "examples": 13, "steps": 5, "epochs": 2.0, "batch_size": 5, "lr": 0.5, "head_lr": 0.5, "seed": 1,
               "dtype": "bfloat16", "scratch": False}
    assert {*changed, "device"} == {f.name for f in fields(Settings)}, "a field is missing here"
    first = settings("lora").file
    assert re.fullmatch(r"lora-gpt-xs-rating-[0-9a-f]{12}\.pt", first) and first == settings("lora").file
    files = {first: "as it was"}
    for name, given in changed.items():
        other = replace(settings("lora"), **{name: given}).file
        assert other not in files, f"{name} and {files[other]}"
        files[other] = name

    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tmp_path / "train.tsv", tmp_path / "template.json", folder / "config.json", folder / "vocab.txt"):
        for written in ("a", "b"):
            path.write_text(written, encoding="utf-8")
            other = settings("lora", data=str(tmp_path), base=str(folder)).file
            assert other not in files, f"{path.name} and {files[other]}"
            files[other] = f"{path.name}, {written}"


def test_what_is_kept_names_folders_without_their_paths(tmp_path, monkeypatch):
    """Two `model` in two folders are told apart by what they hold; `where` says how to find them again."""
    monkeypatch.chdir(tmp_path)
    for side in ("one", "two"):
        (tmp_path / side / "model").mkdir(parents=True)
        (tmp_path / side / "model" / "config.json").write_text(side, encoding="utf-8")
    one, two = (settings("lora", base=f"{side}/model", data="mine") for side in ("one", "two"))
    assert one.plain == two.plain and one.plain["base"] == "model" and one.plain["data"] == "mine"
    assert one.key["content"]["base"] != two.key["content"]["base"]
    assert {n for n in one.key["content"] if one.key["content"][n] != two.key["content"][n]} == {"base"}
    assert one.where == {"base": str(Path("one/model").resolve()), "data": str(Path("mine").resolve())}
    assert settings_from({"settings": one.plain, "where": one.where}) == one


# ---- settings from a flat choice, and from text ----

def test_a_flat_choice_is_sorted_into_technique_and_run():
    assert settings_of("lora", rank=4, **SMALL) == Settings(methods()["lora"](rank=4), **SMALL)
    with pytest.raises(ValueError, match="bitfit has no 'rank', and neither has training"):
        settings_of("bitfit", rank=4)


def test_a_field_is_read_from_text_by_its_type():
    read_as = {"rank": ("8", 8), "lr": ("1e-3", 1e-3), "task": ("claim", "claim"), "mlp": ("False", False)}
    assert {name: value(name, text) for name, (text, _) in read_as.items()} == {n: v for n, (_, v) in read_as.items()}
    for name, text, why in (("magic", "1", "'magic' is no field: choose from alpha, "),
                            ("rank", "x", "rank=x: rank is a whole number"), ("lr", "x", "lr=x: lr is a number"),
                            ("mlp", "maybe", "mlp=maybe: mlp is true or false")):
        with pytest.raises(ValueError, match=re.escape(why)):
            value(name, text)
    assert several(int)("8,16") == [8, 16] and several(int).__name__ == "list of int"
