"""The ledger of the survey's claims: complete, exact where it counts, and fair where it measures."""

import math
import re
from pathlib import Path

import pytest

from lab import claims
from lab.claims import cost, intrinsic, lora, soft
from lab.claims.bench import Bench, NotRun
from lab.ledger import (CLAIMS, COUNTS, DEFINES, FAILS, HOLDS, OPEN, PARTS, UNRUN, VERDICTS, WRONG, Entry,
                        above, below, markdown, most, plain, pm, together)
from lab.trials import settings

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """The ledger of somebody who has run nothing yet."""
    bench = Bench(tmp_path_factory.mktemp("out"), say=lambda text: None)
    return {entry.claim.name: entry for entry in claims.ledger(bench)}


def numbers(entry):
    return " ".join(entry.notes)


def test_there_are_forty_four_claims_in_the_surveys_order():
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 45)]


@pytest.mark.parametrize("name", [f"C{i}" for i in range(1, 45)])
def test_every_entry_says_what_where_from_and_how(name, entries):
    claim, entry = CLAIMS[name], entries[name]
    assert len(claim.sentence) > 20
    assert set(claim.kind.replace("/", "+").split("+")) <= set("AUED")
    assert {"Origin", "Measured"} <= set(claim.parts) <= set(PARTS) and all(claim.parts.values())
    assert entry.verdict in VERDICTS and numbers(entry)
    assert entry.missing == (claim.minutes > 0) and (claim.minutes == 0 or "E" in claim.kind)
    if "U" in claim.kind:
        assert "Tests" in claim.parts


def test_the_tests_that_are_named_exist():
    for claim in CLAIMS.values():
        for named in filter(None, claim.parts.get("Tests", "").split(",")):
            file, test = named.strip().split("::")
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.M), named


def test_all_twelve_slips_of_the_article_are_said():
    """One of the facts is about two claims (C9, C10), and one, LoRA's count for GPT-2, is about none."""
    assert [name for name, claim in CLAIMS.items() if "Article" in claim.parts] == [
        "C7", "C9", "C10", "C21", "C26", "C29", "C32", "C33", "C35", "C37", "C42", "C43"]


# ---- what is counted, against numbers worked out by hand ----

@pytest.mark.parametrize("name, verdict, figures", [
    ("C2", COUNTS, ["160 GB", "20.16 GB"]),
    ("C3", COUNTS, ["174,604,259,328", "349.2 GB", "698.4 GB"]),
    ("C5", DEFINES, ["addition: adapter, prompt, prefix.", "specification: last_layer, bitfit."]),
    ("C6", COUNTS, ["87"]),
    ("C8", UNRUN, ["1,725,186 = 0.51 %", "25,329,666 = 7.56 %"]),
    ("C14", COUNTS, ["51,200", "409,600 of 11,135,332,352 = 0.00368 %"]),
    ("C20", UNRUN, ["245,760 kept", "25,744,896 trained (7.3 %)"]),
    ("C26", UNRUN, ["102,912 = 0.0950 %", "272,384 = 0.0817 %"]),
    ("C31", UNRUN, ["400 GB", "0.7 GB"]),
    ("C37", WRONG, ["18,874,368", "84,934,656"]),
    ("C43", WRONG, ["1.05 TB", "1.40 TB", "2.79 TB", "349.5 GB"]),
    ("C44", COUNTS, ["18,874,368", "37,748,736", "36.0 MiB", "9,251 times"]),
])
def test_counted_by_hand(name, verdict, figures, entries):
    assert entries[name].verdict == verdict
    for figure in figures:
        assert figure in numbers(entries[name])


def test_lora_on_all_six_matrices_of_gpt3_by_hand():
    d, L, r = 12_288, 96, 4
    assert L * r * (4 * 2 * d + 2 * 5 * d) == 84_934_656


@pytest.mark.parametrize("name, verdict", [
    ("C13", HOLDS), ("C18", HOLDS), ("C32", HOLDS), ("C38", HOLDS), ("C23", DEFINES),
    ("C7", WRONG), ("C29", WRONG), ("C33", WRONG)])
def test_exact_on_a_tiny_model(name, verdict, entries):
    assert entries[name].verdict == verdict


def test_a_prompt_is_a_prefix_that_is_computed():
    assert soft.prompt_as_prefix() < 1e-12


# ---- verdicts, on made-up numbers ----

def test_the_interval_decides():
    """Three seeds: Student's t is 4.30, so 96, 97, 98 is 97 ± 2.5."""
    assert pm([96, 97, 98]) == "97.0 ± 2.5"
    assert above([96, 97, 98], 94) == HOLDS
    assert above([96, 97, 98], 96) == OPEN
    assert above([96, 97, 98], 99.6) == FAILS
    assert below([96, 97, 98], 99.6) == HOLDS and below([96, 97, 98], 94) == FAILS
    assert above([97], 0) == OPEN  # one seed has no interval


