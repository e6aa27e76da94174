"""What all comparisons are built on: each run is done once, dev picks the learning rate, means have intervals."""

import math
import time

import pytest

import pretend
from harness import report
from harness.settings import settings_of
from lab import rates
from lab.runs import Runs, interval, mean, sd, steps_to, trained
from lab.timing import side_by_side
from survey.ledger import HOLDS, OPEN, above, below
from train import Diverged, run


@pytest.fixture
def runs(tmp_path):
    """Runs of two seeds whose lines are kept in `runs.lines`."""
    lines = []
    made = Runs(tmp_path, seeds=2, say=lines.append, base="gpt-xs")
    made.lines = lines
    return made


# ---- runs ----

def test_a_trial_is_one_run_a_seed_and_a_second_look_runs_nothing(runs, monkeypatch):
    ran = pretend.training(monkeypatch, lambda s: (60.0, 50.0 + s.seed))
    assert [r["score"] for r in runs.trial("lora", rank=4)] == [50.0, 51.0]
    assert [(s.seed, s.delta.rank, s.base) for s in ran] == [(0, 4, "gpt-xs"), (1, 4, "gpt-xs")]
    assert [r["score"] for r in runs.trial("lora", rank=4)] == [50.0, 51.0] and len(ran) == 2
    assert runs.trial("lora", seeds=(1, 5), rank=4)[1]["score"] == 55.0 and len(ran) == 3
    assert [line.split()[:3] for line in runs.lines] == [["lora", "seed", str(seed)] for seed in (0, 1, 5)]
    assert "rank=4" in runs.lines[0] and "50.0" in runs.lines[0]


def test_a_seed_may_draw_more_than_the_examples(runs, monkeypatch):
    ran = pretend.training(monkeypatch, lambda s: (60.0, 60.0))
    runs.trial("intrinsic", seeded=("projection_seed",), dim=8)
    assert [s.delta.projection_seed for s in ran] == [0, 1]


def test_what_always_holds_overrules_the_choice(tmp_path, monkeypatch):
    ran = pretend.training(monkeypatch, lambda s: (60.0, 60.0))
    Runs(tmp_path, 1, str, steps=3, task="claim").trial("bitfit", steps=500)
    assert [(s.steps, s.task) for s in ran] == [(3, "claim")]


def test_a_delta_that_is_no_technique_is_trained_as_a_technique_is(tmp_path, few_examples):
    """The last block, as a run trains it and without one."""
    settings = settings_of("last_layer", base="gpt-xs", task="cuisine", steps=15, seed=1, device="cpu")
    record = run(settings, tmp_path, report.quiet)
    assert trained(settings, settings.delta) == {name: record[name] for name in ("score", "dev_score")}


# ---- the learning rate ----

def by_rate(**scores):
    """{"lr": (dev, test)} as a formula; None diverges."""
    def score(settings):
        if scores[str(settings.lr)] is None:
            raise Diverged("the loss is nan")
        return scores[str(settings.lr)]
    return score


def test_the_learning_rate_is_the_one_that_is_best_on_dev_not_on_test(runs, monkeypatch):
    ran = pretend.training(monkeypatch, by_rate(**{"0.1": (70, 90), "0.3": (80, 40), "0.5": (80, 95)}))
    records = runs.tuned("lora", (0.1, 0.3, 0.5), rank=4)
    assert [(r["dev_score"], r["score"]) for r in records] == [(80, 40)] * 2       # of equals the first
    assert [(s.lr, s.seed) for s in ran] == [(0.1, 0), (0.3, 0), (0.5, 0), (0.3, 1)], "the first seed chooses for all"
    assert {s.delta.rank for s in ran} == {4}


def test_without_rates_the_techniques_own_grid_is_tried(runs, monkeypatch):
    ran = pretend.training(monkeypatch, lambda s: (s.lr, 0.0))
    runs.tuned("prompt", seeds=(7,))
    assert [(s.lr, s.seed) for s in ran] == [(3e-2, 7), (1e-1, 7), (3e-1, 7)]


def test_a_rate_that_diverges_is_out_and_not_tried_again(runs, monkeypatch):
    ran = pretend.training(monkeypatch, by_rate(**{"0.1": (70, 70), "9.0": None}))
    for _ in range(2):
        assert [r["dev_score"] for r in runs.tuned("lora", (9.0, 0.1))] == [70, 70]
        assert [(s.lr, s.seed) for s in ran] == [(9.0, 0), (0.1, 0), (0.1, 1)]
        with pytest.raises(Diverged, match="the loss is nan"):
            runs.tuned("lora", (9.0,))


