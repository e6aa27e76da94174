"""train.py as its users meet it: the command line, one run of each technique, the records that are left."""

import json
import math
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import train
from data import tasks, world
from data.tasks import Task
from deltas import attach, fingerprint, methods, read, trainable
from lab import checks, report, results
from lab.score import rebuild
from model import Config, Transformer
from train import Settings

GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20)
SMALL = {"base": "gpt-xs", "scratch": True, "examples": 12, "batch_size": 4, "steps": 4, "device": "cpu"}
each = pytest.mark.parametrize("name", methods())


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
    monkeypatch.setattr(tasks, "SIZES", {"dev": 10, "test": 14})


def settings(name, **change):
    return Settings(methods()[name](), **SMALL | change)


def command(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    train.main()


# ---- the command line ----

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


@each
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
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: [p.grad.zero_() for p in parameters])
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


# ---- results.jsonl ----

def test_a_torn_line_is_passed_over_and_does_not_spoil_the_next(tmp_path):
    assert results.read(tmp_path) == []
    results.append(tmp_path / "new", {"a": 1})
    path = tmp_path / "new" / "results.jsonl"
    with open(path, "a") as file:
        file.write('{"a": 2, "b"')                     # a kill came here
    results.append(tmp_path / "new", {"a": 3})
    assert results.read(tmp_path / "new") == [{"a": 1}, {"a": 3}]
    assert path.read_text().endswith('{"a": 3}\n')


def test_a_record_is_found_by_all_its_settings(tmp_path):
    made = settings("lora")
    for score in (1.0, 2.0):
        results.append(tmp_path, {"score": score, "settings": made.key})
    assert results.find(tmp_path, settings("lora").key)["score"] == 2.0                # the newest
    assert results.find(tmp_path, settings("bitfit").key) is None
    for change in ({"seed": 1}, {"lr": 0.5}, {"steps": 5}, {"steps": None}, {"examples": 13}):
        assert results.find(tmp_path, settings("lora", **change).key) is None, change
    by_epochs = settings("lora", steps=None, epochs=2.0)
    results.append(tmp_path, {"score": 3.0, "settings": by_epochs.key | {"steps": 6}})
    assert results.find(tmp_path, by_epochs.key)["score"] == 3.0                       # steps follow from epochs


def test_nothing_is_run_twice(tmp_path, monkeypatch):
    ran = []

    def run(made, out, say):
        ran.append(made.key)
        return {"score": 30.0, "settings": made.key}

    monkeypatch.setattr(train, "run", run)
    first = train.run_once(settings("lora"), tmp_path)
    assert train.run_once(settings("lora"), tmp_path) == first and len(ran) == 1
    train.run_once(settings("lora", seed=1), tmp_path)
    assert len(ran) == 2 and len(results.read(tmp_path)) == 2
    beside = train.run_once(settings("lora", seed=2), tmp_path, full={"score": 60.0})
    assert (beside["full_score"], beside["relative"]) == (60.0, 0.5)
    assert train.beside({"score": 5.0}, {"score": 0.0}) == {"score": 5.0, "full_score": 0.0, "relative": None}


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


def test_the_task_list_of_the_help_is_the_worlds():
    assert list(world.TASKS) == ["sentiment", "rating", "cuisine", "claim", "describe"]
    assert Path(train.__file__).name == "train.py"
