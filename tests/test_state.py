"""A run that was stopped goes on: same scores, same curve, same tensors as the run that nobody disturbed."""

import sys

import pytest
import torch

import train
from data import files, tasks
from deltas import fingerprint, methods, read
from harness import boundary, report, results, state
from harness.settings import Settings
from model import NotFinite

pytestmark = pytest.mark.usefixtures("few_examples")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(state, "AFTER", 0)
    monkeypatch.setattr(sys, "gettrace", lambda: None)  # whatever measures the tests' coverage


def settings(name="lora", **change):
    return Settings(methods()[name](), **{"base": "gpt-xs", "steps": 30, "examples": 12, "batch_size": 4} | change)


def stopped(monkeypatch, made, out, at):
    """Start the run and interrupt it in its training step number `at`."""
    step, count = torch.optim.AdamW.step, []

    def interrupted(self, *args, **kw):
        count.append(1)
        if len(count) == at:
            raise KeyboardInterrupt
        return step(self, *args, **kw)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(made, out, report.quiet)


@pytest.mark.parametrize("name", ["lora", "prefix", "intrinsic", "mask", "full"])
def test_a_stopped_run_ends_bit_for_bit_as_the_undisturbed_one(name, monkeypatch, tmp_path):
    """Stopped in step 17: dev was scored at 2, 4, ... 16, so it goes on from 16, and once more after step 25."""
    calm, said = train.run(settings(name), tmp_path / "calm", report.quiet), []
    stopped(monkeypatch, settings(name), tmp_path / "out", at=17)
    stopped(monkeypatch, settings(name), tmp_path / "out", at=10)                      # 16 + 10: in step 26
    torch.manual_seed(99)                                                              # whatever happened before
    again = train.run(settings(name), tmp_path / "out", said.append)
    assert "going on from step 24, where this run was stopped" in "\n".join(said)
    for clock in ("seconds", "ms_per_step"):
        del calm[clock], again[clock]
    assert calm == again
    one, other = (read(tmp_path / folder / calm["file"]) for folder in ("calm", "out"))
    assert fingerprint(one["tensors"]) == fingerprint(other["tensors"])


def test_the_state_is_gone_once_the_line_is_written(monkeypatch, tmp_path):
    stopped(monkeypatch, settings(), tmp_path, at=17)
    kept = list(tmp_path.glob("*.state"))
    assert [path.name for path in kept] == [settings().file + ".state"] and files.tensors(kept[0])["step"] == 16
    assert boundary.kept["state"] == "the same command goes on from step 16"
    train.run_once(settings(), tmp_path, report.quiet)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".pt"]


def test_a_run_that_was_killed_before_its_line_was_written_is_not_trained_again(monkeypatch, tmp_path):
    calm = train.run(settings(), tmp_path, report.quiet)                               # no line is appended
    monkeypatch.setattr(tasks, "loss", lambda *_: pytest.fail("a step was trained again"))
    monkeypatch.setattr(train.checks, "memory_of_a_step", lambda *_: calm["memory_mb"])
    again = train.run(settings(), tmp_path, report.quiet)
    assert (again["score"], again["curve"]) == (calm["score"], calm["curve"])


def test_fresh_other_settings_and_a_short_run_begin_at_the_beginning(monkeypatch, tmp_path):
    stopped(monkeypatch, settings(), tmp_path, at=17)
    for made, fresh in ((settings(), True), (settings(seed=1), False)):
        said = []
        train.run(made, tmp_path, said.append, fresh=fresh)
        assert "going on" not in "\n".join(said)
    monkeypatch.setattr(state, "AFTER", 120)                                           # seconds of training
    stopped(monkeypatch, settings(seed=2), tmp_path, at=17)
    assert not (tmp_path / (settings(seed=2).file + ".state")).exists()


def test_no_state_is_written_under_a_debugger(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    stopped(monkeypatch, settings(), tmp_path, at=17)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_state_is_refused_by_name(monkeypatch, tmp_path):
    stopped(monkeypatch, settings(), tmp_path, at=17)
    path = tmp_path / (settings().file + ".state")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"\.state: not written by torch.save, or cut short"):
        train.run(settings(), tmp_path, report.quiet)


def test_a_diverged_run_leaves_no_state(monkeypatch, tmp_path):
    """Dev is finite at steps 2 to 8 and no more at 10."""
    scores = iter([50.0, 51.0, 52.0, 53.0])

    def dev_score(*_):
        if (score := next(scores, None)) is None:
            raise NotFinite("logits that are NaN or infinite")
        return score
    monkeypatch.setattr(tasks, "dev_score", dev_score)
    with pytest.raises(train.Diverged, match="logits that are NaN or infinite at step 10: lower --lr"):
        train.run_once(settings("full"), tmp_path, report.quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"] and "diverged" in results.read(tmp_path)[0]
