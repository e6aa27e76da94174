"""A new technique is one file and one line: what works with it, without a change anywhere else.

The technique is (IA)³ of Liu et al. 2022, a solution of the course: three vectors a block that scale keys, values and
the mlp's inner state. tests/test_cards.py has what it computes, and the laws.
"""

import csv
import inspect
import json
import sys

import pytest

import deltas
import train
from lab import compare, costs, score
from test_cards import added

SHORT = ["--base", "gpt-xs", "--steps", "3", "--examples", "12", "--batch_size", "4", "--device", "cpu"]
TRAINED = 2 * (48 + 48 + 192)  # of gpt-xs: two blocks, keys, values and the inner state of the mlp


@pytest.fixture
def ia3():
    with added("ia3") as kind:
        yield kind


def train_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "ia3", *map(str, words)])
    train.main()


def test_it_is_a_page_and_listed_by_its_name(ia3):
    assert len(inspect.getsource(sys.modules[ia3.__module__]).splitlines()) <= 60
    assert deltas.methods()["ia3"] is ia3


def test_the_command_line_trains_checks_saves_and_scores_it(ia3, tmp_path, monkeypatch, capsys, few_examples):
    with pytest.raises(SystemExit, match="0"):
        train_main(monkeypatch, "--help")
    told = capsys.readouterr().out
    assert "(IA)³: learned scales" in told and "--no-mlp" in told and "scale the inner state of the mlp too" in told
    train_main(monkeypatch, *SHORT, "--scratch", "--no_baseline", "--out", tmp_path)
    told = capsys.readouterr().out
    for line in ("IA3(mlp=True), 3 steps", "identical bit for bit", f"delta {TRAINED} ", f"formula {TRAINED}: agrees",
                 "delta: 6 of 6 tensors have moved"):
        assert line in told, f"{line}: not in\n{told}"
    record = json.loads((tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (record["method"], record["delta_params"], record["lr"]) == ("ia3", TRAINED, 1e-2), "what is kept"
    assert "methods/ia3.py" in record["content"], "a result rests on the technique's file"
    score.main([str(tmp_path / record["file"]), "--merge"])
    assert f"{record['score']:.1f}" in capsys.readouterr().out, "the saved delta, merged, scores as the run said"
    train_main(monkeypatch, *SHORT, "--scratch", "--no_baseline", "--no-mlp", "--explain")
    assert "delta 192 " in capsys.readouterr().out, "its own option: keys and values alone"


def test_compare_trains_it_beside_full_fine_tuning(ia3, tmp_path, capsys, few_examples):
    compare.main(["--methods", "ia3", *SHORT, "--seeds", "1", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "compare.csv").read_text(encoding="utf-8").splitlines()))
    row = next(row for row in rows if row["technique"] == "ia3")
    assert (row["family"], row["trained"]) == ("reparameterisation", str(TRAINED))
    assert float(row["merged"]) > 0, "it is timed merged, too"
    assert row["command"].startswith("python train.py --method ia3 ")


def test_costs_counts_it_at_real_size(ia3, capsys):
    costs.main(["--method", "ia3", "--model", "gpt2"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ia3 "))
    assert f"{12 * (2 * 768 + 3072):,}" in line and "agrees" in line, "L (2 d + f)"
