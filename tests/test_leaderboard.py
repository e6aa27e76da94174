"""The smallest delta: what is counted, what enters, and what is said of a file that does not."""

import json

import pytest
import torch

from course import grade, leaderboard
from data.bases import load_base
from deltas import attach, methods, save


@pytest.fixture
def delta(tmp_path):
    """A function that hands in a new delta: it scores as the frozen base does, far below the bar."""
    (tmp_path / "in").mkdir()

    def hand_in(name, **fields):
        model = attach(methods()[name](**fields), load_base(leaderboard.BASE)[0])
        save(tmp_path / "in" / "mine.pt", model)
        return tmp_path / "in" / "mine.pt"
    return hand_in


def entered(tmp_path):
    said = leaderboard.enter(tmp_path / "in", 0, tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    test, = results["tests"]
    assert (test["max_score"], test["output"]) == (1, said)
    return test["score"], said, results["leaderboard"]


@pytest.fixture
def stand_in(monkeypatch):
    """For what is not about scores: the child is not started, and finds this."""
    found = {"parameters": 200, "score": 88.0}
    monkeypatch.setattr(leaderboard, "measured_apart", lambda path, seed: found)
    return found


def test_a_delta_that_reaches_the_bar_enters_with_its_parameters(tmp_path, stand_in):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mine.pt").write_bytes(b"a delta")
    assert entered(tmp_path) == (1, "200 parameters, 88.0 %", [
        {"name": "parameters", "value": 200, "order": "asc"}, {"name": "accuracy", "value": 88.0}])
    stand_in["score"] = 87.2
    assert entered(tmp_path) == (0, "87.2 % is less than 87.3 %, 90 % of full fine-tuning's 97.0 %", [])


def test_one_file_is_handed_in_and_no_link(tmp_path, stand_in):
    (tmp_path / "in").mkdir()
    assert entered(tmp_path)[1] == "hand in one file that ends with .pt, and no link; here are 0"
    (tmp_path / "in" / "a.pt").symlink_to(tmp_path / "results.json")
    assert entered(tmp_path)[1] == "hand in one file that ends with .pt, and no link; here are 1"
    (tmp_path / "in" / "a.pt").unlink()
    (tmp_path / "in" / "a.pt").write_bytes(bytes(grade.LARGEST + 1))
    assert entered(tmp_path) == (0, "a.pt is larger than 1,048,576 bytes", [])


def test_every_value_counts_and_places_do_too(delta, monkeypatch):
    monkeypatch.setattr(leaderboard, "BASE", "gpt-xs")
    for name, fields, values in (("intrinsic", {"dim": 31}, 31), ("mask", {"k": 40, "by": "magnitude"}, 2 * 40)):
        found = leaderboard.measured(delta(name, **fields), 0)
        assert found["parameters"] == values, name
        assert 25 < found["score"] < 70, "a new delta answers as the frozen base"


def test_a_file_that_is_not_sound_is_refused_with_the_reason(delta, monkeypatch):
    monkeypatch.setattr(leaderboard, "BASE", "gpt-xs")
    path = delta("bitfit")
    torch.save(torch.load(path) | {"settings": {"only": "none"}}, path)
    assert leaderboard.measured(path, 0)["refused"].startswith("mine.pt: only='none': choose all or query_up")
    path.write_bytes(path.read_bytes()[:1000])
    assert leaderboard.measured(path, 0)["refused"] == "mine.pt: not written by torch.save, or cut short"
    model = load_base("gpt-xs")[0]
    model.classify(2)
    save(path, attach(methods()["bitfit"](), model))
    assert "a Classifier: this task is answered by the LM head" in leaderboard.measured(path, 0)["refused"]


def test_in_a_process_of_its_own_a_new_delta_scores_as_the_frozen_base_and_does_not_enter(delta, tmp_path):
    delta("bitfit")
    score, said, rows = entered(tmp_path)
    assert (score, rows) == (0, []) and "% is less than 87.3 %" in said, said