# ---- measurements ----

def test_a_default_rate_is_compared_with_its_grid_on_every_base_and_task(monkeypatch, tmp_path, capsys):
    """Dev is 70 less 10 for every tenfold too much or too little; gpt-xs has its best at 0.1, bert-s at 0.001."""
    best = {"gpt-xs": 0.1, "bert-s": 0.001}

    def score(settings):
        if settings.lr == 10:
            raise Diverged("too high")
        return 70 - 10 * abs(math.log10(settings.lr / best[settings.base])), 0.0
    pretend.training(monkeypatch, score)
    rates.main(f"--methods lora --bases gpt-xs,bert-s --tasks cuisine --rates 0.001,0.1,10 --out {tmp_path}".split())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if " cuisine " in line] == [
        ["gpt-xs", "cuisine", "10.0", "0.001:", "50.0", "[0.01:", "60.0]", "0.1:", "70.0", "10:", "-"],
        ["bert-s", "cuisine", "10.0", "0.001:", "70.0", "[0.01:", "60.0]", "0.1:", "50.0", "10:", "-"]]


def test_a_measurement_is_made_once_for_its_name_and_its_settings(runs):
    made = []

    def measure():
        made.append(len(made))
        return {"ratio": 2.0 + made[-1]}
    settings = {"base": "gpt-xs", "task": "rating", "steps": 300, "lr": None, "content": {"base": "3f"}}
    first = runs.kept("speed", measure, **settings)
    assert first["ratio"] == 2.0 and first["method"] == "measure" and runs.kept("speed", measure, **settings) == first
    assert runs.kept("speed", measure, **settings | {"steps": 301})["ratio"] == 3.0
    assert runs.kept("speed", measure, **settings | {"content": {"base": "40"}})["ratio"] == 4.0   # another base
    assert runs.kept("length", measure)["ratio"] == 5.0
    assert runs.lines == ["measuring   speed base=gpt-xs task=rating"] * 3 + ["measuring   length"]


# ---- numbers over seeds ----

def test_mean_spread_and_interval_of_three_seeds():
    assert (mean([90, 92, 97]), sd([90, 92, 97])) == (93.0, math.sqrt((9 + 1 + 16) / 2))
    assert interval([90, 92, 97]) == pytest.approx(4.30 * math.sqrt(13) / math.sqrt(3))     # Student's t, 2 degrees
    assert interval([1, 3]) == pytest.approx(12.71 * 1.0)                                    # 1 degree
    assert interval([1, 3] * 20) == pytest.approx(2.26 * sd([1, 3] * 20) / math.sqrt(40))    # the last of the table
    assert sd([90]) == 0.0 and interval([90]) == math.inf, "one seed says nothing about the next"


def test_an_interval_that_touches_the_bar_from_above_holds_and_from_below_is_open():
    values = [90, 92, 97]
    lower, upper = mean(values) - interval(values), mean(values) + interval(values)
    assert (above(values, lower), above(values, upper)) == (HOLDS, OPEN)
    assert (below(values, lower), below(values, upper)) == (OPEN, HOLDS)
    assert above([96, 96, 96], 96) == below([96, 96, 96], 96) == HOLDS


def test_steps_to_a_target_count_to_the_first_evaluation_that_meets_it_in_every_seed():
    fast, slow, never = ({"curve": curve} for curve in (
        [[10, 40], [20, 75], [30, 70]], [[10, 10], [20, 20], [30, 75]], [[10, 0], [20, 0], [30, 0]]))
    assert steps_to([fast, slow], 75) == 25, "the mean of 20 and 30"
    assert steps_to([fast, never], 75) is None


# ---- time ----

def test_a_time_is_the_median_of_paired_ratios(monkeypatch):
    """The machine slows down from round to round; side by side, and in turns, the two sides do so together.

    The fastest rounds would say 4, the medians of each side 2.5, the means 3.4; the warm-up 1.
    """
    clock, turns = [0.0], []
    taken = {"base": iter([50, 1, 2, 10]), "lora": iter([50, 4, 5, 35])}

    def side(name):
        def function():
            turns.append(name)
            clock[0] += next(taken[name])
        return function
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    milliseconds, ratios = side_by_side({name: side(name) for name in taken}, rounds=3)
    assert ratios == {"base": 1.0, "lora": 3.5}                 # 4 / 1, 5 / 2 and 35 / 10: the one in the middle
    assert milliseconds == {"base": 2000, "lora": 5000}
    assert turns == ["base", "lora"] * 4
