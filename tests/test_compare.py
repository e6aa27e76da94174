"""`eval.py compare` and `d90`: averages by hand, searches on curves that are known, and runs that outlive a kill."""

import csv
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from lab import compare, d90, linear_probe, lowdata, results, trials
from lab.trials import interval, mean, sd, settings, steps_to

ROOT = Path(__file__).parents[1]
SAME = "technique", "trained", "stored B", "score", "± sd", "of full", "to 90 %", "command"  # whatever the clock says


@pytest.fixture(scope="module")
def dishes(tmp_path_factory):
    """A task in two small files: what is soup and what is fish."""
    folder = tmp_path_factory.mktemp("dishes")
    for split, n in (("train", 16), ("dev", 8)):
        rows = [f"the {'soup' if i % 2 else 'fish'} of table {split} {i}\t{i % 2}" for i in range(n)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return folder


def record(dev, seed=0, **more):
    return {"dev_score": dev, "score": dev, "majority_score": 50.0, "base_params": 5000, "seed": seed} | more


# ---- numbers over seeds ----

def test_mean_spread_and_interval_of_three_seeds():
    assert (mean([90, 92, 97]), sd([90, 92, 97])) == (93.0, math.sqrt((9 + 1 + 16) / 2))
    assert interval([90, 92, 97]) == pytest.approx(4.30 * math.sqrt(13) / math.sqrt(3))
    assert sd([90]) == 0.0 and interval([90]) == math.inf            # one seed says nothing about the next


def test_steps_to_a_target_is_the_first_look_that_met_it_in_every_seed():
    fast, slow, never = ({"curve": curve} for curve in
                         ([[10, 40], [20, 80], [30, 70]], [[10, 10], [20, 20], [30, 75]], [[10, 0], [20, 0], [30, 0]]))
    assert steps_to([fast, slow], 75) == 25                          # 20 and 30
    assert steps_to([fast, never], 75) is None


def test_the_tuned_setting_is_the_one_that_dev_likes_best_on_average(monkeypatch):
    scores = {(0.1, 0): 60, (0.1, 1): 62, (0.3, 0): 90, (0.3, 1): 20}
    monkeypatch.setattr(trials, "trial", lambda method, seeds, out, say, lr: [record(scores[lr, s], s) for s in seeds])
    assert [r["score"] for r in trials.tuned("lora", {"lr": [0.3, 0.1]}, seeds=(0, 1))] == [60, 62]


def test_a_field_that_nobody_has_is_named():
    with pytest.raises(ValueError, match="lora has no 'ranks'"):
        settings("lora", ranks=4)


# ---- the table ----

@pytest.mark.parametrize("name, text, why", [
    ("rank", "2.5", "rank=2.5: rank is a whole number"), ("lr", "fast", "lr=fast: lr is a number"),
    ("norms", "perhaps", "norms=perhaps: norms is true or false"), ("delta", "lora", "'delta' is no field"),
])
def test_a_value_that_does_not_fit_its_field_is_named(name, text, why):
    assert trials.value("rank", "8") == 8 and trials.value("lr", "8") == 8.0 and trials.value("targets", "8") == "8"
    with pytest.raises(ValueError, match=why):
        trials.value(name, text)


@pytest.mark.parametrize("room, line, why", [
    (d90, "--grid 4,x", "'x' is not a whole number"), (d90, "--rates 1e-3,fast", "invalid list of float"),
    (lowdata, "--sizes 20,0", "'0' is not a whole number"), (compare, "--seeds 0", "'0' is not a whole number"),
])
def test_a_bad_list_ends_with_a_line_that_names_it(room, line, why, capsys):
    with pytest.raises(SystemExit):
        room.main(line.split())
    assert why in capsys.readouterr().err


def test_a_sweep_is_every_combination_of_its_values():
    assert compare.sweep_values(["lr=1e-3,1e-2", "rank=4"]) == [{"lr": 0.001, "rank": 4}, {"lr": 0.01, "rank": 4}]
    assert compare.sweep_values(["only=query", "per_layer=true"]) == [{"only": "query", "per_layer": True}]
    assert compare.sweep_values(["targets=key;query,value"]) == [{"targets": "key"}, {"targets": "query,value"}]
    assert compare.sweep_values([]) == [{}]
    with pytest.raises(ValueError, match="field=value"):
        compare.sweep_values(["lr"])


@pytest.mark.parametrize("method, choice", [
    ("lora", {"rank": 1, "lr": 0.5, "seed": 3}), ("full", {"scratch": True, "base": "gpt-xs"}),
    ("intrinsic", {"dim": 64, "per_layer": True, "examples": 50}), ("prefix", {"mlp": False, "steps": 7})])
def test_the_command_of_a_row_reads_back_as_the_same_run(method, choice):
    made = settings(method, **choice)
    words = compare.command({"method": method, "settings": made.key}).split()
    assert words[:2] == ["python", "train.py"]
    _, args, kinds = train.arguments(words[2:])
    assert train.settings_from(args, kinds[method]).key == made.key


def test_every_row_stands_beside_full_fine_tuning(dishes, tmp_path, capsys):
    line = f"--base gpt-xs --data {dishes} --methods lora,prompt --seeds 2 --steps 6 --batch-size 8 --out {tmp_path}"
    compare.main(line.split())
    rows = table(tmp_path)
    assert [row["technique"] for row in rows] == ["majority class", "frozen base", "linear probe", "from scratch",
                                                  "lora", "prompt", "full fine-tuning"]
    by_name = {row["technique"]: row for row in rows}
    full = float(by_name["full fine-tuning"]["score"])
    for name, row in by_name.items():
        assert float(row["of full"]) == pytest.approx(100 * float(row["score"]) / full), name
    assert by_name["majority class"]["score"] == "50.0"
    assert by_name["lora"]["merged"] and not by_name["prompt"]["merged"]      # only one of them can be merged
    known = (tmp_path / "results.jsonl").read_text()
    assert len(known.splitlines()) == 2 * 5 + 2                               # runs and probes; two latencies
    capsys.readouterr()
    compare.main(line.split())                                                # the second time nothing is run
    assert (tmp_path / "results.jsonl").read_text() == known and table(tmp_path) == rows
    assert "s\n" not in capsys.readouterr().out.split("technique")[0]         # no line of a new run


def table(out):
    with open(Path(out) / "compare.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_linear_probe_reads_off_what_a_state_says_and_no_more():
    x = torch.tensor([[1.0, 5.0], [-1.0, 5.0], [2.0, 5.0], [-2.0, 5.0]])      # only the first number differs
    layer = linear_probe.fit(x, torch.tensor([1, 0, 1, 0]), 2, penalty=1e-3)
    assert layer(x).argmax(dim=1).tolist() == [1, 0, 1, 0]
    first, second = (layer.weight[1] - layer.weight[0]).tolist()
    assert first > 1 and abs(second) < 1e-2


def test_few_examples_are_compared_seed_by_seed():
    """The seeds differ by 20 points, the two methods by 2 in every seed: paired, the interval is zero."""
    found = {("prefix", 20): [record(52), record(72)], ("full", 20): [record(50), record(70)]}
    assert lowdata.difference(found, 20) == (2.0, 0.0)


# ---- d90 ----

GRID = 4, 8, 16, 32, 64


@pytest.mark.parametrize("curve, found", [
    ((10, 20, 85, 95, 95), (16, 32)),     # the bracket: 16 is too few, 32 is enough
    ((95, 95, 95, 95, 95), (None, 4)),    # the smallest d of the grid is enough
    ((10, 20, 30, 40, 50), (64, None)),   # the largest is not
    ((10, 20, 30, 40, 95), (32, 64)),
    ((10, 20, 95, 40, 95), (32, 64)),     # 16 was luck: the next larger d does not meet the target
])
def test_the_bracket_of_d90(curve, found):
    assert d90.bracket(dict(zip(GRID, curve)).get, 90, GRID) == found


def test_the_search_halves_the_grid():
    asked = []
    assert d90.bracket(lambda d: asked.append(d) or d / 10, 90, d90.GRID) == (512, 1024)
    assert asked == [128, 1024, 256, 512, 2048]  # the last because the next larger d has to meet the target too


def test_the_target_of_d90_and_the_one_above_chance(monkeypatch):
    """Full 80, chance 50: 90 % of full is 72, nine tenths of the way up from chance is 77."""
    scores = {8: 60.0, 16: 70.0, 32: 75.0, 64: 79.0}

    def trial(method, seeds, out, say, dim=None, lr=None, **choice):
        assert method == "full" or choice["projection_seed"] == seeds[0]      # a seed draws the subspace too
        score = 80.0 if method == "full" else scores.get(dim, 50.0) - (5 if lr == 1e-2 else 0)
        return [record(score, seed) for seed in seeds]

    monkeypatch.setattr(d90, "trial", trial)
    found = d90.measure(seeds=(0, 1), grid=GRID, rates=(3e-3, 1e-2), say=None)
    assert found["targets"] == {"raw": 72.0, "above chance": 77.0}
    assert found["brackets"] == {"raw": (16, 32), "above chance": (32, 64)}
    assert found["curve"][32] == (75.0, 0.0)                                  # at the better of the two rates


# ---- what the command line hands on ----

def test_d90_hands_on_the_rising_grid_the_rates_and_a_thousand_examples(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(d90, "measure", lambda seeds, out, **choice: asked.append((seeds, choice)))
    monkeypatch.setattr(d90, "show", lambda name, found: None)
    monkeypatch.setattr(d90, "picture", lambda found, folder: "")
    d90.main(f"--bases gpt-xs,gpt-s --grid 64,8,16 --rates 0.5 --per-layer --seeds 2 --out {tmp_path}".split())
    d90.main(f"--examples 50 --projection dense --out {tmp_path}".split())
    d90.main(f"--data {tmp_path} --out {tmp_path}".split())
    (seeds, small), (_, large), (_, other), (_, own) = asked
    assert list(seeds) == [0, 1] and (small["base"], large["base"]) == ("gpt-xs", "gpt-s")
    assert small == {"grid": [8, 16, 64], "rates": [0.5], "per_layer": True, "projection": "fastfood",
                     "base": "gpt-xs", "task": "rating", "examples": 1000}
    assert other["grid"] == list(d90.GRID) and other["rates"] == d90.RATES and not other["per_layer"]
    assert (other["examples"], other["projection"]) == (50, "dense")
    assert own["examples"] is None and own["data"] == str(tmp_path) and "task" not in own


def test_lowdata_hands_on_the_sizes_and_describes_unless_told_otherwise(monkeypatch):
    asked = []

    def table(names, sizes, seeds, out, **choice):
        asked.append((names, sizes, choice))
        return {(name, n): [record(50.0, seed) for seed in seeds] for name in names for n in sizes}

    monkeypatch.setattr(lowdata, "table", table)
    lowdata.main(["--sizes", "5,7", "--methods", "lora"])
    lowdata.main(["--task", "rating"])
    assert asked == [(["lora"], [5, 7], {"task": "describe"}),
                     (["prefix", "full"], lowdata.SIZES, {"task": "rating"})]


def test_pictures_are_drawn_again_only_for_another_table(monkeypatch, tmp_path, capsys):
    def draw(rows, records, folder):
        drawn.append(rows)
        (folder / compare.PICTURES[-1]).write_text("a picture")
        return "pictures: new"

    drawn, row = [], {"technique": "lora", "score": 50.0}
    monkeypatch.setattr(compare, "table", lambda *_, **__: [row])
    monkeypatch.setattr(compare, "trial", lambda *_, **__: [])
    monkeypatch.setattr(compare, "pictures", draw)
    for score, number in ((50.0, 1), (50.0, 1), (60.0, 2)):
        row["score"] = score
        compare.main(["--out", str(tmp_path)])
        assert len(drawn) == number
    (tmp_path / compare.PICTURES[-1]).unlink()
    compare.main(["--out", str(tmp_path)])
    assert len(drawn) == 3
    assert capsys.readouterr().out.count("pictures: as they were") == 1


# ---- kills ----

@pytest.mark.slow
def test_a_comparison_killed_ten_times_ends_as_if_it_had_not_been(dishes, tmp_path):
    """No finished run is lost, none is there twice, every score is the same bit for bit: about a minute."""
    def start(out):
        words = f"compare --base gpt-xs --data {dishes} --seeds 3 --steps 40 --device cpu --out {out}"
        return subprocess.Popen([sys.executable, "eval.py", *words.split()], cwd=ROOT, stdout=subprocess.DEVNULL)

    def runs(out):
        return len(results.read(out))

    whole, torn, rng = tmp_path / "whole", tmp_path / "torn", random.Random(0)
    assert start(whole).wait() == 0
    for kill in range(10):
        process, known = start(torn), runs(torn)
        while runs(torn) == known and process.poll() is None:  # the first new run, and then some time into the next
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.6))
        assert process.poll() is None, f"finished before kill {kill}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(torn).wait() == 0
    found = [{json.dumps(r["settings"]): r.get("score") for r in results.read(out)} for out in (whole, torn)]
    assert found[0] == found[1]
    assert len(results.read(torn)) == len(found[1]) == len(results.read(whole))
    wanted, got = ([{name: row[name] for name in SAME} for row in table(out)] for out in (whole, torn))
    assert wanted == got
