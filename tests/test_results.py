"""results.jsonl: a result is kept, found again by everything that decided it, and never stale.

A `Desk` has code, a base and a folder of data, all of which may be edited: train.py and the prefix as they are,
for the rest stand-ins. Each `command` knows nothing of the one before, as a second `python train.py` would not,
and looks up runs whose training is pretended.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import methods.prefix
import pretend
import train
from data import bases
from deltas import methods as techniques
from harness import identity, report, results
from harness.settings import Settings

PROGRAMS = ("model.py", "deltas.py", "fastfood.py", "harness/settings.py", "harness/processes.py", "data/tasks.py",
            "data/world.py")
TRAIN = "text\tlabel\nthe soup was good\tyes\nthe soup was cold\tno\n"


def settings(name="lora", **change):
    return Settings(techniques()[name](), **{"base": "gpt-xs", "steps": 4, "device": "cpu"} | change)


def edit(path, old, new):
    """Replace a text that stands once in a file."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def executed(path):
    """What the program in a file defines, by name."""
    names = {"__name__": path.stem}
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), names)
    return names


class Desk:
    def __init__(self, folder, capsys):
        self.out, self.code, self.capsys, self.said = folder / "out", folder / "code", capsys, []
        self.weights, self.data = folder / "data" / "weights", folder / "mine"
        self.measurement = folder / "lab" / "measure.py"
        names = (*PROGRAMS, "methods/adapter.py", "methods/prompt.py")
        files = dict.fromkeys((self.code / name for name in names), "PROGRAM = 1\n")
        files |= {self.code / name: (identity.ROOT / name).read_text(encoding="utf-8")
                  for name in ("train.py", "methods/prefix.py")}
        files |= {self.weights / "gpt-xs.pt": "weights", self.weights.parent / "bpe.txt": "tokens",
                  self.data / "train.tsv": TRAIN, self.data / "dev.tsv": TRAIN,
                  self.measurement: 'def measure():\n    return {"ratio": 2.0}\n'}
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    @contextmanager
    def new_command(self):
        """A command knows nothing of the one before; `said` is what it printed."""
        identity.of_bytes.cache_clear()
        identity.of_code.cache_clear()
        results.said.clear()
        self.capsys.readouterr()
        yield
        self.said = self.capsys.readouterr().out.splitlines()

    def command(self, *wanted):
        """How many of these runs a command had to train, by the train.py that lies on the desk."""
        with self.new_command():
            own, ran = executed(self.code / "train.py"), []
            own["run"] = lambda settings, *_: ran.append(settings) or pretend.record(50.0)
            for each in wanted or [settings()]:
                assert own["run_once"](each, self.out, report.quiet)["settings"] == each.plain
        return len(ran)

    def measured(self):
        """What a command finds for a measurement: (its ratio, was it made now?)."""
        with self.new_command():
            before = len(results.read(self.out))
            record = results.once(self.out, {"measure": "speed"}, executed(self.measurement)["measure"])
        return record["ratio"], len(results.read(self.out)) > before


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    made = Desk(tmp_path, capsys)
    monkeypatch.setattr(identity, "ROOT", made.code)
    monkeypatch.setattr(bases, "WEIGHTS", made.weights)
    return made


# ---- the file ----

def test_a_torn_line_is_passed_over_and_does_not_spoil_the_next(tmp_path):
    assert results.read(tmp_path) == []
    results.append(tmp_path / "new", {"a": 1})
    path = tmp_path / "new" / "results.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"a": 2, "b"')                     # a kill came here
    results.append(tmp_path / "new", {"a": 3})
    assert results.read(tmp_path / "new") == [{"a": 1}, {"a": 3}]
    assert path.read_text(encoding="utf-8") == '{"a": 1}\n{"a": 2, "b"\n{"a": 3}\n'


def test_an_older_file_is_no_error_and_is_not_believed(desk):
    """Lines of an earlier layout, of something else, of nothing."""
    made = settings()
    older = {"method": "lora", "score": 90.0, "settings": made.plain}
    desk.out.mkdir()
    lines = map(json.dumps, (older, older | {"content": None}, 3, [1, 2], None, "text", {}, {"settings": 1}))
    (desk.out / "results.jsonl").write_text("\n".join([*lines, "", "{", '{"settings"']), encoding="utf-8")
    assert desk.command() == 1
    assert desk.said == ["kept results are not used: they do not say which code they were made by"]
    assert desk.command() == 0 and desk.said == []


# ---- once is once ----

def test_nothing_is_run_twice(tmp_path, monkeypatch):
    ran = pretend.training(monkeypatch, lambda s: (60.0, 50.0 + s.seed))
    for seed, total in ((0, 1), (0, 1), (1, 2), (0, 2)):
        record = train.run_once(settings(seed=seed), tmp_path, report.quiet)
        assert record["score"] == 50.0 + seed and len(ran) == len(results.read(tmp_path)) == total


