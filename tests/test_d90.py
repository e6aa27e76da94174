"""`eval.py d90`: searches on curves that are known, the targets by hand, and what the command line hands on."""

import pytest

import pretend
import train
from deltas import attach, methods, trainable
from lab import d90
from lab.runs import Runs
from model import Refused, Transformer
from tiny import GPT

GRID = 4, 8, 16, 32, 64


# ---- the search ----

def search(scores, target=90):
    return d90.bracket(dict(zip(GRID, scores)).get, target, GRID)


def test_the_bracket_is_the_largest_d_that_fails_and_the_smallest_that_does_not():
    assert search([10, 20, 85, 95, 95]) == (16, 32)
    assert search([10, 20, 85, 90, 95]) == (16, 32), "a score at the target meets it"
    assert search([10, 20, 30, 40, 95]) == (32, 64)
    assert search([95, 95, 95, 95, 95]) == (None, 4), "the smallest d of the grid is enough"
    assert search([10, 20, 30, 40, 50]) == (64, None), "the largest is not"


def test_a_lucky_d_does_not_count_unless_the_next_larger_one_meets_the_target_too():
    assert search([10, 20, 95, 40, 95]) == (32, 64)
    assert search([95, 40, 95, 95, 95]) == (8, 16)
    assert search([10, 20, 95, 40, 50]) == (64, None)


def test_the_search_halves_the_grid():
    tried = []
    assert d90.bracket(lambda d: tried.append(d) or d / 10, 90, d90.GRID) == (512, 1024)
    assert tried == [256, 1024, 512, 2048], "the last because the next larger d has to meet the target too"


# ---- a measurement ----

def scores_of(settings):
    """(dev, test): full reaches 80 at 1e-3 and 90 at 3e-3; a subspace has more with d, and with the seed.

    On dev it is best at the rate 0.01, and on test at the rate 0.003: test must not pick.
    """
    if settings.delta.name == "full":
        return (80.0, 80.0) if settings.lr == 1e-3 else (90.0, 90.0)
    score = {8: 60.0, 16: 70.0, 32: 80.0, 64: 89.0}[settings.delta.dim] + 2 * settings.seed
    return (score, score) if settings.lr == 0.01 else (score - 5, score + 20)


def test_dev_tunes_both_sides_alike_test_judges_and_each_seed_has_a_bracket(monkeypatch, tmp_path):
    """Full 90, chance 50: 90 % of full is 81, nine tenths of the way up from chance 86. Seed 1 is two points ahead."""
    ran = pretend.training(monkeypatch, scores_of)
    found = d90.measure(Runs(tmp_path, 2, str), (8, 16, 32, 64, 9999), (0.003, 0.01), per_layer=True, base="gpt-xs",
                        scratch=True)
    assert (found["full"], found["chance"], found["D"], found["head"]) == ([90.0, 90.0], [50.0, 50.0], 5000, 0)
    assert found["targets"] == {"raw": [81.0, 81.0], "above chance": [86.0, 86.0]}
    assert found["brackets"] == {"raw": [(32, 64), (16, 32)], "above chance": [(32, 64), (32, 64)]}, "9999 is above D"
    assert found["curve"] == {0: [40.0, 40.0], 16: [70.0, 72.0], 32: [80.0, 82.0], 64: [89.0, 91.0]}, "d = 0 is frozen"
    full, subspaces = ([s for s in ran if s.delta.name == name] for name in ("full", "intrinsic"))
    assert [(s.lr, s.seed, s.scratch) for s in full] == [(lr, seed, False) for seed in (0, 1) for lr in (1e-3, 3e-3)]
    assert all(s.delta.projection_seed == s.seed and s.delta.per_layer and s.scratch for s in subspaces)
    assert {s.lr for s in subspaces} == {0.003, 0.01}, "as many rates as full fine-tuning had"