def test_one_failure_decides_and_then_one_doubt():
    assert together(HOLDS, OPEN, FAILS) == FAILS
    assert together(HOLDS, OPEN) == OPEN
    assert together(HOLDS, HOLDS) == HOLDS
    assert most([HOLDS, HOLDS, FAILS]) == HOLDS and most([FAILS, FAILS, OPEN]) == FAILS
    assert most([HOLDS, HOLDS, FAILS, FAILS]) == OPEN


def test_storage_must_grow_in_proportion_and_the_rest_at_all():
    assert cost.slope([10, 1000], [7, 700]) == pytest.approx(1)
    assert cost.growing([[1, 10, 100], [51, 60, 150]], storage=1.0) == HOLDS
    assert cost.growing([[1, 10, 100], [51, 50, 150]], storage=1.0) == FAILS
    assert cost.growing([[1, 10, 40], [51, 60, 150]], storage=0.8) == FAILS


def test_the_winner_is_picked_on_dev_and_is_not_full():
    found = {"full": [{"dev_score": 99}], "lora": [{"dev_score": 90}], "prompt": [{"dev_score": 50}]}
    assert cost.winner(found) == "lora"


def test_slowest_means_slower_than_every_other():
    assert soft.slowest("prompt", {"prompt": 240, "lora": 80, "full": 60}) == HOLDS
    assert soft.slowest("prompt", {"prompt": None, "lora": 80}) == HOLDS
    assert soft.slowest("prompt", {"prompt": 60, "lora": 80}) == FAILS
    assert soft.slowest("prompt", {"prompt": None, "lora": None}) == OPEN


def test_touchy_means_twice_the_others_and_more_than_the_seeds():
    assert soft.touchy({"prompt": 40, "lora": 10, "adapter": 5}, noise=5) == HOLDS
    assert soft.touchy({"prompt": 15, "lora": 10, "adapter": 5}, noise=5) == FAILS
    assert soft.touchy({"prompt": 40, "lora": 10, "adapter": 5}, noise=25) == OPEN


def test_a_conjecture_needs_something_to_explain():
    assert soft.conjecture(HOLDS, HOLDS, HOLDS) == HOLDS
    assert soft.conjecture(FAILS, HOLDS, HOLDS) == OPEN
    assert soft.conjecture(HOLDS, FAILS, HOLDS) == FAILS


def test_three_failures_fewer_are_steadier():
    assert soft.steadier(mlp=1, plain=4) == HOLDS
    assert soft.steadier(mlp=1, plain=2) == OPEN
    assert soft.steadier(mlp=6, plain=2) == FAILS


def test_a_dimension_is_lower_only_if_the_bracket_is():
    assert intrinsic.lower(128, 512) == HOLDS and intrinsic.lower(512, 128) == FAILS
    assert intrinsic.lower(128, 128) == OPEN
    assert intrinsic.text(intrinsic.BEYOND) == "above 4096"


def made_up(out, needed):
    """A bench on which `intrinsic` does as well as full fine-tuning from `needed`(choice) numbers on."""
    def trial(method, seeds=(0, 1, 2), **choice):
        reached = method == "full" or choice["dim"] >= needed(choice)
        return [{"score": 90.0, "dev_score": 90.0 if reached else 40.0, "majority_score": 25.0} for _ in seeds]
    bench = Bench(out)
    bench.trial = trial
    return bench


def test_a_dimension_is_that_of_the_setting_asked_for(tmp_path):
    bench = made_up(tmp_path, lambda choice: 8 if choice["per_layer"] else 64)
    assert intrinsic.dimension(bench) == 64 and intrinsic.dimension(bench, per_layer=True) == 8
    assert intrinsic.dimension(made_up(tmp_path, lambda choice: math.inf)) == intrinsic.BEYOND


@pytest.mark.parametrize("sizes, verdict", [((512, 128, 64), HOLDS), ((64, 128, 512), FAILS), ((64, 8, 64), OPEN)])
def test_larger_models_are_judged_by_the_largest_and_the_smallest(tmp_path, sizes, verdict):
    needed = dict(zip(("gpt-xs", "gpt-s", "gpt-m"), sizes))
    bench = made_up(tmp_path, lambda choice: needed[choice["base"]])
    assert intrinsic.c35_larger_models_smaller_dimension(bench) == verdict
    assert bench.notes[0] == f"rating: gpt-xs {sizes[0]}, gpt-s {sizes[1]}, gpt-m {sizes[2]}."