def test_a_run_is_found_by_what_was_given_whatever_was_filled_in(tmp_path, monkeypatch):
    ran = pretend.training(monkeypatch, lambda s: (60.0, 60.0))
    train.run_once(settings(steps=None, epochs=2.0), tmp_path, report.quiet)
    for change in ({"steps": 4}, {"steps": None}, {"seed": 1}, {"lr": 0.5}, {"examples": 13}, {"scratch": True}):
        train.run_once(settings(**change), tmp_path, report.quiet)
    train.run_once(settings("bitfit"), tmp_path, report.quiet)
    assert len(ran) == 8, "none stands for another"
    train.run_once(settings(steps=None, epochs=2.0, lr=techniques()["lora"].lr), tmp_path, report.quiet)
    train.run_once(settings(steps=300), tmp_path, report.quiet)                        # what steps=None comes to
    assert len(ran) == 8


def test_the_newest_of_equal_records_counts(tmp_path, monkeypatch):
    ran = pretend.training(monkeypatch, lambda s: (60.0, 60.0))
    first = train.run_once(settings(), tmp_path, report.quiet)
    results.append(tmp_path, first | {"relative": 0.75})
    results.append(tmp_path, first | {"relative": 0.5, "content": first["content"] | {"base": "another"}})
    assert train.run_once(settings(), tmp_path, report.quiet)["relative"] == 0.75 and len(ran) == 1


def test_a_rate_that_diverges_is_kept_and_not_tried_again(tmp_path, monkeypatch, few_examples):
    made, ran, run = settings(scratch=True, examples=12, lr=1e30), [], train.run
    monkeypatch.setattr(train, "run", lambda *args: ran.append(args) or run(*args))
    for _ in range(2):
        with pytest.raises(train.Diverged, match=r"NaN or infinite at step 1: lower --lr \(it is 1e\+30\)"):
            train.run_once(made, tmp_path, report.quiet)
    (kept,) = results.read(tmp_path)
    assert len(ran) == 1 and (kept["method"], kept["seed"], kept["settings"]) == ("lora", 0, made.plain)


# ---- never stale ----

def test_edited_data_makes_new_results(desk):
    """A row more; a label mended in place, with as many bytes and the old date; a template beside it."""
    mine = settings(data=str(desk.data))
    assert desk.command(mine) == 1 and desk.command(mine) == 0 and desk.said == []
    for name, old, new in (("train.tsv", "cold\tno\n", "cold\tno\nthe soup was hot\tyes\n"), ("test.tsv", None, TRAIN),
                           ("dev.tsv", "good\tyes", "good\t no"), ("template.json", None, "{}")):
        path = desk.data / name
        if old is None:
            path.write_text(new, encoding="utf-8")
        else:
            date = path.stat()
            edit(path, old, new)
            os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))
        assert desk.command(mine) == 1, name
        assert desk.said == ["kept results are not used: data has changed since"]
        assert desk.command(mine) == 0 and desk.said == []
    (desk.data / "notes.md").write_text("nothing that a run reads", encoding="utf-8")
    assert desk.command(mine) == 0


def test_what_has_changed_is_said_once_a_command(desk):
    mine = [settings(name, data=str(desk.data)) for name in ("full", "lora", "bitfit")]
    assert desk.command(*mine) == 3
    edit(desk.data / "train.tsv", "cold\tno", "cold\tyes")
    edit(desk.code / "model.py", "1", "2")
    assert desk.command(*mine) == 3
    assert desk.said == ["kept results are not used: data, model.py have changed since"]


def test_other_weights_of_a_shipped_base_make_new_results(desk):
    assert desk.command() == 1
    for path in (desk.weights / "gpt-xs.pt", desk.weights.parent / "bpe.txt"):
        path.write_text("others", encoding="utf-8")
        assert desk.command() == 1 and desk.said == ["kept results are not used: base has changed since"], path.name
    (desk.weights / "gpt-s.pt").write_text("of another base", encoding="utf-8")
    assert desk.command() == 0


