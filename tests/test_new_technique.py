"""A new technique is one file and one line: what works with it, without a change anywhere else.

The technique is (IA)³ of Liu et al. 2022: three vectors a block that scale keys, values and the mlp's inner state.
"""

import csv
import importlib
import inspect
import json
import sys

import pytest
import torch

import deltas
import methods
import test_laws
import train
from deltas import attach
from lab import compare, costs, score
from tiny import GPT, IDS, same, stirred

IA3 = '''
"""(IA)³: learned scales, from 1 on: (l_k W_k) x, (l_v W_v) x, W_down (l gelu(W_up x)). Count: L (2 d + f)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from deltas import Delta, setting


class Scaled(nn.Module):
    def __init__(self, linear, axis):
        super().__init__()
        self.linear, self.l = linear, nn.Parameter(torch.ones_like(linear.weight.narrow(axis, 0, 1)))

    def forward(self, x):
        return F.linear(x, self.linear.weight * self.l, self.linear.bias)


@dataclass
class IA3(Delta):
    family, lr, lr_real = "reparameterisation", 1e-2, 3e-3
    mlp: bool = setting(True, "scale the inner state of the mlp too")

    def places(self, model):
        places = [(b.attention, name, 1) for b in model.blocks for name in ("key", "value")]
        return places + [(b.mlp, "down", 0) for b in model.blocks if self.mlp]

    def attach(self, model):
        for owner, name, axis in self.places(model):
            setattr(owner, name, Scaled(getattr(owner, name), axis))
        return model

    def formula(self, config):
        return config.n_layer * (2 * config.d_model + config.d_ff * self.mlp)

    def merge(self, model):
        for owner, name, _ in self.places(model):
            getattr(owner, name).linear.weight *= getattr(owner, name).l
            setattr(owner, name, getattr(owner, name).linear)
        return model
'''
SHORT = ["--base", "gpt-xs", "--steps", "3", "--examples", "12", "--batch_size", "4", "--device", "cpu"]
TRAINED = 2 * (48 + 48 + 192)  # of gpt-xs: two blocks, keys, values and the inner state of the mlp


@pytest.fixture
def ia3(tmp_path, monkeypatch):
    """The one file, in a folder of its own; and the one line."""
    (tmp_path / "ia3.py").write_text(IA3.lstrip(), encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(methods, "IA3", importlib.import_module("methods.ia3").IA3, raising=False)
    yield methods.IA3
    del sys.modules["methods.ia3"], methods.ia3


def train_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "ia3", *map(str, words)])
    train.main()


def test_it_is_thirty_lines_and_listed_by_its_name(ia3):
    assert sum(line != "" for line in IA3.splitlines()) <= 30
    assert deltas.methods()["ia3"] is ia3


def test_what_it_computes(ia3):
    """A scale of 2 on one key, on one value and on one inner state is a doubled row or column of their matrix."""
    model, plain = attach(ia3(), stirred(GPT)), stirred(GPT)
    with torch.no_grad():
        for block, twin in zip(model.blocks, plain.blocks):
            block.attention.key.l[5], block.attention.value.l[7], block.mlp.down.l[:, 9] = 2, 2, 2
            twin.attention.key.weight[5] *= 2
            twin.attention.value.weight[7] *= 2
            twin.mlp.down.weight[:, 9] *= 2
    same(model(IDS), plain(IDS), "keys, values and the inner state are scaled")


def test_every_law_holds_for_it_by_its_being_listed(ia3, tmp_path):
    laws = [(law, inspect.signature(law).parameters) for law in vars(test_laws).values() if inspect.isfunction(law)]
    laws = [(law, needs) for law, needs in laws if law.__name__.startswith("test_") and "name" in needs]
    assert len(laws) > 10
    for law, needs in laws:
        law("ia3", **{"tmp_path": tmp_path} if "tmp_path" in needs else {})


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
