"""`eval.py compare`: a row worked out by hand, a small comparison as it is typed, and one that is killed ten times."""

import csv
import json
import math
import random
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import pretend
from data import tasks
from data.bases import SHAPES, load_base
from harness import results
from harness.settings import arguments, settings_of, settings_typed
from lab import compare, forgotten, linear_probe, pictures
from lab.runs import Runs, check
from model import Refused, Transformer
from tiny import BERT, GPT, stirred

ROOT = Path(__file__).parents[1]
CLOCK = "ms/step", "latency", "merged"  # the columns of a table that two equal commands may differ in


@pytest.fixture(scope="module")
def dishes(tmp_path_factory):
    """A task in two small files: what is soup and what is fish."""
    folder = tmp_path_factory.mktemp("the dishes")
    for split, n in (("train", 16), ("dev", 8)):
        rows = [f"the {'soup' if i % 2 else 'fish'} of table {split} {i}\t{i % 2}" for i in range(n)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return folder


def command(dishes, out, *words):
    """The words of a small comparison on `dishes`."""
    return ["--base", "gpt-xs", "--data", str(dishes), "--steps", "6", "--batch-size", "8", "--device", "cpu",
            "--out", str(out), *words]


def table(out):
    with open(out / "compare.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows):
    return [{name: cell for name, cell in row.items() if name not in CLOCK} for row in rows]


# ---- a row by hand ----

def of_run(curve, **more):
    """A record with all that a row is made of."""
    made = settings_of("lora", base="gpt-xs", rank=2, seed=more.get("seed", 0))
    return pretend.record(max(score for _, score in curve), **more) | {
        "curve": curve, "settings": made.plain, "where": made.where}


def test_a_row_says_what_a_technique_reaches_what_it_costs_and_how_soon():
    """Full reaches 80 on dev and 50 on test. 90 % is 72 on dev, after 20 and 40 steps; on test it would be 45."""
    full = [of_run([[20, 80]], test=50.0), of_run([[20, 80]], test=50.0)]
    lora = [of_run([[10, 50], [20, 75], [40, 70]], test=36.0),
            of_run([[10, 60], [20, 70], [40, 72]], test=44.0, seed=1, ms_per_step=10.0)]
    row = compare.row("my lora", lora, full, {"ratio": 1.5, "merged_ratio": None})
    curve, line = row.pop("curve"), row.pop("command")
    assert row == {
        "technique": "my lora", "family": "reparameterisation", "trained": 250, "%": 5.0, "stored B": 1200,
        "score": 40.0, "± sd": pytest.approx(32**0.5), "of full": 80.0, "ms/step": 9.0, "MB": 3.0, "machine": "a CPU",
        "to 90 %": 30, "latency": 1.5, "merged": None, "forgets": None}
    assert curve == [(10, 55), (20, 72.5), (40, 71)]
    assert line == "python train.py --method lora --rank 2 --base gpt-xs"


def test_a_plain_row_has_a_score_and_no_cost():
    assert compare.plain_row("frozen base", 20.0, 50.0) == {
        "technique": "frozen base", "trained": 0, "score": 20.0, "± sd": None, "of full": 40.0}
    assert compare.plain_row("frozen base", 20.0, 0.0)["of full"] is None, "where full fine-tuning scores nothing"


def test_the_command_of_a_row_reads_back_as_the_same_run(dishes, tmp_path):
    (tmp_path / "model").mkdir()
    odd = shutil.copytree(dishes, tmp_path / "a 'b'; touch HACKED $(date)")
    for method, choice in (("bitfit", {"data": str(odd)}),
            ("lora", {"rank": 1, "alpha": 0.0, "lr": 0.5, "seed": 3}), ("full", {"scratch": True, "base": "gpt-xs"}),
            ("intrinsic", {"dim": 64, "per_layer": True, "examples": 50}), ("prefix", {"mlp": True, "steps": 7}),
            ("prefix", {"mlp": True, "lr": 0.1}),
            ("bitfit", {"epochs": 2.5}), ("prompt", {"data": str(dishes), "dtype": "bfloat16"}),
            ("lora", {"base": str(tmp_path / "model")}), ("lora", {"alpha": -1e-5, "seed": -3}),
            ("lora", {"base": str(tmp_path / "model"), "lr": settings_of("lora").lr})):
        made = settings_of(method, **choice)
        line = compare.command({"method": method, "settings": made.plain, "where": made.where})
        assert line.startswith(f"python train.py --method {method}")
        typed = settings_typed(arguments(shlex.split(line)[2:]))
        assert typed.plain == made.plain and typed.where == made.where, line


# ---- the rows that train nothing in the base ----

def test_a_linear_probe_finds_the_direction_that_tells_the_classes_apart():
    torch.manual_seed(0)
    x = torch.tensor([[1.0, 5.0], [-1.0, 5.0], [2.0, 5.0], [-2.0, 5.0]])      # only the first column differs
    layer = linear_probe.fit(x, torch.tensor([1, 0, 1, 0]), 2, penalty=1e-3)
    assert layer(x).argmax(dim=1).tolist() == [1, 0, 1, 0]
    first, second = (layer.weight[1] - layer.weight[0]).tolist()
    assert first > 1 and abs(second) < 1e-2
    closer = linear_probe.fit(x, torch.tensor([1, 0, 1, 0]), 2, penalty=1.0)
    assert closer.weight.norm() < layer.weight.norm() / 2, "a larger penalty, smaller weights"


def test_a_linear_probe_reads_the_states_at_the_targets():
    """Three texts of 3, 4 and 2 tokens with the label words 5 and 6; the states come in the order of lengths."""
    model = stirred(GPT)
    texts = [[3, 1, 4], [1, 5, 9, 2], [6, 5]]
    rows = [tasks.Example(ids, tasks.only(word, len(ids) - 1, len(ids)), "", []) for ids, word in zip(texts, (6, 5, 6))]
    head = model.head
    found, labels = linear_probe.states(model, tasks.Task("", [], [], [], labels=["a", "b"], words=[5, 6]), rows, 0)
    assert labels.tolist() == [1, 1, 0] and model.head is head
    for state, ids in zip(found, ([6, 5], [3, 1, 4], [1, 5, 9, 2])):
        torch.testing.assert_close(head(state), model(torch.tensor([ids]))[0, -1], rtol=0, atol=1e-8)


def test_a_linear_probe_reads_what_the_classifier_reads_or_the_mean_of_all_states():
    """Two texts of 3 and 2 tokens, padded; BERT's pooler stands before the Classifier, and not before a mean."""
    model = stirred(BERT, classes=2)
    texts = [[3, 1, 4], [6, 5]]
    rows = [tasks.Example(ids, tasks.only(n, 0, len(ids)), "", []) for n, ids in enumerate(texts)]
    task, seen = tasks.Task("", [], [], [], labels=["a", "b"]), []
    (read, labels), (averaged, _) = (linear_probe.states(model, task, rows, 0, average) for average in (False, True))
    assert labels.tolist() == [1, 0], "the shorter text comes first"
    model.blocks[-1].register_forward_hook(lambda block, inputs, output: seen.append(output))
    for x, mean, ids in zip(read, averaged, ([6, 5], [3, 1, 4])):
        torch.testing.assert_close(model.head(x), model(torch.tensor([ids]))[0, 0], rtol=0, atol=1e-8)
        torch.testing.assert_close(mean, sum(seen.pop()[0]) / len(ids), rtol=0, atol=1e-8)


def test_dev_picks_the_penalty_of_a_linear_probe_and_test_is_its_score(monkeypatch, few_examples):
    found = {1e-4: (60, 90), 1e-3: (80, 30), 1e-2: (80, 40), 1e-1: (70, 95)}

    def fit(x, y, classes, penalty):
        layer = torch.nn.Linear(x.shape[1], classes)
        layer.penalty = penalty
        return layer
    monkeypatch.setattr(linear_probe, "fit", fit)
    monkeypatch.setattr(linear_probe, "accuracy",
                        lambda layer, x, *_: found[layer.penalty][len(x) == 14])  # test is 14 texts, dev is 10
    settings = settings_of("full", base="gpt-xs", examples=8, device="cpu")
    assert linear_probe.fitted(settings) == {"score": 30, "dev_score": 80, "delta_params": 4 * (48 + 1)}

    asked, states = [], linear_probe.states
    monkeypatch.setattr(linear_probe, "states", lambda model, *more: asked.append(len(model.blocks)) or states(
        model, *more))
    linear_probe.fitted(settings, depth=1)
    assert asked == [1, 1, 1] and SHAPES["gpt-xs"].n_layer == 2, "on top of the lower block"


# ---- latency ----

def test_latency_is_a_forward_pass_over_the_bases(monkeypatch, few_examples, tmp_path):
    """The clock of this machine advances by a model's parameters in every pass: LoRA's are gone once it is merged."""
    clock, forward = [0], Transformer.forward

    def slow(model, *inputs, **named):
        clock[0] += sum(p.numel() for p in model.parameters())
        return forward(model, *inputs, **named)
    monkeypatch.setattr(Transformer, "forward", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    base = sum(p.numel() for p in Transformer(SHAPES["gpt-xs"]).parameters())
    for method, choice, merged in (("lora", {"rank": 3}, 1.0), ("prompt", {"length": 5}, None)):
        made = settings_of(method, base="gpt-xs", task="sentiment", examples=2, device="cpu", **choice)
        record = {"settings": made.plain, "where": made.where}
        found = compare.latency(Runs(tmp_path, say=str), record)
        larger = base + made.delta.formula(SHAPES["gpt-xs"])
        assert (found["ratio"], found["merged_ratio"]) == (pytest.approx(larger / base, rel=1e-12), merged)


# ---- what is forgotten ----

def test_what_is_forgotten_is_the_rise_of_the_pretraining_loss(monkeypatch, tmp_path):
    """A word of the corpus has the probability 1/2 before and 1/8 with the delta on: log 4 nats more."""
    monkeypatch.setattr(forgotten, "rebuild", lambda path: ("delta on", None, None))
    monkeypatch.setattr(forgotten, "load_base", lambda name: ("plain", None))
    monkeypatch.setattr(forgotten, "nats", lambda model, tokenizer: math.log({"plain": 2, "delta on": 8}[model]))
    record = pretend.record(50) | {"settings": {"method": "lora"}, "content": {}}
    assert forgotten.forgotten(Runs(tmp_path, say=str), record) == pytest.approx(math.log(4), rel=1e-12)


def test_a_step_that_is_next_to_nothing_forgets_nothing_and_a_huge_one_all(tmp_path):
    runs = Runs(tmp_path, 1, str, base="gpt-xs", examples=4, steps=1)
    small, huge = (compare.forgets(runs, runs.trial("full", lr=lr)[0]) for lr in (1e-9, 1.0))
    assert abs(small) < 1e-3 < 3 < huge
    (tmp_path / runs.trial("full", lr=1.0)[0]["file"]).unlink()
    assert compare.forgets(runs, runs.trial("full", lr=1.0)[0]) is None, "the file is gone"


def test_a_base_has_the_loss_that_its_pretraining_ended_with():
    """gpt-xs gives a word of unseen documents a typical probability of some 80 %; weights at zero give one in 1,024."""
    model, tokenizer = load_base("gpt-xs")
    assert 0.2 < forgotten.nats(model, tokenizer) < 0.25
    for p in model.parameters():
        p.data.zero_()
    assert forgotten.nats(model, tokenizer) == pytest.approx(math.log(1024), rel=1e-6)


# ---- the command ----

def test_a_cell_has_as_many_digits_as_its_column():
    assert [compare.shown(name, 1234.5678) for name in ("score", "%", "latency", "merged", "to 90 %")] == [
        "1234.6", "1234.57", "1234.57", "1234.57", "1235"]
    assert (compare.shown("trained", 1234567), compare.shown("merged", None)) == ("1,234,567", "")


def test_words_stand_on_the_left_of_a_column_and_numbers_on_the_right(capsys):
    compare.show([{"technique": "bitfit", "family": "specification", "trained": 1234}])
    header, line = capsys.readouterr().out.splitlines()
    assert header.startswith(f"{'technique':<24}{'family':<17}{'trained':>10}{'%':>7}")
    assert line.startswith(f"{'bitfit':<24}{'specification':<17}{'1,234':>10}")


def test_a_sweep_is_every_combination_of_its_values():
    assert compare.sweep_values(["lr=1e-3,1e-2", "rank=4"]) == [{"lr": 0.001, "rank": 4}, {"lr": 0.01, "rank": 4}]
    assert compare.sweep_values(["only=query", "per_layer=true"]) == [{"only": "query", "per_layer": True}]
    assert compare.sweep_values(["targets=key;query,value"]) == [{"targets": "key"}, {"targets": "query,value"}]
    assert compare.sweep_values([]) == [{}]


REFUSED = {
    "--sweep lr": "--sweep lr: write field=value",
    "--sweep rank=2.5": "rank=2.5: rank is a whole number",
    "--sweep rank=2 rank=4": "--sweep rank=4: rank is swept already",
    "--sweep rank=2,2": "--sweep rank 2,2: 2 is there twice",
    "--sweep task=claim": "--sweep task=claim: all rows have one task",
    "--sweep seed=0,1": "--sweep seed=0,1: all rows have one seed",
    "--sweep steps=2,3 --steps 4": "--steps 4: --sweep sets steps already",
    "--sweep epochs=1,2 --steps 4": "--epochs 1.0 and --steps 4: name one of them",
    "--methods prompt --sweep words=7": "--words 7: it is only read with init=labels",
    "--methods lora,magic": "--methods magic: choose from full, ",
    "--methods lora,,bitfit": "--methods lora,,bitfit: an empty entry",
    "--methods lora,lora": "--methods lora,lora: lora is there twice",
    "--methods lora --methods bitfit": "--methods: this option is there twice",
    "--methods =": "--methods =: choose from",
    "--methods=": "methods '': an empty text is no value",
    "--seeds 0": "'0' is not a whole number",
    "--seeds 1000000000": "--seeds 1000000000: 1,000 at most",
    "--base nope": "base 'nope': choose from gpt-xs",
    "--methods bitfit,last_layer --sweep k=3": "bitfit has no 'k'",
    "--methods last_layer --sweep k=1,3": "k=3: this model has 2 blocks",
    "--methods lora --sweep rank=4,1000000000": r"LoRA\(rank=1000000000, .*more than a hundred times .* \(110,498\)",
    "--methods lora --sweep alpha=1e300": "alpha=1e.300, .*with these settings a new delta gives logits that are NaN",
    "--methods lora --sweep lr=1e-3,1e38": "lr=1e.38: choose 1e30 at most",
    "--methods lora --sweep lr=1e-3,nan": "lr=nan: choose a finite number",
    "--task claim": "--task claim and --data|--data .* and --task claim",
    "--examples 17": "examples=17: .* has 16 to train on",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_compared_is_named_before_anything_trains(words, dishes, tmp_path, monkeypatch):
    def run(*_):
        pytest.fail("a run has begun")
    monkeypatch.setattr(compare.train, "run", run)
    given = ["--out", str(tmp_path)] + ["--data", str(dishes)] * (words != "--base nope")
    given += ["--base", "gpt-xs"] * ("--base" not in words)
    with pytest.raises(Refused, match=REFUSED[words]):
        compare.main([*words.split(), *given])
    assert not results.read(tmp_path)


def test_the_folder_is_tried_before_anything_trains(dishes, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.train, "run", None)
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="file: a file stands there, not a folder"):
        compare.main(command(dishes, tmp_path / "file"))


def test_where_everything_is_kept_nothing_is_loaded(dishes, tmp_path, monkeypatch):
    pretend.training(monkeypatch, lambda s: (80.0, 50.0))
    runs = Runs(tmp_path, 2, str)
    choice = {"base": "gpt-xs", "data": str(dishes), "steps": 6}
    for method in ("full", "lora"):
        runs.trial(method, **choice)
    monkeypatch.setattr(compare.train, "prepare", None)
    check(runs, [*runs.plan("full", **choice), *runs.plan("lora", **choice)])
    with pytest.raises(TypeError):
        check(runs, runs.plan("bitfit", **choice))


def test_a_table_where_full_fine_tuning_scores_nothing_and_one_from_a_single_example(dishes, tmp_path, monkeypatch):
    """No share of 0, and a probe of one example knows its label alone."""
    pretend.training(monkeypatch, lambda s: (0.0, 0.0))
    monkeypatch.setattr(compare, "latency", lambda runs, record: None)
    rows = compare.table(Runs(tmp_path, 1, str), ["lora"], [{}], base="gpt-xs", data=str(dishes), examples=1)
    assert [row["of full"] for row in rows] == [None] * 6
    assert next(row for row in rows if row["technique"] == "linear probe")["score"] == 50.0
    compare.show(rows)


def test_every_technique_stands_beside_full_fine_tuning(dishes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "draw", lambda rows, folder: "")
    words = command(dishes, tmp_path, "--methods", "lora,prompt", "--seeds", "2")
    compare.main(words)
    rows = table(tmp_path)
    assert [row["technique"] for row in rows] == ["majority class", "frozen base", "linear probe", "probe of the mean",
                                                  "from scratch", "lora", "prompt", "full fine-tuning"]
    by_name = {row["technique"]: row for row in rows}
    full = float(by_name["full fine-tuning"]["score"])
    for name, row in by_name.items():
        assert float(row["of full"]) == pytest.approx(100 * float(row["score"]) / full), name
    assert by_name["majority class"]["score"] == "50.0" and by_name["linear probe"]["trained"] == str(2 * 49)
    assert "--scratch" in by_name["from scratch"]["command"]
    assert by_name["lora"]["merged"] and not by_name["prompt"]["merged"], "only one of the two can be merged"
    assert by_name["full fine-tuning"]["latency"] == ""
    assert by_name["lora"]["forgets"] == "", "a Classifier predicts no words"
    kept = results.read(tmp_path)
    assert len(kept) == 2 * 4 + 4 + 2, "four rows of two runs, two probes in each of two rows, two latencies"
    capsys.readouterr()
    compare.main(words)
    assert results.read(tmp_path) == kept and table(tmp_path) == rows
    assert capsys.readouterr().out.startswith("\ntechnique"), "nothing has been run a second time"


def test_where_text_is_written_there_is_no_linear_probe(monkeypatch, tmp_path):
    """Two seeds, each with a test of its own: the frozen base has 3 and 5 there."""
    pretend.training(monkeypatch, lambda s: (20.0 if s.scratch else 80.0, 10.0 if s.scratch else 40.0),
                     metric="attributes", majority_score=0.0)
    run = compare.train.run
    monkeypatch.setattr(compare.train, "run", lambda s, out, say: run(s, out, say) | {"frozen_score": 3.0 + 2 * s.seed})
    rows = compare.table(Runs(tmp_path, 2, str), [], [{}], base="gpt-xs", task="describe")
    assert [(row["technique"], row["score"], row["of full"]) for row in rows] == [
        ("majority class", 0.0, 0.0), ("frozen base", 4.0, 10.0), ("from scratch", 10.0, 25.0),
        ("full fine-tuning", 40.0, 100.0)]


def test_a_sweep_has_a_row_and_a_curve_for_every_value_and_diverged_where_there_is_no_score(dishes, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")
    words = command(dishes, tmp_path, "--methods", "bitfit", "--seeds", "1", "--sweep", "lr=1e-3,1e30")
    drawn = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(pictures, "save", lambda figure, path: drawn.append((path.name, figure.axes[0])))
        compare.main(words)
    rows = {row["technique"]: row for row in table(tmp_path)}
    assert rows["bitfit lr=1e+30"]["score"] == "diverged" and float(rows["bitfit lr=0.001"]["score"]) >= 0
    (first, dots), (second, curves) = drawn
    assert (first, second) == compare.PICTURES
    trained = ["linear probe", "probe of the mean", "from scratch", "bitfit lr=0.001", "full fine-tuning"]
    assert [text.get_text() for text in dots.texts] == trained
    assert [text.get_text() for text in curves.get_legend().texts] == trained[2:]


def test_pictures_are_drawn_again_only_for_another_table(monkeypatch, tmp_path, capsys):
    def draw(rows, folder):
        (folder / compare.PICTURES[-1]).write_bytes(b"a picture")
        return "pictures: new"

    def last_line(score):
        monkeypatch.setattr(compare, "table", lambda *_, **__: [{"technique": "lora", "score": score}])
        compare.main(["--out", str(tmp_path)])
        return capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(compare, "draw", draw)
    assert [last_line(score) for score in (50.0, 50.0, 60.0)] == ["pictures: new", "pictures: as they were",
                                                                  "pictures: new"]
    (tmp_path / compare.PICTURES[-1]).unlink()
    assert last_line(60.0) == "pictures: new"


# ---- kills ----

def same_as_if_it_had_not_been(whole, torn):
    """The same table, the same records with the same scores, each of them once."""
    assert without_times(table(whole)) == without_times(table(torn))
    scores = [sorted((json.dumps(r["settings"]), r.get("score")) for r in results.read(out) if "settings" in r)
              for out in (whole, torn)]
    assert scores[0] == scores[1]


def test_a_comparison_killed_ten_times_ends_as_if_it_had_not_been(dishes, tmp_path, monkeypatch):
    """Each kill comes at a random training step, and tears the line that is being written."""
    def compare_to(out):
        compare.main(command(dishes, out, "--methods", "lora", "--seeds", "2"))

    def loss(*inputs):
        steps[0] -= 1
        if steps[0] == 0:
            raise KeyboardInterrupt
        return real(*inputs)

    monkeypatch.setattr(compare, "draw", lambda rows, folder: "")
    real, rng, steps = tasks.loss, random.Random(0), [0]
    monkeypatch.setattr(tasks, "loss", loss)
    compare_to(tmp_path / "whole")
    for _ in range(10):
        steps[0] = rng.randint(1, 10)  # a run has six
        with pytest.raises(KeyboardInterrupt):
            compare_to(tmp_path / "torn")
        (tmp_path / "torn").mkdir(exist_ok=True)
        with open(tmp_path / "torn" / "results.jsonl", "a", encoding="utf-8") as file:
            file.write('{"method": "lora", "sco')
    assert 0 < len(results.read(tmp_path / "torn")) < len(results.read(tmp_path / "whole"))
    compare_to(tmp_path / "torn")
    same_as_if_it_had_not_been(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.slow
def test_a_comparison_in_a_process_killed_ten_times_ends_as_if_it_had_not_been(dishes, tmp_path):
    """The same with real kills, all techniques: about a minute."""
    def start(out):
        words = command(dishes, out, "--seeds", "3", "--steps", "40")
        return subprocess.Popen([sys.executable, "eval.py", "compare", *words], cwd=ROOT, stdout=subprocess.DEVNULL)

    whole, torn, rng = tmp_path / "whole", tmp_path / "torn", random.Random(0)
    assert start(whole).wait() == 0
    for kill in range(10):
        process, known = start(torn), len(results.read(torn))
        while len(results.read(torn)) == known and process.poll() is None:  # one new run, and a part of the next
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.6))
        assert process.poll() is None, f"finished before kill {kill}"
        process.kill()
        process.wait()
    assert start(torn).wait() == 0
    same_as_if_it_had_not_been(whole, torn)