def test_each_file_of_a_checkpoint_makes_new_results(desk, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    files = "config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"
    for name in files:
        (folder / name).write_bytes(b"\x00" * 10)
    here = settings(base=str(folder))
    assert desk.command(here) == 1
    for name in files:
        (folder / name).write_bytes(b"\x01" * 10)
        assert desk.command(here) == 1 and desk.said == ["kept results are not used: base has changed since"], name
    (folder / "README.md").write_text("nothing that a run reads", encoding="utf-8")
    assert desk.command(here) == 0


def test_two_checkpoints_of_one_name_in_two_folders_have_a_baseline_each(desk, tmp_path, monkeypatch):
    """`--base model` typed in two folders, with one --out."""
    for side, trained in (("one", 1), ("two", 1), ("one", 0), ("two", 0)):
        (tmp_path / side / "model").mkdir(parents=True, exist_ok=True)
        (tmp_path / side / "model" / "model.safetensors").write_text(side, encoding="utf-8")
        monkeypatch.chdir(tmp_path / side)
        assert desk.command(settings("full", base="model")) == trained, side
    shutil.move(tmp_path / "two" / "model", tmp_path / "elsewhere" / "model")
    assert desk.command(settings("full", base=str(tmp_path / "elsewhere" / "model"))) == 0, "a folder may move"


def test_an_edited_program_makes_new_results_and_a_comment_does_not(desk):
    assert desk.command() == 1
    edit(desk.code / "train.py", "warmup = max(1, round(0.06 * settings.steps))", "warmup = 1")
    assert desk.command() == 1 and desk.said == ["kept results are not used: train.py has changed since"]
    for old, new in (("warmup = 1", "\n    warmup = 1  # no warm-up"), ('"""The one training', '"""The only training'),
                     ("import torch\n", "import torch\n\n# Comments are for readers.\n")):
        edit(desk.code / "train.py", old, new)
        assert desk.command() == 0 and desk.said == [], old
    for name in PROGRAMS:
        edit(desk.code / name, "1", "2")
        assert desk.command() == 1 and desk.said == [f"kept results are not used: {name} has changed since"]


def test_an_edited_technique_makes_its_own_results_new_and_those_that_import_it(desk, monkeypatch):
    """The prefix imports from methods/prompt.py, and nothing from the others."""
    monkeypatch.setattr(methods.prefix, "__file__", str(desk.code / "methods" / "prefix.py"))
    assert desk.command(settings("prefix")) == 1
    for name, old, new in (("prefix", "import torch\n", "import torch\nMORE = 1\n"), ("prompt", "1", "2")):
        edit(desk.code / "methods" / f"{name}.py", old, new)
        assert desk.command(settings("prefix")) == 1
        assert desk.said == [f"kept results are not used: methods/{name}.py has changed since"]
    edit(desk.code / "methods" / "adapter.py", "1", "2")
    assert desk.command(settings("prefix")) == 0


def test_a_technique_may_import_another_in_any_spelling(desk, tmp_path):
    path = tmp_path / "own.py"
    for line, found in (("from methods.prompt import SoftPrompt", "prompt"), ("from methods import adapter", "adapter"),
                        ("import methods.prefix", "prefix prompt"), ("from . import nothing", ""), ("import os", "")):
        path.write_text(f"{line}\n", encoding="utf-8")
        assert [p.stem for p in identity.technique_files(path)] == ["own", *found.split()], line


def test_an_edited_measurement_is_made_again(desk):
    assert desk.measured() == (2.0, True) and desk.measured() == (2.0, False)
    edit(desk.measurement, "2.0}", "3.0}  # as it should be")
    assert desk.measured() == (3.0, True) and desk.said == ["kept results are not used: measure.py has changed since"]
    edit(desk.measurement, "def measure():", 'def measure():\n    """A comment."""\n')
    assert desk.measured() == (3.0, False)
    edit(desk.code / "model.py", "1", "2")
    assert desk.measured() == (3.0, True) and desk.said == ["kept results are not used: model.py has changed since"]


def test_a_decorated_measurement_rests_on_the_file_in_which_it_is_written():
    @torch.no_grad()
    def measure():
        pass
    assert "tests/test_results.py" in identity.code(measure=measure), "not torch's file of the decorator"


# ---- read once a command ----

def test_files_are_read_once_a_command_and_data_again_if_it_is_written_meanwhile(desk, monkeypatch):
    mine, read, read_bytes = settings(data=str(desk.data)), [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    first = mine.key["content"]
    assert sorted(read) == ["bpe.txt", "dev.tsv", "gpt-xs.pt", "train.tsv"]
    assert mine.key["content"] == first and len(read) == 4
    edit(desk.data / "train.tsv", "cold\tno\n", "cold\tno\nhot\tyes\n")
    assert mine.key["content"]["data"] != first["data"] and read[4:] == ["train.tsv"]
    edit(desk.code / "model.py", "1", "2")
    assert mine.key["content"]["model.py"] == first["model.py"], "what is edited while a command runs is not what runs"


@pytest.mark.usefixtures("few_examples")
def test_a_run_rests_on_what_it_has_read(tmp_path):
    """A row is mended while the run trains: its record and its file belong to the old row."""
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(TRAIN, encoding="utf-8")
    mine = settings("bitfit", scratch=True, data=str(tmp_path))
    file, content = mine.file, mine.key["content"]
    edit_once = [lambda: edit(tmp_path / "train.tsv", "cold\tno", "cold and late\tno")]
    record = train.run(mine, tmp_path / "out", lambda line: edit_once.pop()() if edit_once else None)
    assert record["content"] == content != mine.key["content"]
    assert record["file"] == file != mine.file and (tmp_path / "out" / file).is_file()


def test_a_link_in_place_of_results_jsonl_is_not_written_through(tmp_path, capsys):
    (tmp_path / "elsewhere").write_text("kept\n", encoding="utf-8")
    (tmp_path / "results.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        results.append(tmp_path, {"method": "lora"})
    assert (tmp_path / "elsewhere").read_text(encoding="utf-8") == "kept\n"
    assert capsys.readouterr().out == '{"method": "lora"}\n', "a record that cannot be written is printed"
