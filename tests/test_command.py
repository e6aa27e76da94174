"""train.py as it is typed: what the command line takes, refuses, explains, trains and prints."""

import re
import sys
from dataclasses import fields

import pytest
import torch

import train
from data import tasks, world
from deltas import methods
from harness import boundary, results
from harness.settings import Settings, arguments, first_line, settings_typed
from methods.lora import LoRALinear
from model import Refused

pytestmark = pytest.mark.usefixtures("few_examples")
SMALL = "--base gpt-xs --scratch --examples 12 --batch_size 4 --steps 3 --device cpu"


def command(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    boundary.run(train.main)


def ended(capsys, function, *arguments):
    """(exit code, what was printed) of a call that ends the program."""
    with pytest.raises(SystemExit) as done:
        function(*arguments)
    out = capsys.readouterr()
    return done.value.code, out.out + out.err


# ---- options ----

def test_help_lists_the_techniques_with_a_line_each_and_every_field_of_a_run(capsys):
    code, text = ended(capsys, arguments, ["--help"])
    assert code == 0 and ", ".join(world.TASKS) in " ".join(text.split())
    for name, kind in methods().items():
        assert re.search(rf"^  {name} +{re.escape(first_line(kind))}$", text, re.M), name
    for f in fields(Settings)[1:]:
        assert re.search(rf"--{f.name}\b", text), f.name
    assert "--bottleneck" not in text and "--dim" not in text


def test_help_for_a_technique_shows_its_docstring_and_only_its_fields(capsys):
    own = {name: {f.name for f in fields(kind)} for name, kind in methods().items()}
    for name, mine in own.items():
        code, text = ended(capsys, arguments, ["--method", name, "--help"])
        assert code == 0 and sys.modules[f"methods.{name}"].__doc__.splitlines()[0] in text
        listed = {field for field in set().union(*own.values()) if re.search(rf"--{field}(?![\w-])", text)}
        assert listed == mine and "--batch_size" in text, name


def test_what_is_not_typed_is_the_default():
    for name, kind in methods().items():
        assert settings_typed(arguments(["--method", name])) == Settings(kind()), name


def test_options_are_spelled_with_underscores_or_hyphens():
    for options in (["--batch_size", "8", "--no_baseline"], ["--batch-size", "8", "--no-baseline"]):
        args = arguments(["--method", "bitfit", *options])
        assert args.batch_size == 8 and args.no_baseline
    made = settings_typed(arguments("--method lora --rank 4 --lr 0.5 --alpha 2".split()))
    assert made == Settings(methods()["lora"](rank=4, alpha=2.0), lr=0.5)
    assert not settings_typed(arguments("--method adapter --no-norms".split())).delta.norms


def test_a_bad_value_ends_with_a_line_that_names_it_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for line, why in {
            "": "--method", "--method magic": "invalid choice: 'magic'", "--method lora --dtype int8": "'int8'",
            "--method lora --steps 0": "'0' is not a whole", "--method lora --batch_size two": "'two' is not a whole",
            "--method lora --lr fast": "invalid float value: 'fast'", "--method lora --lr 0": "lr=0.0: choose a number",
            "--method lora --lr nan": "lr=nan", "--method lora --epochs -1": "epochs=-1.0",
            "--method lora --dim 3": "unrecognized arguments: --dim 3", "--method lora --rank 0": "rank=0",
            "--method bitfit --only gains": "'gains'", "--method lora --base gpt-9": "base 'gpt-9'",
            "--method lora --task tea --scratch": "task 'tea': choose from",
            "--method lora --data nowhere/at/all --scratch": "no such folder",
            "--method last_layer --k 9 --base gpt-xs --scratch": "this model has 2 blocks",
            "--method lora --steps 3 --epochs 2": "--epochs 2.0 and --steps 3: name one of them",
            "--method lora --data here --task claim": "--data here and --task claim: name one of them",
            "--method prompt --words 5": "--words 5: it is only read with init=labels"}.items():
        code, text = ended(capsys, command, monkeypatch, line)
        assert code == 2 and why in text.splitlines()[-1], (line, text)
        assert not list(tmp_path.iterdir()), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_says_so(monkeypatch, capsys):
    code, text = ended(capsys, command, monkeypatch, "--method lora --device cuda")
    assert code == 2 and "device='cuda': PyTorch finds no CUDA device here; choose cpu" in text


def test_explain_shows_what_is_trained_and_writes_nothing(monkeypatch, capsys, tmp_path):
    command(monkeypatch, f"--method lora --rank 2 --base gpt-xs --scratch --explain --out {tmp_path}")
    text = capsys.readouterr().out
    assert re.search(r"^blocks\.\*\.attention\.query\.A +\(2, 48\) +TRAINED +blocks 0 to 1$", text, re.M)
    assert re.search(r"^tokens\.weight +\(1024, 48\) +frozen$", text, re.M)
    assert "delta 768" in text                         # 4 L d r = 4 x 2 x 48 x 2
    assert not list(tmp_path.iterdir())


# ---- a command from beginning to end ----

def test_a_breakpoint_stops_in_the_readers_own_delta_and_soon_in_a_training_step(monkeypatch, tmp_path):
    """gpt-s has four blocks with a LoRA at query and value: one pass, for the check of step 0, is eight stops."""
    events, forward, loss, backward = [], LoRALinear.forward, tasks.loss, torch.Tensor.backward
    monkeypatch.setattr(LoRALinear, "forward", lambda self, x: events.append("stop") or forward(self, x))
    monkeypatch.setattr(tasks, "loss", lambda model, *rest: events.append(model.delta.name) or loss(model, *rest))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: events.append("backward") or backward(self))
    command(monkeypatch, f"--method lora --examples 4 --steps 1 --device cpu --out {tmp_path}")
    first = events.index("backward") - 9
    assert events[first:first + 10] == ["lora", *8 * ["stop"], "backward"], "the first training step is the delta's"
    assert first <= 8 and set(events[:first]) == {"stop"}, "nothing but the check comes before it, no memory is counted"
    assert "full" in events[first:], "full fine-tuning comes afterwards"


