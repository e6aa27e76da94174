"""train.py as a program: the settings, the training loop, the self-check, one run of each technique."""

import json
import math
import re

import pytest
import torch

import train
from data import tasks
from data.tasks import Task
from deltas import attach, fingerprint, methods, read, trainable
from lab import checks, report, results
from lab.score import rebuild
from model import Transformer
from tiny import GPT
from train import Settings

SMALL = {"base": "gpt-xs", "scratch": True, "examples": 12, "batch_size": 4, "steps": 4, "device": "cpu"}
each = pytest.mark.parametrize("name", methods())
pytestmark = pytest.mark.usefixtures("few_examples")


def settings(name, **change):
    return Settings(methods()[name](), **SMALL | change)


# ---- settings ----

def test_what_is_not_said_is_filled_in():
    lora = methods()["lora"]()
    made = Settings(lora)
    assert (made.base, made.task, made.lr, made.steps, made.epochs) == ("gpt-s", "rating", lora.lr, 300, None)
    real = Settings(lora, base="some/folder")
    assert (real.lr, real.steps, real.epochs) == (lora.lr_real, None, 3.0)
    assert (Settings(lora, epochs=2.0).steps, Settings(lora, steps=7).epochs) == (None, None)
    assert Settings(lora, lr=0.25).lr == 0.25
    assert Settings(lora, data="some/where/mine").task == "mine"


@pytest.mark.parametrize("name", ["examples", "steps", "epochs", "batch_size", "lr"])
def test_a_number_that_must_be_above_zero_is_named(name):
    for number in (0, -1, math.inf):
        with pytest.raises(ValueError, match=f"{name}={number}: choose a number above 0"):
            settings("lora", **{name: number})


def test_epochs_become_steps():
    task = Task("t", [None] * 10, [], [])
    for epochs, batch_size, steps in ((1.0, 4, 3), (2.0, 4, 6), (0.5, 4, 2), (0.01, 4, 1), (3.0, 10, 3)):
        assert train.steps_for(settings("lora", steps=None, epochs=epochs, batch_size=batch_size), task) == steps


def test_the_key_and_the_file_tell_runs_apart():
    one = settings("lora")
    assert one.key == settings("lora").key and one.file == settings("lora").file
    assert one.key["method"] == "lora" and one.key["rank"] == 8 and one.key["steps"] == 4
    assert re.fullmatch(r"lora-gpt-xs-rating-[0-9a-f]{6}\.pt", one.file)
    others = [settings("lora", **change) for change in (
        {"seed": 1}, {"lr": 0.5}, {"steps": 5}, {"task": "claim"}, {"examples": 13}, {"dtype": "bfloat16"},
        {"batch_size": 5}, {"scratch": False})] + [Settings(methods()["lora"](rank=4), **SMALL)]
    assert len({one.file, *(other.file for other in others)}) == 1 + len(others)


# ---- the training loop ----

class Recorder(torch.optim.AdamW):
    """AdamW that notes what it was given, and the learning rate of each step."""

    made = []

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.options, self.rates = options, []
        Recorder.made.append(self)

    def step(self):
        self.rates.append(self.param_groups[0]["lr"])
        norm = sum((p.grad ** 2).sum() for p in self.param_groups[0]["params"] if p.grad is not None) ** 0.5
        assert norm < 1.001                            # clipped
        super().step()


def toy_run(monkeypatch, steps, scores=None, lr=0.1):
    """Train a BitFit of 17 words for some steps; `scores` are what dev says, one a step."""
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    Recorder.made.clear()
    torch.manual_seed(0)
    model = attach(methods()["bitfit"](), Transformer(GPT))
    rows = [tasks.Example([i, i + 1], [i, 3], "", ["x"]) for i in range(8)]
    task, seen = Task("t", rows, rows, [], metric=""), []
    if scores is not None:
        def dev_score(model, *_):
            seen.append({name: p.detach().clone() for name, p in trainable(model).items()})
            return scores[len(seen) - 1]
        monkeypatch.setattr(tasks, "dev_score", dev_score)
    made = settings("bitfit", steps=steps, lr=lr)
    curve, ms = train.train(model, task, 0, made, report.quiet)
    assert ms > 0
    return model, curve, seen, Recorder.made[0]


def test_the_learning_rate_warms_up_and_falls_in_a_straight_line(monkeypatch):
    """50 steps: 3 of warm-up (6 %), then from 0.1 down, the last of 47 still above zero."""
    _, _, _, optimizer = toy_run(monkeypatch, 50)
    expected = [0.1 / 3, 0.2 / 3, 0.1] + [0.1 * (50 - step) / 47 for step in range(3, 50)]
    assert optimizer.rates == pytest.approx(expected, abs=1e-12)
    _, _, _, optimizer = toy_run(monkeypatch, 1)
    assert optimizer.rates == [0.1]