def test_where_a_classifier_answers_d_zero_trains_the_classifier_alone(monkeypatch, tmp_path):
    """Twenty steps really made: the two words are told apart by the Classifier on the frozen states."""
    pretend.training(monkeypatch, lambda s: (80.0, 80.0), head_params=98)
    folder = reviews(tmp_path)
    found = d90.measure(Runs(tmp_path, 2, str), (8,), (0.003,), base="gpt-xs", data=str(folder), steps=20, head_lr=0.1)
    assert found["curve"] == {0: [100.0, 100.0], 8: [80.0, 80.0]} and found["head"] == 98
    model = Transformer(GPT)
    model.classify(3)
    assert set(trainable(attach(d90.HeadAlone(), model))) == {"head.out.weight", "head.out.bias"}


def reviews(tmp_path):
    """A folder with a task of two texts, which a Classifier answers."""
    (tmp_path / "reviews").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "reviews" / f"{split}.tsv").write_text("text\tlabel\nfine\tgood\ndull\tbad\n", encoding="utf-8")
    return tmp_path / "reviews"


def test_every_run_is_planned_and_full_fine_tuning_has_no_field_of_the_subspace(tmp_path):
    plan = d90.plan(Runs(tmp_path, 1), (8, 16), (0.003, 0.01), projection="dense", base="gpt-xs")
    assert [(s.delta.name, s.lr) for s in plan[:2]] == [("full", 1e-3), ("full", 3e-3)]
    assert [(s.delta.name, s.delta.dim, s.delta.projection, s.lr) for s in plan[2:]] == [
        ("intrinsic", d, "dense", lr) for d in (8, 16) for lr in (0.003, 0.01)]


def test_full_fine_tuning_of_a_checkpoint_takes_lower_rates():
    assert d90.full_rates("gpt-s", 3) == (1e-3, 3e-3, 3e-4) and d90.full_rates("/a/folder", 1) == (5e-5,)


def test_brackets_are_printed_with_what_was_tried(capsys):
    found = {"full": [80.0, 80.0], "chance": [50.0, 52.0], "D": 5000, "head": 770,
             "targets": {"raw": [72.0, 72.0], "above chance": [77.0, 79.0]},
             "brackets": {"raw": [(16, 32), (None, 16)], "above chance": [(32, None), (32, None)]},
             "curve": {0: [30.0, 34.0], 16: [40.0, 42.0], 32: [75.0]}}
    d90.show("gpt-xs on rating", found)
    assert capsys.readouterr().out == (
        "\ngpt-xs on rating   D = 5,000   and 770 of a Classifier beside every d   chance 51.0\n"
        "  d90 raw           target  72.0   (16, 32]  <= 16\n"
        "  d90 above chance  target  78.0   > 32  > 32\n"
        f"       0   32.0 ±  2.8  {'#' * 16}\n"
        f"      16   41.0 ±  1.4  {'#' * 20}\n"
        f"      32   75.0 ±  0.0  {'#' * 38}  1 of 2 seeds\n"
        f"    full   80.0 ±  0.0  {'#' * 40}\n")


# ---- the command line ----

def test_the_command_measures_every_base_on_every_task(monkeypatch, tmp_path, capsys):
    """A thousand examples, the technique's own rates and a rising grid, unless the command says otherwise."""
    ran, drawn = pretend.training(monkeypatch, lambda s: (80.0, 80.0)), []
    monkeypatch.setattr(d90, "picture", lambda found, path: drawn.append(found) or f"picture: {path}")
    d90.main(f"--bases gpt-xs,bert-xs --tasks claim,rating --grid 64,8 --seeds 1 --out {tmp_path}".split())
    assert list(drawn[0]) == ["gpt-xs on claim", "bert-xs on claim", "gpt-xs on rating", "bert-xs on rating"]
    assert [one["brackets"]["raw"] for one in drawn[0].values()] == 4 * [[(None, 8)]]
    assert {s.examples for s in ran} == {1000}
    tried = [(s.delta.dim, s.lr) for s in ran if (s.delta.name, s.base, s.task) == ("intrinsic", "gpt-xs", "claim")]
    assert tried == [(d, lr) for d in (8, 64) for lr in methods()["intrinsic"].rates]
    assert f"picture: {tmp_path / 'd90.png'}" in capsys.readouterr().out

    ran.clear()
    d90.main(f"--examples 50 --rates 0.5 --grid 8 --projection dense --per-layer --seeds 1 --out {tmp_path}".split())
    (full, subspace), delta = ran, ran[-1].delta
    assert (full.base, full.task, full.examples, subspace.lr) == ("gpt-s", "rating", 50, 0.5)
    assert (delta.dim, delta.projection, delta.per_layer) == (8, "dense", True)