def test_rank_correlation_by_hand():
    assert intrinsic.spearman([1, 2, 3, 4], [8, 32, 128, 512]) == pytest.approx(1)
    assert intrinsic.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert intrinsic.spearman([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(4 / 20**0.5)
    assert intrinsic.spearman([1, 2], [5, 5]) == 0


def test_nearer_in_every_seed_or_not_at_all():
    assert lora.nearer([1, 2], [3, 4]) == HOLDS
    assert lora.nearer([3, 4], [1, 2]) == FAILS
    assert lora.nearer([1, 4], [3, 2]) == OPEN


def test_no_memory_model_gives_the_printed_terabytes():
    assert lora.not_a_formula([1.05, 1.40, 2.79]) == WRONG
    assert lora.not_a_formula([1.05, 1.21]) == COUNTS


# ---- runs that are missing, kept, or chosen ----

def record(bench, **choice):
    key = settings(choice.pop("method"), **({"base": "gpt-s", "task": "rating", "steps": 300} | choice)).key
    made_up = {"settings": key, "score": 50 + key["lr"], "dev_score": 50 - key["lr"]}
    bench.known[claims.bench.name(key)] = made_up


def test_a_missing_run_is_named_and_not_made(tmp_path):
    with pytest.raises(NotRun, match="lora on gpt-s, rating, seed 0"):
        Bench(tmp_path).trial("lora")
    assert not list(tmp_path.iterdir())


def test_dev_picks_the_learning_rate_with_the_first_seed(tmp_path):
    """Made-up dev scores fall with the learning rate and test scores rise: the lowest rate must win."""
    bench = Bench(tmp_path)
    for lr in (0.001, 0.01, 0.1):
        record(bench, method="lora", lr=lr, seed=0)
    for seed in (1, 2):
        record(bench, method="lora", lr=0.001, seed=seed)
    found = bench.tuned("lora", rates=(0.001, 0.01, 0.1))
    assert [r["settings"]["lr"] for r in found] == [0.001] * 3


def test_a_measurement_is_made_once_and_only_if_it_may_be(tmp_path):
    with pytest.raises(NotRun):
        Bench(tmp_path).kept("pi", lambda: {"value": 3.14})
    bench = Bench(tmp_path, run=True, say=lambda text: None)
    assert bench.kept("pi", lambda: {"value": 3.14}, digits=2)["value"] == 3.14
    assert Bench(tmp_path).kept("pi", lambda: {"value": 0}, digits=2)["value"] == 3.14


def test_a_real_checkpoint_once_named_is_remembered(tmp_path):
    assert Bench(tmp_path).real is None
    Bench(tmp_path, real=("folder/minilm", "folder/sst2"))
    assert Bench(tmp_path).real["base"] == "folder/minilm" and Bench(tmp_path).real["data"] == "folder/sst2"


def test_the_quick_ones_fit_into_ten_minutes_together():
    quick = claims.cheapest(10)
    assert sum(CLAIMS[name].minutes for name in quick) <= 10
    assert {"C2", "C38", "C44"} < set(quick) and "C4" not in quick


# ---- the page ----

def test_the_page_has_every_row(entries):
    page = markdown(list(entries.values()), "made for this test")
    assert re.findall(r"^## (C\d+)$", page, flags=re.M) == list(CLAIMS)
    for entry in entries.values():
        assert f"> {entry.claim.sentence}" in page and f"`python eval.py claims {entry.claim.name}`" in page
        assert plain(entry).startswith(f"{entry.claim.name} ({entry.claim.kind})  {entry.verdict.upper()}")


def test_an_entry_on_the_page():
    entry = Entry(CLAIMS["C44"], COUNTS, ["37.7 MB."])
    assert "**Holds by counting.** 37.7 MB." in markdown([entry], "")
    assert "| holds by counting | 1 | [C44](#c44) |" in markdown([entry], "")


def test_an_unknown_claim_is_an_error():
    with pytest.raises(ValueError, match="C45"):
        claims.main(["C45"])


def test_after_the_time_that_quick_allows_nothing_new_is_started(tmp_path):
    bench = Bench(tmp_path, run=True)
    assert bench.kept("pi", lambda: {"value": 3})["value"] == 3
    bench.until = 0.0
    assert bench.kept("pi", lambda: {"value": 4})["value"] == 3      # what is known stays known
    with pytest.raises(NotRun):
        bench.kept("e", lambda: {"value": 2})
    with pytest.raises(NotRun):
        bench.trial("bitfit")


def test_only_a_quick_run_has_an_end_in_time(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(claims, "ledger", lambda bench, wanted: asked.append((bench.until, wanted)) or [])
    monkeypatch.setattr(claims.time, "time", lambda: 1000.0)
    for line in ("--run quick", "--run all", "c16 C21"):
        claims.main([*line.split(), "--out", str(tmp_path)])
    (quick, some), (everything, every), (named, two) = asked
    assert quick == 1000 + 60 * 10 and everything == named == math.inf
    assert some == claims.cheapest(10) and every == list(CLAIMS) and two == ["C16", "C21"]


def test_a_claim_that_was_not_asked_for_starts_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.trials.trial", lambda *_, **__: pytest.fail("a run was started"))
    bench = Bench(tmp_path, say=lambda text: None)
    entries = claims.ledger(bench, ["C44", "C5"])
    assert [e.claim.name for e in entries] == list(CLAIMS) and not bench.may_run
    assert {e.verdict for e in entries if e.claim.name in ("C16", "C28")} == {UNRUN}
