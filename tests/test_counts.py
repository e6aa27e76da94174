"""Counts at real sizes: the real code on the meta device, the closed formulas, and what the papers print."""

import csv
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from deltas import methods
from lab import costs, papers
from lab.papers import Row, verdict
from lab.sizes import MINILM, SIZES, attached, t5_size
from methods.full import Full, base_size


@pytest.fixture(scope="module")
def rows():
    return papers.rows()


@pytest.mark.parametrize("name", ["gpt2", "roberta-base"])
def test_what_is_counted_on_meta_is_what_the_formula_says(name):
    for kind in methods().values():
        row = costs.row(name, costs.in_paper(kind, {}))
        assert (row["trained"], row["stored"]) == (row["formula"], row["stored_formula"]), kind
        assert row["settings"] == " ".join(f"{field}={value}" for field, value in kind.paper.items()), kind


def test_the_sizes_of_the_bases():
    sizes = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
             "bert-base-cased": 108_310_272, "bert-base-uncased": 109_482_240, "bert-large-cased": 333_579_264,
             "bert-large-uncased": 335_141_888, "roberta-base": 124_645_632, "roberta-large": 355_359_744,
             "gpt3-175b": 174_604_259_328}
    assert {name: attached(config, Full()).base_size for name, config in SIZES.items()} == sizes
    assert base_size(MINILM) == 22_713_216


def test_a_base_is_not_changed_by_the_delta_that_a_copy_of_it_carries():
    lora = methods()["lora"](rank=8)
    assert attached(SIZES["gpt2"], lora).base_shapes == attached(SIZES["gpt2"], Full()).base_shapes


@pytest.mark.parametrize("name, size", [("small", 76_961_152), ("base", 247_577_856), ("large", 783_150_080),
                                        ("xl", 2_849_757_184), ("xxl", 11_135_332_352)])
def test_the_sizes_of_t5_by_formula(name, size):
    assert t5_size(name) == size


@pytest.mark.parametrize("printed, ours, expected", [
    ("20,480", 20480, "exact"),
    ("20,480", 20481, "off +0.0049 %"),
    ("40.1M", 40_109_568, "rounded"),
    ("0.9M", 884_736, "rounded"),
    ("18.8M", 18_874_368, "truncated"),
    ("18.9M", 18_874_368, "rounded"),
    ("603.8M", 603_979_776, "off +0.030 %"),     # neither 604.0 nor 603.9
    ("23.00M", 23_002_848, "rounded"),
    ("23.00M", 23_012_848, "off +0.056 %"),     # a closing zero behind the point is a digit
    ("250K", 245_760, "to 2 digits"),           # before it, it may be a place
    ("500K", 491_520, "to 1 digit"),
    ("250K", 244_000, "off -2.4 %"),
    ("0.09%", Fraction(95, 1000), "truncated"),
    ("0.08%", Fraction(817, 10000), "rounded"),
    ("1.2TB", 1_047_625_555_968, "off -13 %"),
])
def test_a_verdict_is_computed_from_the_printed_digits(printed, ours, expected):
    assert verdict(printed, ours) == expected


def test_where_a_column_is_rounded_cutting_off_does_not_count():
    assert Row("", "", "0.4M", 491_520, "").equal
    assert not Row("", "", "0.4M", 491_520, "", cut=False).equal


def test_a_formula_wrong_by_a_tenth_would_be_seen(rows):
    """Printed numbers with three digits or more cannot agree by luck."""
    telling = [r for r in rows if r.equal and sum(c.isdigit() for c in r.printed.lstrip("0.")) >= 3
               and not r.verdict.startswith("to ")]
    assert len(telling) >= 25
    for r in telling:
        assert verdict(r.printed, r.ours * Fraction(11, 10), r.cut).startswith("off"), r


def test_more_than_forty_published_counts_are_reproduced_to_every_printed_digit(rows):
    assert sum(r.equal and not r.fitted and not r.verdict.startswith("to ") for r in rows) > 40
    assert [r.what for r in rows if not r.equal and not r.why] == []  # and what differs is explained


def test_the_table_is_no_wider_than_110_columns(rows):
    lines = papers.table(rows)
    assert max(map(len, lines)) <= 110
    assert "62 of 87 printed numbers are reproduced to the printed digits:" in lines


def test_gpt3_with_an_untied_head_is_still_not_what_is_printed(rows):
    row, = (r for r in rows if r.what == "GPT-3 175B")
    assert row.ours == 174_604_259_328 + 50_257 * 12_288 and row.verdict == "off -0.019 %"


def test_a_note_stands_below_the_number_that_has_one_and_nowhere_else():
    rows = [Row("a paper", "small", "2M", 2_000_000, "m=2"), Row("a paper", "large", "4M", 2_000_000, "m=4", "a slip")]
    lines = papers.table(rows)
    assert [line.split() for line in lines[2:6]] == [
        ["a", "paper"], "small 2M 2,000,000 m=2 exact".split(),
        "large 4M 2,000,000 m=4 off -50 %".split(), ["a", "slip"]]


def test_the_csv_has_every_printed_number(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(papers, "rows", lambda: rows)
    costs.main(["--check", "--csv", str(tmp_path / "papers.csv")])
    with open(tmp_path / "papers.csv", encoding="utf-8", newline="") as file:
        written = [(row["what"], row["printed"], row["verdict"]) for row in csv.DictReader(file)]
    assert written == [(r.what, r.printed, r.verdict) for r in rows]


@pytest.mark.slow
def test_gpt3_takes_seconds_and_no_memory():
    """In a process of its own: processor seconds, since the machine may be busy; peak memory in kilobytes."""
    code = ("import resource; from lab import costs; costs.main(['--model', 'gpt3-175b']);"
            "u = resource.getrusage(resource.RUSAGE_SELF); print(u.ru_utime + u.ru_stime, u.ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds, kilobytes = done.stdout.split()[-2:]
    assert done.stdout.count("agrees") == len(methods()) and "DIFFERS" not in done.stdout
    assert float(seconds) < 10 and int(kilobytes) < 500_000
