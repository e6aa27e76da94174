"""results.jsonl: a run is written once, found again by all its settings, and survives a kill."""

import train
from deltas import methods
from lab import results


def settings(name, **change):
    return train.Settings(methods()[name](), **{"base": "gpt-xs", "steps": 4, "device": "cpu"} | change)


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