def test_the_users_own_data_are_the_task_and_used_whole(monkeypatch, tmp_path, capsys):
    ran, drawn = pretend.training(monkeypatch, lambda s: (80.0, 80.0)), []
    monkeypatch.setattr(d90, "picture", lambda found, path: drawn.extend(found) or "")
    d90.main(f"--data {reviews(tmp_path)} --grid 8 --rates 0.5 --seeds 1 --out {tmp_path}".split())
    assert drawn == ["gpt-s on reviews"] and {(s.task, s.examples) for s in ran} == {("reviews", None)}


@pytest.mark.parametrize("line, why", [
    ("--grid 4,x", "'x' is not a whole number"), ("--rates 1e-3,fast", "invalid list of float"),
    ("--dim 4", "unrecognized arguments: --dim"), ("--grid 8,8", "--grid 8,8: 8 is there twice"),
    ("--rates 1e-3,nan", "lr=nan: choose a finite number"), ("--rates -1", "expected one argument|lr=-1.0: choose"),
    ("--grid 8,110401", "dim=110401: this model has 110400 weights"),
    ("--grid 4 --per-layer", "dim=4: this model has 110400 weights and 4 scales of layers; choose 5 to"),
    ("--bases gpt-xs,gpt-xs", "--bases gpt-xs,gpt-xs: gpt-xs is there twice"), ("--bases gpt-xs,", "an empty entry"),
    ("--bases gpt-xs,nope", "base 'nope': choose from"), ("--tasks claim,rate", "task 'rate': choose from"),
    ("--tasks claim --data somewhere", "--tasks claim and --data somewhere: name one of them"),
])
def test_what_cannot_be_measured_is_named_before_anything_trains(line, why, tmp_path, monkeypatch):
    def run(*_):
        pytest.fail("a run has begun")
    monkeypatch.setattr(train, "run", run)
    with pytest.raises(Refused, match=why):
        d90.main(line.split() + ["--bases", "gpt-xs"] * ("--bases" not in line) + ["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_two_bases_in_folders_of_one_name_are_two_curves(monkeypatch, tmp_path, capsys):
    pretend.training(monkeypatch, lambda s: (80.0, 80.0))
    drawn = []
    monkeypatch.setattr(d90, "check", lambda runs, plan: None)
    monkeypatch.setattr(d90, "picture", lambda found, path: drawn.extend(found) or "")
    d90.main(f"--bases one/model,two/model --grid 8 --rates 0.5 --seeds 1 --out {tmp_path}".split())
    assert drawn == ["one/model on rating", "two/model on rating"]


def test_a_picture_has_a_curve_for_each_base_and_its_target_dotted(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")
    figures = []
    monkeypatch.setattr(d90.pictures, "save", lambda figure, path: figures.append(figure))
    found = {name: {"targets": {"raw": [raw]}, "curve": {0: [30.0], 8: [40.0], 32: [75.0]}}
             for name, raw in (("gpt-xs", 72.0), ("gpt-s", 80.0))}
    assert d90.picture(found, tmp_path / "d90.png") == f"picture: {tmp_path / 'd90.png'}"
    axes, = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().texts] == ["gpt-xs", "gpt-s"]
    dotted = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted == [72.0, 80.0] and list(axes.get_xticks()) == [8, 32]