def test_the_optimiser_holds_what_is_trainable_without_weight_decay(monkeypatch):
    model, _, _, optimizer = toy_run(monkeypatch, 2)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in trainable(model).values()]
    assert optimizer.options == {"lr": 0.1, "weight_decay": 0.0}


def test_the_delta_that_did_best_on_dev_is_what_remains(monkeypatch):
    """Dev says 1, 7, 3, 7, 2: the second step's delta is kept, the earlier of two that are equal."""
    model, curve, seen, _ = toy_run(monkeypatch, 5, scores=[1, 7, 3, 7, 2])
    assert curve == [(1, 1), (2, 7), (3, 3), (4, 7), (5, 2)]
    assert all(torch.equal(p, seen[1][name]) for name, p in trainable(model).items())
    assert not all(torch.equal(seen[1][name], seen[3][name]) for name in seen[1])


def test_dev_is_scored_at_fifteen_points_the_last_step_among_them(monkeypatch):
    _, curve, _, _ = toy_run(monkeypatch, 60)
    assert [step for step, _ in curve] == list(range(4, 61, 4))


def test_training_lowers_the_loss(monkeypatch):
    _, curve, _, _ = toy_run(monkeypatch, 40, lr=0.02)
    assert curve[-1][1] > 1.5 * curve[0][1]            # the probability of the right word, in percent


def test_a_loss_that_is_no_number_ends_the_run(monkeypatch):
    with pytest.raises(SystemExit, match="the loss is nan at step 1: lower --lr .it is 0.1"):
        monkeypatch.setattr(tasks, "loss", lambda model, *_: sum(p.sum() for p in trainable(model).values()) * math.nan)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda ps, _: [p.grad.zero_() for p in ps])
        toy_run(monkeypatch, 3)


def test_the_stream_of_batches_depends_on_the_seed_alone():
    rows = [tasks.Example([i] * (1 + i % 3), [-100] * (i % 3) + [1], "", []) for i in range(10)]

    def epoch(seed, n=3):
        stream = train.endless(rows, 4, 0, seed)
        torch.manual_seed(seed + 100)
        return [next(stream)[0].tolist() for _ in range(n)]

    assert epoch(0) == epoch(0) != epoch(1)
    first, second = epoch(0, 6)[:3], epoch(0, 6)[3:]
    assert sorted(row[0] for batch in first for row in batch) == list(range(10))       # every example once
    assert sorted(row[0] for batch in second for row in batch) == list(range(10)) and first != second


# ---- the self-check ----

def test_the_check_at_the_start_stops_a_delta_that_changes_the_model():
    model, said = attach(methods()["lora"](), Transformer(GPT)), []
    logits = torch.ones(2, 3)
    checks.start(model, logits, logits.clone(), said.append)
    assert "identical bit for bit" in said[0]
    with pytest.raises(AssertionError, match="a new lora moves the logits by up to 0.5"):
        checks.start(model, logits, logits + 0.5, said.append)
    checks.start(attach(methods()["prompt"](), Transformer(GPT)), logits, logits + 0.5, said.append)
    assert "moved by up to 0.5" in said[-1]


def test_the_check_at_the_end_stops_a_frozen_tensor_that_moved():
    model = attach(methods()["bitfit"](), Transformer(GPT))
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    mark, said = train.to_precision(model, "float32"), []
    with torch.no_grad():
        for name, p in trainable(model).items():
            p += name != "final_norm.bias"
    checks.end(model, start, mark, said.append)
    text = "\n".join(said)
    assert f"{len(start) - 1} of {len(start)} tensors have moved" in text
    assert "final_norm.bias has not: it is not on the way" in text and "2 of them are key biases" in text
    with torch.no_grad():
        model.positions.weight[3, 4] += 1e-6
    with pytest.raises(AssertionError, match="a frozen tensor has changed"):
        checks.end(model, start, mark, said.append)


def test_memory_is_counted_by_kind():
    rows = [tasks.Example([1, 2, 3], [-100, -100, 3], "", ["x"])] * 4
    task, MB = Task("t", rows, rows, [], metric=""), 2 ** 20
    found = {}
    for name in ("full", "last_layer", "bitfit"):
        model = attach(methods()[name](), Transformer(GPT))
        found[name] = train.memory_of_a_step(model, task, 0, settings(name))
        trained = 4 * sum(p.numel() for p in trainable(model).values())
        weights = 4 * sum(p.numel() for p in model.parameters())
        parts = [found[name][part] for part in ("weights", "gradients", "optimizer", "activations")]
        assert parts[:3] == pytest.approx([weights / MB, trained / MB, 2 * trained / MB])
        assert found[name]["peak"] == pytest.approx(sum(parts)) and parts[3] > 0
    assert found["last_layer"]["activations"] < found["bitfit"]["activations"] <= found["full"]["activations"]


