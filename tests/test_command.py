"""train.py as it is typed: what the command line takes, refuses, explains and prints."""

import re
import sys
from dataclasses import fields

import pytest
import torch

import train
from data import world
from deltas import methods
from lab import results

pytestmark = pytest.mark.usefixtures("few_examples")


def command(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    train.main()


def shown(capsys, *argv):
    with pytest.raises(SystemExit) as done:
        train.arguments(list(argv))
    out = capsys.readouterr()
    return done.value.code, out.out + out.err


def test_help_lists_the_techniques_with_a_line_each(capsys):
    code, text = shown(capsys, "--help")
    assert code == 0
    for name, kind in methods().items():
        assert re.search(rf"^  {name} +\S.*", text, re.M), name
        assert train.first_line(kind) in text
    assert all(f"--{option}" in text for option in train.choices())
    assert "--bottleneck" not in text and "--dim" not in text
    assert ", ".join(world.TASKS) in " ".join(text.split())


@pytest.mark.parametrize("name", methods())
def test_help_for_a_technique_shows_its_docstring_and_only_its_fields(name, capsys):
    code, text = shown(capsys, "--method", name, "--help")
    assert code == 0 and sys.modules[f"methods.{name}"].__doc__.splitlines()[0] in text
    mine = {f.name for f in fields(methods()[name])}
    others = {f.name for kind in methods().values() for f in fields(kind)} - mine
    assert all(f"--{field}" in text for field in mine)
    assert not any(re.search(rf"--{field}(?![\w-])", text) for field in others)
    assert "--batch_size" in text


def test_every_field_has_a_help_text_a_type_and_its_default_on_the_command_line():
    for name, kind in methods().items():
        _, args, _ = train.arguments(["--method", name])
        for f in fields(kind):
            assert f.metadata["help"] and f.type in (int, float, str, bool)
            assert getattr(args, f.name) == f.default
        assert train.settings_from(args, kind).delta == kind()


def test_options_are_spelled_with_underscores_or_hyphens():
    for options in (["--batch_size", "8", "--no_baseline"], ["--batch-size", "8", "--no-baseline"]):
        _, args, _ = train.arguments(["--method", "bitfit", *options])
        assert args.batch_size == 8 and args.no_baseline
    kinds = methods()
    _, args, _ = train.arguments(["--method", "lora", "--rank", "4", "--lr", "0.5", "--alpha", "2"])
    made = train.settings_from(args, kinds["lora"])
    assert made.delta == kinds["lora"](rank=4, alpha=2.0) and made.lr == 0.5
    _, args, _ = train.arguments(["--method", "adapter", "--no-norms"])
    assert not train.settings_from(args, kinds["adapter"]).delta.norms


@pytest.mark.parametrize("line, why", [
    ("", "--method"), ("--method magic", "invalid choice: 'magic'"), ("--method lora --examples -3", "--examples"),
    ("--method lora --steps 0", "'0' is not a whole"), ("--method lora --batch_size two", "'two' is not a whole"),
    ("--method lora --lr fast", "invalid float value: 'fast'"), ("--method lora --lr 0", "lr=0.0: choose a number"),
    ("--method lora --lr nan", "lr=nan"), ("--method lora --epochs -1", "epochs=-1.0"),
    ("--method lora --dtype int8", "'int8'"),
    ("--method lora --dim 3", "unrecognized arguments: --dim 3"), ("--method lora --rank 0", "rank=0"),
    ("--method bitfit --only gains", "only='gains'"), ("--method lora --base gpt-9", "base 'gpt-9'"),
    ("--method lora --task tea --scratch", "task 'tea': choose from"),
    ("--method lora --data nowhere/at/all --scratch", "no such folder"),
    ("--method last_layer --k 9 --base gpt-xs --scratch --no_baseline", "this model has 2 blocks"),
])
def test_a_bad_value_ends_with_a_line_that_names_it(monkeypatch, capsys, line, why, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        command(monkeypatch, line)
    assert done.value.code == 2 and why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_says_so(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "--method lora --device cuda")
    assert "device='cuda': PyTorch finds no CUDA device here; choose cpu" in capsys.readouterr().err


def test_explain_shows_what_is_trained_and_writes_nothing(monkeypatch, capsys, tmp_path):
    command(monkeypatch, f"--method lora --rank 2 --base gpt-xs --scratch --explain --out {tmp_path}")
    text = capsys.readouterr().out
    assert re.search(r"blocks\.\*\.attention\.query\.A +\(2, 48\) +TRAINED +blocks 0 to 1", text)
    assert re.search(r"tokens\.weight +\(1024, 48\) +frozen", text)
    assert "delta 768" in text                         # 4 L d r = 4 x 2 x 48 x 2
    assert not list(tmp_path.iterdir())


def test_a_command_trains_compares_and_names_the_next_command(monkeypatch, capsys, tmp_path):
    line = (f"--method bitfit --base gpt-xs --scratch --examples 12 --batch-size 4 --steps 3 --device cpu "
            f"--out {tmp_path}")
    command(monkeypatch, line)
    text = capsys.readouterr().out
    full, bitfit = results.read(tmp_path)
    assert (full["method"], bitfit["method"]) == ("full", "bitfit")
    assert full["relative"] == 1.0 and full["lr"] == methods()["full"].lr and full["steps"] == 3
    assert bitfit["full_score"] == full["score"]
    assert bitfit["relative"] == (bitfit["score"] / full["score"] if full["score"] else None)
    for words in ("full fine-tuning, to compare with", "majority class", "frozen base", "step      3/3", "stored"):
        assert words in text
    assert text.rstrip().splitlines()[-1] == f"python eval.py score {tmp_path / bitfit['file']}"
    command(monkeypatch, line)                                                         # full is not run again
    assert "is in results.jsonl already" in capsys.readouterr().out
    assert [record["method"] for record in results.read(tmp_path)] == ["full", "bitfit", "bitfit"]
    command(monkeypatch, line + " --no-baseline --seed 5")
    assert [record["seed"] for record in results.read(tmp_path)] == [0, 0, 0, 5]