def test_what_was_typed_trains_and_full_fine_tuning_afterwards_unless_it_is_kept(monkeypatch, capsys, tmp_path):
    line = f"--method bitfit {SMALL} --out {tmp_path}"
    command(monkeypatch, line)
    text = capsys.readouterr().out
    alone, full, bitfit = results.read(tmp_path)
    assert [(r["method"], r["steps"]) for r in (alone, full, bitfit)] == [("bitfit", 3), ("full", 3), ("bitfit", 3)]
    assert alone["full_score"] is None and alone["relative"] is None, "written when the run ended"
    assert full["full_score"] == full["score"] and full["relative"] == 1.0 and full["lr"] == methods()["full"].lr
    share = bitfit["score"] / full["score"]
    assert bitfit == alone | {"full_score": full["score"], "relative": share}, "written again: the newest counts"
    for words in ("full fine-tuning, to compare with", "step      3/3", f"bitfit reaches {100 * share:.1f} % of full"):
        assert words in text
    for name, number in (("majority class", bitfit["majority_score"]), ("frozen base", bitfit["frozen_score"]),
                         ("bitfit", bitfit["score"]), ("full fine-tuning", full["score"])):
        assert re.search(rf"^{name} +{number:.1f}\b", text, re.M), name
    assert text.splitlines()[-1] == f"python eval.py score {tmp_path / bitfit['file']}"

    command(monkeypatch, line)                                                         # full is kept, bitfit trains
    assert [r["method"] for r in results.read(tmp_path)[3:]] == ["bitfit", "bitfit"]
    assert results.read(tmp_path)[4]["relative"] == share and "bitfit reaches" in capsys.readouterr().out
    command(monkeypatch, line + " --no-baseline --seed 5")
    assert [(r["seed"], r["relative"]) for r in results.read(tmp_path)[5:]] == [(5, None)]


def test_a_data_folder_called_corpus_is_compared_as_any_other_and_pretraining_with_nothing(monkeypatch, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("text\tlabel\n" + "a fine film\t1\na dull film\t0\n" * 6, encoding="utf-8")
    command(monkeypatch, f"--method bitfit --data {folder} {SMALL} --out {tmp_path}")
    assert [(r["method"], r["task"]) for r in results.read(tmp_path)] == [
        ("bitfit", "corpus"), ("full", "corpus"), ("bitfit", "corpus")]
    command(monkeypatch, f"--method bitfit --task corpus {SMALL} --out {tmp_path / 'pretraining'}")
    assert [r["method"] for r in results.read(tmp_path / "pretraining")] == ["bitfit"]


def test_a_learning_rate_that_is_too_high_ends_with_a_line_that_names_it(monkeypatch, capsys, tmp_path):
    code, text = ended(capsys, command, monkeypatch, f"--method lora --lr 1e30 {SMALL} --out {tmp_path}")
    assert code == 2 and re.search(r"that are NaN or infinite at step 1: lower --lr \(it is 1e\+30\)$", text.strip())
    assert results.read(tmp_path) == []


def test_fresh_is_handed_on_to_the_run_that_was_typed(monkeypatch, capsys):
    handed = []

    def run(settings, out, fresh):
        handed.append(fresh)
        raise Refused("enough")
    monkeypatch.setattr(train, "run", run)
    for option in ("", "--fresh"):
        ended(capsys, command, monkeypatch, f"--method lora {SMALL} {option}")
    assert handed == [False, True]