# ---- runs, their records and files ----

@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{method: (record, what was said, folder)} of one short run of each."""
    patch, found = pytest.MonkeyPatch(), {}
    patch.setattr(tasks, "SIZES", {"dev": 10, "test": 14})
    for name in methods():
        said, out = [], tmp_path_factory.mktemp(name)
        found[name] = train.run(settings(name), out, said.append), "\n".join(said), out
    patch.undo()
    return found


@each
def test_a_run_leaves_a_record_of_just_the_documented_fields(name, ran):
    record, said, out = ran[name]
    listed = [word for line in results.__doc__.splitlines()[2:] if line.startswith("    ")
              for word in line.strip().split("   ")[0].split()]
    assert sorted(record) == sorted(listed)
    assert json.loads(json.dumps(record)).keys() == record.keys()
    kind = methods()[name]
    assert (record["method"], record["base"], record["task"], record["steps"]) == (name, "gpt-xs", "rating", 4)
    assert record["lr"] == kind.lr and record["settings"] == settings(name).key
    assert record["delta_params"] == kind().formula(train.SHAPES["gpt-xs"]) and record["head_params"] == 0
    assert record["delta_percent"] == 100 * record["delta_params"] / record["base_params"]
    assert record["stored_bytes"] == (out / record["file"]).stat().st_size
    assert 0 <= record["score"] <= 100 and record["dev_score"] == max(score for _, score in record["curve"])
    assert record["majority_score"] in (100 * 3 / 14, 100 * 4 / 14)
    assert "formula" in said and "frozen" in said and f"method     {kind()}" in said
    assert (record["full_score"] is None) == (name != "full")


@each
def test_the_saved_file_scores_what_the_run_said(name, ran):
    record, _, out = ran[name]
    notes = read(out / record["file"])["notes"]
    assert notes["score"] == record["score"] and notes["steps"] == 4
    model, tokenizer, task = rebuild(out / record["file"])
    predicted = tasks.predictions(model, task, task.test, tokenizer)
    assert tasks.score(task, task.test, predicted) == record["score"]


def test_the_same_settings_give_the_same_numbers_and_another_seed_others(ran, tmp_path):
    def numbers(record):
        return {k: v for k, v in record.items() if k not in ("seconds", "ms_per_step")}

    for name in ("lora", "prefix"):
        torch.manual_seed(99)                          # whatever happened before
        again = train.run(settings(name), tmp_path, report.quiet)
        assert numbers(again) == numbers(ran[name][0])
        assert fingerprint(read(tmp_path / again["file"])["tensors"]) == \
            fingerprint(read(ran[name][2] / again["file"])["tensors"])
        other = train.run(settings(name, seed=1), tmp_path, report.quiet)
        assert fingerprint(read(tmp_path / other["file"])["tensors"]) != \
            fingerprint(read(tmp_path / again["file"])["tensors"])


@pytest.mark.parametrize("name, change", [
    ("bitfit", {"dtype": "bfloat16"}), ("lora", {"base": "bert-xs", "dtype": "bfloat16"}),
    ("adapter", {"base": "bert-xs"}), ("bitfit", {"task": "describe"}), ("full", {"task": "corpus", "steps": 2}),
])
def test_other_precisions_bases_and_tasks_run_too(name, change, tmp_path):
    record = train.run(settings(name, **change), tmp_path, report.quiet)
    assert record["metric"] == {"describe": "attributes", "corpus": "probability"}.get(change.get("task"), "accuracy")


def test_ones_own_labels_train_a_classifier_beside_the_delta(tmp_path):
    for split in ("train", "dev"):
        rows = [f"{split} {i} {'soup' if i % 2 else 'fish'}\t{i % 2}" for i in range(8)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    for name, base in (("full", "bert-xs"), ("bitfit", "bert-xs"), ("lora", "gpt-xs")):
        record = train.run(settings(name, data=str(tmp_path), base=base), tmp_path / "out", report.quiet)
        width = train.SHAPES[base].d_model
        assert record["task"] == tmp_path.name
        assert record["head_params"] == 2 * width + 2 + (width ** 2 + width if base == "bert-xs" else 0)
        model, tokenizer, task = rebuild(tmp_path / "out" / record["file"])
        assert tasks.score(task, task.dev, tasks.predictions(model, task, task.dev, tokenizer)) == record["score"]
